"""Mount Megatron-Core checkpoints as Hugging Face models, without converting them."""
