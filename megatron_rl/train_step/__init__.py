"""One optimiser step through Megatron's schedule."""

from megatron_rl.compat import megatron_cpu

megatron_cpu.install()  # before any module here imports megatron.core, whichever is imported first
