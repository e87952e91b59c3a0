"""The methods: one system of the literature per file, tensors in, tensors out.

A method is a function of one decoder block. It sees weights as float32 ``[out, in]`` tensors,
statistics of what each linear reads, the places where channels may be rescaled, and, if it asked
for them, means to run the block. It returns packed weights and the other parameters that it
changed. It never sees a module, a file or a device; the runner owns those.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from torch import Tensor

from lutra.architectures import Architecture
from lutra.errors import SchemeError
from lutra.formats.bitplanes import BitPlanes
from lutra.formats.grouped import Grouped
from lutra.scheme import Format

MODULES = ("rtn", "gptq", "awq", "lut_gemm", "flattenquant")
"""Files of this package that define a method, in the order in which they are listed."""


@dataclass
class InputStatistics:
    """What calibration says of the tensor that one group of linears reads.

    Attributes:
        hessian_II: mean over tokens of ``x^T x``, float32 ``[in, in]``.
        absmean_I: mean of ``|x|`` per channel, ``[in]``.
        shift_II: mean of ``(x_original - x)^T x``, ``[in, in]``, where x_original is what the
            linear reads in the original model; None unless a method asked for it.
        tokens: number of tokens seen.
    """

    hessian_II: Tensor
    absmean_I: Tensor
    tokens: int
    shift_II: Tensor | None = None


@dataclass
class BlockRunner:
    """Means to run a block with other weights, for methods that train on its output.

    Attributes:
        samples: number of calibration samples.
        run: ``(parameters by path, sample indices) -> block output [n, tokens, hidden]``, on the
            activations of the already quantized model; differentiable in the parameters.
        target: ``(sample indices) -> output of the original block on the original activations``.
    """

    samples: int
    run: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    target: Callable[[Tensor], Tensor]


@dataclass
class Block:
    """One decoder block (or one layer outside of them, such as the head) to be quantized.

    Attributes:
        name: for messages, for example ``model.layers.3``.
        weights: float32 ``[out, in]`` by path in the block; only those to be quantized.
        formats: storage format of each.
        inputs: statistics by path; linears that share an input share the object. Empty for methods
            that need none.
        parameters: the block's other parameters by path, as stored.
        architecture: the family's entry, with fold sites.
        runner: means to run the block, or None.
        seed: for anything random.
    """

    name: str
    weights: dict[str, Tensor]
    formats: dict[str, Format]
    inputs: dict[str, InputStatistics]
    parameters: dict[str, Tensor]
    architecture: Architecture
    runner: BlockRunner | None = None
    seed: int = 0


@dataclass
class Result:
    """What a method returns for a block.

    Attributes:
        weights: packed weights by path.
        parameters: other parameters that changed (folded norms, biases), by path.
        errors: relative squared error of each layer's output by path, where the method knows it
            better than a comparison of weights tells (because it rescaled channels).
        notes: facts for the report.
    """

    weights: dict[str, BitPlanes | Grouped]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: as on the command line.
        paper: system and where it was published.
        needs: statistics that the runner must collect: any of ``hessian``, ``shift``, ``block``,
            ``inputs`` (rows of what each group reads; for methods of scope ``model``).
        scope: ``layer`` (each linear alone), ``block`` (needs the family's table entry), ``model``
            (that, and chooses for all blocks together, see :mod:`lutra.runner.model_walk`).
        formats: kinds of format it can produce; the first is the default.
        options: the dataclass of its options, with their defaults.
        quantize: the function; of scope ``model`` it solves one group of linears.
    """

    name: str
    paper: str
    scope: str
    formats: tuple[str, ...]
    options: type
    quantize: Callable[..., Any]
    needs: Callable[[Any], frozenset[str]]

    @property
    def summary(self) -> str:
        """First sentence of the method's module docstring."""
        doc = inspect.getdoc(inspect.getmodule(self.quantize)) or ""
        return doc.split("\n\n")[0].replace("\n", " ")

    def parse_options(self, values: Mapping[str, Any]) -> Any:
        """The options dataclass from ``--set`` values.

        Raises:
            SchemeError: an option does not exist (names the nearest), or has the wrong type or a
                value out of range.
        """
        known = {f.name: f for f in fields(self.options)}
        given = dict(values)
        for key, value in values.items():
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise SchemeError(
                    f"method {self.name} has no option {key!r}.{hint} "
                    f"It has: {', '.join(sorted(known)) or 'none'}"
                )
            default = known[key].default
            if value is None and isinstance(default, str):
                given[key] = value = "none"  # which the command line reads as None
            accepted = (int, float) if isinstance(default, float) else type(default)
            if not isinstance(value, accepted) or (
                isinstance(value, bool) and not isinstance(default, bool)
            ):
                raise SchemeError(
                    f"option {key} of method {self.name} takes a "
                    f"{type(default).__name__}, such as {default!r}, not {value!r}"
                )
        return self.options(**given)


F = TypeVar("F", bound=Callable[..., Any])
_REGISTRY: dict[str, Method] = {}


def method(
    name: str,
    *,
    paper: str,
    options: type,
    scope: str = "layer",
    formats: tuple[str, ...] = ("ubcq", "int"),
    needs: Callable[[Any], frozenset[str]] = lambda options: frozenset(),
) -> Callable[[F], F]:
    """Register a function as a method. ``needs`` may depend on the options."""

    def register(function: F) -> F:
        _REGISTRY[name] = Method(name, paper, scope, formats, options, function, needs)
        return function

    return register


def methods() -> dict[str, Method]:
    """All methods by name."""
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return dict(_REGISTRY)


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        SchemeError: there is none; names those there are.
    """
    available = methods()
    if name not in available:
        near = get_close_matches(name, available, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SchemeError(f"unknown method {name!r}.{hint} There are: {', '.join(available)}")
    return available[name]


def check_choice(method_name: str, option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a SchemeError if an option's value is not one of the allowed."""
    if value not in allowed:
        raise SchemeError(
            f"option {option} of method {method_name} is one of {', '.join(allowed)}, not {value!r}"
        )


def check_range(
    method_name: str, option: str, value: float, least: float, most: float = math.inf
) -> None:
    """Raise a SchemeError if an option's value is not finite, or not from least to most."""
    if not (math.isfinite(value) and least <= value <= most):
        end = "" if most == math.inf else f" and at most {most}"
        raise SchemeError(
            f"option {option} of method {method_name} must be at least {least}{end}, not {value}"
        )


def scale_dtype(*scales: Tensor) -> torch.dtype:
    """float16 where the scales fit it, float32 where they are too large or all too small."""
    largest = max(float(s.abs().max()) for s in scales)
    return torch.float32 if largest > 6e4 or 0 < largest < 2**-10 else torch.float16
