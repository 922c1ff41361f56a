"""Ablations: arms x seeds of ordinary runs, their table, figure and verdicts (docs/ablations.md)."""
