"""The trainer: ranks that train on what the orchestrator offers, and obey its commands. They see no text."""
