"""Peers that `bench.cuda` can measure, each only if its package is installed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lutra.bench.cuda import Candidate

PEERS: dict[str, Callable[[int, int, int, int, Tensor], Candidate | None]] = {}
