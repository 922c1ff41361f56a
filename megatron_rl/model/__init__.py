"""The policy: a Hugging Face checkpoint as Megatron's GPTModel, and back."""
