"""The configuration: schema.py says what exists, load.py builds it, check.py holds rules across sections."""
