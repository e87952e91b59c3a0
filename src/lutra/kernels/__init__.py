"""Multiplying by packed weights: op schemas, the reference, kernels per device, the dispatcher."""
