"""Names of storage formats, and the rules that give each layer one.

A format name parses back: ``bcq3g128`` is three bit planes with free levels in groups of 128,
``ubcq3g128`` the same with equally spaced levels (one stored scale per group), ``int4g64`` grouped
integers, ``bcq3row`` one group per row. ``+f32`` marks scales stored in float32 instead of float16,
``+serve2,3`` scales refitted for the first 2 and 3 planes.

``flat4`` and ``flat8`` are flattened integers (:mod:`lutra.formats.flat`), multiplied with
activations that are quantized too: ``flat4x12`` has 12 further columns of weight digits,
``+static`` a stored step of the activations, ``+smooth`` a stored scale of the inputs, ``+had64``
inputs that are rotated in blocks of 64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from lutra.errors import SchemeError

KINDS = ("bcq", "ubcq", "int", "flat")
_NAME = re.compile(
    r"(?P<kind>bcq|ubcq|int)(?P<bits>\d+)(?:g(?P<group>\d+)|row)(?P<f32>\+f32)?"
    r"(?:\+serve(?P<serve>\d+(?:,\d+)*))?"
)
_FLAT_NAME = re.compile(
    r"flat(?P<bits>[48])(?:x(?P<extra>[1-9]\d*))?(?P<static>\+static)?(?P<smooth>\+smooth)?"
    r"(?:\+had(?P<rotated>[1-9]\d*))?"
)


@dataclass(frozen=True)
class Format:
    """How one layer's weight is stored.

    Attributes:
        kind: ``bcq`` (bit planes, free levels), ``ubcq`` (bit planes, uniform levels), ``int``,
            ``flat`` (flattened integers).
        bits: planes or bits, 1 to 8.
        group_size: inputs per group, a multiple of 32; -1 for one group per row.
        scale_dtype: dtype of scales and offsets.
        serve_bits: further precisions served by a prefix of the planes.
        extra: of ``flat``: stored columns beyond one an input.
        static: of ``flat``: whether activations have one stored step.
        smooth: of ``flat``: whether inputs are divided by a stored scale.
        rotated: of ``flat``: inputs in each block that a Hadamard matrix turns; 0 for none.
    """

    kind: str
    bits: int
    group_size: int = 128
    scale_dtype: torch.dtype = torch.float16
    serve_bits: tuple[int, ...] = ()
    extra: int = 0
    static: bool = False
    smooth: bool = False
    rotated: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SchemeError(f"unknown format {self.kind!r}; there are {', '.join(KINDS)}")
        if self.kind == "flat":
            if self.bits not in (4, 8):
                raise SchemeError(f"flattened integers have 4 or 8 bits, not {self.bits}")
            if self.rotated and (self.rotated < 2 or self.rotated & (self.rotated - 1)):
                raise SchemeError(
                    f"inputs are rotated in blocks of a power of two, not {self.rotated}"
                )
            if self.rotated and self.smooth:
                raise SchemeError("a layer has a stored scale of its inputs or rotates them")
            object.__setattr__(self, "group_size", -1)  # one scale an output, always in float32
            object.__setattr__(self, "scale_dtype", torch.float32)
        elif self.extra or self.static or self.smooth or self.rotated:
            raise SchemeError(
                "only flat formats have further columns, a static step, smoothing or a rotation"
            )
        if not 1 <= self.bits <= 8:
            raise SchemeError(f"bits must be between 1 and 8, not {self.bits}")
        if self.group_size != -1 and (self.group_size < 32 or self.group_size % 32):
            raise SchemeError(
                f"group size must be a multiple of 32, or -1 for one group per row, "
                f"not {self.group_size}"
            )
        if self.kind in ("int", "flat") and self.serve_bits:
            raise SchemeError("only bit planes (bcq, ubcq) can serve lower precisions")
        for bits in self.serve_bits:
            if not 1 <= bits < self.bits:
                raise SchemeError(f"a {self.bits}-bit file can not serve {bits} bits")

    @classmethod
    def parse(cls, name: str) -> Format:
        """Inverse of ``str(format)``.

        Raises:
            SchemeError: the name is not of the form ``bcq3g128``.
        """
        flat = _FLAT_NAME.fullmatch(name)
        if flat:
            return cls(
                "flat", int(flat["bits"]), extra=int(flat["extra"] or 0),
                static=bool(flat["static"]), smooth=bool(flat["smooth"]),
                rotated=int(flat["rotated"] or 0),
            )  # fmt: skip
        match = _NAME.fullmatch(name)
        if not match:
            raise SchemeError(
                f"unknown format {name!r}; formats look like bcq3g128, ubcq3g128, int4g64, "
                "bcq3row, flat4"
            )
        serve = match["serve"]
        return cls(
            match["kind"],
            int(match["bits"]),
            int(match["group"] or -1),
            torch.float32 if match["f32"] else torch.float16,
            tuple(int(b) for b in serve.split(",")) if serve else (),
        )

    def __str__(self) -> str:
        if self.kind == "flat":
            extra = f"x{self.extra}" if self.extra else ""
            marks = "+static" * self.static + "+smooth" * self.smooth
            marks += f"+had{self.rotated}" if self.rotated else ""
            return f"flat{self.bits}{extra}{marks}"
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        f32 = "+f32" if self.scale_dtype == torch.float32 else ""
        serve = "+serve" + ",".join(map(str, self.serve_bits)) if self.serve_bits else ""
        return f"{self.kind}{self.bits}{group}{f32}{serve}"

    def group_size_for(self, in_features: int) -> int:
        """Inputs per group in a layer: one group never spans more than a row's whole words."""
        row = -(-in_features // 32) * 32
        return row if self.group_size == -1 else min(self.group_size, row)


@dataclass(frozen=True)
class Scheme:
    """Which layers are quantized, and how: the first rule whose pattern matches decides.

    Attributes:
        rules: ``(pattern, format or None)``; patterns are shell-style (``model.layers.*``) and
            match the layer's full name. None leaves the layer as it is.
    """

    rules: tuple[tuple[str, Format | None], ...] = field(default_factory=tuple)

    def format_of(self, layer: str) -> Format | None:
        """Format of a layer by its full name, or None if it stays as it is."""
        for pattern, format in self.rules:
            if fnmatchcase(layer, pattern):
                return format
        return None

    def to_json(self) -> list[list[str | None]]:
        return [[pattern, None if f is None else str(f)] for pattern, f in self.rules]

    @classmethod
    def from_json(cls, rules: Any) -> Scheme:
        """Read the form that :meth:`to_json` writes.

        Raises:
            SchemeError: the rules are not a list of ``[pattern, format name or null]``.
        """
        if not isinstance(rules, list) or not all(
            isinstance(r, list) and len(r) == 2 and isinstance(r[0], str) for r in rules
        ):
            raise SchemeError('scheme rules must be a list of ["layer pattern", "format" or null]')
        return cls(tuple((p, None if f is None else Format.parse(f)) for p, f in rules))


def options_from_strings(pairs: Mapping[str, str]) -> dict[str, Any]:
    """Values of ``--set key=value`` as int, float, bool, None or str, whichever they read as."""
    constants = {"true": True, "false": False, "none": None}
    parsed: dict[str, Any] = {}
    for key, text in pairs.items():
        value: Any = constants.get(text.lower(), text)
        for convert in (int, float):
            if isinstance(value, str):
                try:
                    value = convert(value)
                except ValueError:
                    continue
        parsed[key] = value
    return parsed
