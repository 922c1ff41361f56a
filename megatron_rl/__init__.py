"""megatron_rl: C3PO reinforcement learning of Mixture-of-Experts models on Megatron-Core and SGLang."""

from megatron_rl.compat import adapt_megatron_when_imported

__version__ = "0.1.0"

adapt_megatron_when_imported()
