"""Decoding at the speed of the kernels: a static cache, a CUDA graph of one token, fused blocks.

- `cache.py`: a key-value cache of fixed size that transformers' models write to.
- `blocks.py`: what the decoder blocks of known families compute for one token, in few launches.
- `step.py`: one token of a model, recorded as a CUDA graph.
- `generation.py`: the loop around it, behind ``model.generate``.
"""
