"""The policy: a bailing_moe checkpoint as Megatron's GPTModel, and back."""
