"""Which layers get 4 bits, which 8 and which stay as they are, within a budget of loss.

Each group of linears has a ladder of rungs, and what each rung alone does to the logits of the
otherwise original model. Losses do not add up, so every set of rungs that is considered is judged
on the whole model; what was considered, with its score, is part of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Unit:
    """A group of linears as :func:`decide` sees it: what each rung costs and loses.

    Attributes:
        name: of the group's first linear.
        in_features, out_features: inputs, and outputs of all its linears together.
        rungs: what the method recorded for each rung, with ``kl``: the divergence of the
            logits, in nats, when this group alone stands on that rung.
    """

    name: str
    in_features: int
    out_features: int
    rungs: list[dict[str, Any]]

    def work(self, rung: int) -> float:
        """Multiplies for one token in units of an 8-bit multiply; 4 bits take half, 16 bits two."""
        if rung == len(self.rungs):
            return 2.0 * self.in_features * self.out_features
        facts = self.rungs[rung]
        width = max(facts["bits"], facts["input_bits"]) / 8
        return width * facts["columns"] * self.out_features

    def stored(self, rung: int) -> float:
        """Bits of the weights, without scales."""
        bits = 16 if rung == len(self.rungs) else self.rungs[rung]["bits"]
        return float(bits * self.in_features * self.out_features)


@dataclass
class Decision:
    """On which rung each unit stands, and how that came about.

    Attributes:
        rungs: index of the rung of each unit; the number of its rungs means 16 bit.
        steps: what was tried, in order, with its score, for the record.
        score: ``kl`` and ``perplexity_ratio`` of the model as decided.
        within_budget: whether that keeps the budget.
    """

    rungs: list[int]
    steps: list[dict[str, Any]]
    score: dict[str, float]
    within_budget: bool


Judge = Callable[[Sequence[int]], dict[str, float]]
"""``(rung of each unit) -> {"kl", "perplexity_ratio"}`` of the whole model on held-out tokens."""

LAST_TRIES = 4
"""Units behind the last that fitted which are still tried, one by one."""


def decide(
    units: Sequence[Unit],
    judge: Judge,
    budget: float,
    forced: str | None = None,
    save: str = "multiplies",
) -> Decision:
    """Choose a rung for every unit so that the whole model keeps the budget.

    All units start at 8 bits. If the model is over budget so, those that lose most go down the
    ladder until it is not. Then units go to 4 bits in the order of KL divergence per multiply or
    stored bit that it saves, as many as the budget pays for; the number is found by bisection on
    the whole model, not by adding up what each loses alone. Behind it a few more are tried one by
    one, with twice the growth where once does not do.

    Args:
        units: groups of linears, with what each rung loses alone.
        judge: runs the whole model.
        budget: how much the perplexity may rise, as a share.
        forced: what all units are set to, whatever it costs; they then have no other rungs.
        save: ``multiplies`` or ``bits``, what 4 bits are to save.
    """
    limit = math.log1p(budget)
    steps: list[dict[str, Any]] = []

    def fits(rungs: Sequence[int], what: str) -> bool:
        score = judge(rungs)
        # The divergence is the steadier of the two; what the text itself says must agree.
        fitting = max(score["kl"], math.log(score["perplexity_ratio"])) <= limit
        steps.append({"what": what, **score, "fits": fitting})
        return fitting

    eight = [next((i for i, r in enumerate(u.rungs) if r["bits"] == 8), 0) for u in units]
    if forced:
        fitting = fits(eight, f"all layers {forced}, as asked")
        return Decision(eight, steps, _score_of(steps[-1]), fitting)
    rungs = list(eight)
    fitting = fits(rungs, "all layers int8")
    while not fitting:
        movable = [i for i, unit in enumerate(units) if rungs[i] < len(unit.rungs)]
        if not movable:
            break
        movable.sort(key=lambda i: _kl(units[i], rungs[i] + 1) - _kl(units[i], rungs[i]))

        def lower(count: int, start: list[int] = rungs, order: list[int] = movable) -> list[int]:
            moved = set(order[:count])
            return [r + (i in moved) for i, r in enumerate(start)]

        count = _least(1, len(movable), lambda n: fits(lower(n), f"{n} units one rung lower"))
        rungs, fitting = lower(count or len(movable)), count is not None
    if not fitting:
        return Decision(rungs, steps, _score_of(steps[-1]), False)

    cost = Unit.stored if save == "bits" else Unit.work

    def price(i: int, rung: int) -> float:
        saved = cost(units[i], rungs[i]) - cost(units[i], rung)
        return (_kl(units[i], rung) - _kl(units[i], rungs[i])) / saved

    order = [
        i for i, unit in enumerate(units)
        if unit.rungs and unit.rungs[0]["bits"] == 4 and rungs[i] < len(unit.rungs)
    ]  # fmt: skip
    order.sort(key=lambda i: price(i, 0))

    def narrow(count: int) -> list[int]:
        chosen = set(order[:count])
        return [0 if i in chosen else r for i, r in enumerate(rungs)]

    first_not = _least(1, len(order), lambda n: not fits(narrow(n), f"{n} units int4"))
    count = len(order) if first_not is None else first_not - 1
    final = narrow(count)
    for i in order[count : count + LAST_TRIES]:
        four_bit = [k for k, r in enumerate(units[i].rungs) if r["bits"] == 4]
        # The first behind the last is known not to fit at the first rung.
        for rung in four_bit[1:] if i == order[count] else four_bit:
            trial = [*final[:i], rung, *final[i + 1 :]]
            if fits(trial, f"{units[i].name} {units[i].rungs[rung]['rung']}"):
                final = trial
                break
    accepted = judge(final)
    return Decision(final, steps, accepted, True)


def shares(units: Sequence[Unit], rungs: Sequence[int]) -> dict[str, float]:
    """How much of the model is 4 bit: by multiplies (growth counted, and not), layers and weights.

    A multiply counts as 4 bit if both of its sides are.
    """

    def share(value: Callable[[Unit, int], float], four_bit: Callable[[Unit, int], bool]) -> float:
        total = sum(value(u, r) for u, r in zip(units, rungs, strict=True))
        four = sum(value(u, r) for u, r in zip(units, rungs, strict=True) if four_bit(u, r))
        return four / total if total else 0.0

    def width(unit: Unit, rung: int, key: str) -> int:
        return 16 if rung == len(unit.rungs) else int(unit.rungs[rung][key])

    def multiplies_four(unit: Unit, rung: int) -> bool:
        return width(unit, rung, "bits") == width(unit, rung, "input_bits") == 4

    def grown(unit: Unit, rung: int) -> float:
        at_all = rung < len(unit.rungs)
        columns = unit.rungs[rung]["columns"] if at_all else unit.in_features
        return float(columns * unit.out_features)

    def plain(unit: Unit, rung: int) -> float:
        return float(unit.in_features * unit.out_features)

    def in_weights(unit: Unit, rung: int) -> bool:
        return width(unit, rung, "bits") == 4

    return {
        "int4_multiplies": share(plain, multiplies_four),
        "int4_multiplies_with_growth": share(grown, multiplies_four),
        "int4_groups": share(lambda u, r: 1.0, multiplies_four),
        "int4_weights": share(plain, in_weights),
    }


def _kl(unit: Unit, rung: int) -> float:
    return 0.0 if rung == len(unit.rungs) else float(unit.rungs[rung]["kl"])


def _score_of(step: dict[str, Any]) -> dict[str, float]:
    return {key: step[key] for key in ("kl", "perplexity_ratio")}


def _least(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The least number in ``[low, high]`` for which a monotone predicate holds, or None."""
    found = None
    while low <= high:
        middle = (low + high) // 2
        if holds(middle):
            found, high = middle, middle - 1
        else:
            low = middle + 1
    return found
