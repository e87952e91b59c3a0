"""Measurements: one kernel, or a whole model."""
