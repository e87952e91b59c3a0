"""Lutra: low-bit large language models, made from a Hugging Face checkpoint and run fast."""

__version__ = "0.1.0"
