"""megatron_rl: C3PO reinforcement learning of Mixture-of-Experts models on Megatron-Core and SGLang."""

from megatron_rl.compat import adapt_megatron_when_imported

adapt_megatron_when_imported()


def __getattr__(name: str) -> str:
    """__version__ is read when it is asked for, because c3po imports torch."""
    if name == "__version__":
        from c3po import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
