"""The policy: a bailing_moe checkpoint as Megatron's GPTModel, and back."""

from megatron_rl.compat import megatron_cpu

megatron_cpu.install()  # before any module here imports megatron.core, whichever is imported first
