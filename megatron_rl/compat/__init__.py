"""One file per dependency that must be adapted; each names the version it was written for."""
