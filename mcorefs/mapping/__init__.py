"""Canonical Megatron tensors -> a Hugging Face model: tensors, config.json, tokenizer files."""
