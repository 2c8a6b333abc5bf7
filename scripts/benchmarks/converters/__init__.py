"""Other ways from a Megatron checkpoint to Hugging Face's files, each run as its users run it.

Each module is a program: `python -m scripts.benchmarks.converters.NAME CHECKPOINT MODEL OUT`, where
MODEL is the Hugging Face model that the converter wants to see: config, tokenizer and index.
"""
