"""One optimiser step through Megatron's schedule."""
