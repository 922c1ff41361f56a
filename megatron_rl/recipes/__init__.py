"""What a user runs, built from the parts: rl, sft, evaluate, quickstart."""
