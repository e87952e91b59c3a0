"""Shared mathematics of the methods: pure functions on tensors, no modules, files or devices."""
