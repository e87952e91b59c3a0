"""Exact changes of a layer that make it easier to quantize: pure functions on tensors."""
