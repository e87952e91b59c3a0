"""Bridges to other libraries: transformers, lm-evaluation-harness."""
