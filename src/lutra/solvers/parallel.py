"""Solve the matrices of a block side by side, one CPU thread each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def map_layers(solve: Callable[[str, Tensor], T], weights: Mapping[str, Tensor]) -> dict[str, T]:
    """``{path: solve(path, weight)}``, in the order of ``weights``.

    The solvers walk through columns with thousands of small operations. Split over threads each of
    them would end in a barrier, which costs more than the work and stalls whenever another process
    takes a core; so each matrix has one thread, and several matrices are solved at a time. The
    result does not depend on how many. On a GPU one matrix follows the other.
    """
    threads = torch.get_num_threads()
    if any(w.device.type != "cpu" for w in weights.values()):
        return {path: solve(path, w) for path, w in weights.items()}
    largest_first = sorted(weights, key=lambda path: -weights[path].numel())
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = {p: pool.submit(solve, p, weights[p]) for p in largest_first}
            return {path: futures[path].result() for path in weights}
    finally:
        torch.set_num_threads(threads)
