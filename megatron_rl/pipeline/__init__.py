"""`megatron-rl pipeline`: the report's stages one after the other, from a base checkpoint to a measured model."""
