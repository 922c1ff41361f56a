"""One file per claim; `python -m benchmarks` runs them, `python -m benchmarks.NAME --quick` one of them in seconds."""
