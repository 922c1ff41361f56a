"""The version of the whole project. setup.py reads it here, and so does `megatron-rl --version`."""

__version__ = "0.1.0"
