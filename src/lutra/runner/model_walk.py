"""The walk of a method that chooses for the whole model: survey every block, decide, write.

1. *Survey*, block after block, on the activations of the original model: each group of linears is
   solved on every rung of the method's ladder, and each rung alone is put into the otherwise
   original model, to see what it does to the logits of tokens that nothing was fitted to. The
   solutions lie in the unfinished folder; one block is in memory at a time.
2. *Decide*: the method picks rungs, and the whole model on these rungs is run to judge them.
3. *Write*: the chosen solutions, with what their smoothing changes in the layers before them.

What was judged is what is written. A killed run loses the block that it surveyed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lutra.architectures import fold, rows_of
from lutra.errors import CalibrationError, SchemeError
from lutra.formats.checkpoint import check_finite, quantization_config
from lutra.formats.flat import FlatWeight
from lutra.formats.layers import flat_format
from lutra.formats.output import OutputFolder
from lutra.methods import Block
from lutra.methods.flattenquant import (
    SIXTEEN_BIT,
    Candidate,
    fold_site_of,
    ladder,
    solve_group,
    solve_head,
)
from lutra.nn_flat import FlatLinear
from lutra.runner.allocator import keep_freed_blocks
from lutra.runner.walk import REPORT_NAME, Progress, _Walk
from lutra.scheme import Format, Scheme
from lutra.solvers.choose_bits import Decision, Unit, decide, shares

logger = logging.getLogger(__name__)

KEPT_LOGITS_BYTES = 1 << 29
"""The original model's logits and probabilities are computed again each time where they take
more."""
LOGITS_BYTES = 1 << 24
"""Logits are computed and compared for as many tokens at a time as take so much."""

Patch = Mapping[str, tuple[Candidate, str]]
"""Linears of a block that run quantized: ``path -> (candidate, path in it)``."""


@dataclass(frozen=True)
class _Predictions:
    """What the original model says of some tokens: logits, probabilities, log of their sum."""

    logits_TV: Tensor
    probabilities_TV: Tensor
    lse_T: Tensor


def _nll(logits_TV: Tensor, lse_T: Tensor, wanted_T1: Tensor) -> Tensor:
    return _total(lse_T - logits_TV.gather(1, wanted_T1)[:, 0])


def _total(values: Tensor) -> Tensor:
    return values.double().sum().cpu()


class ModelWalk(_Walk):
    """A run of ``flattenquant``. See the module's docstring."""

    def run(self, on_progress: Callable[[Progress], None]) -> dict[str, Any]:
        if self.head_format is not None and self.head_format.bits != 8:
            raise SchemeError(
                f"method {self.method.name} stores the head in 8 bits or as it is: use "
                "--lm-head-bits 8, or leave it out"
            )
        keep_freed_blocks()
        blocks = len(self.streamed.blocks)
        total = 2 * blocks + 2
        self.rungs = ladder(self.options, self.recipe.bits)
        with OutputFolder(self.dst, self._fingerprint(), self._output_bytes()) as output:
            if not output.resumed and output.load_state("survey 0") is None:
                self.checkpoint.check_weights()
            self._split_windows()
            units = self._survey(output, lambda i: on_progress(
                Progress(i, total, f"block {i + 1} of {blocks}: ranges and rounding")
            ))  # fmt: skip
            on_progress(Progress(blocks, total, "choosing 4 or 8 bits for each layer"))
            self.head_weight = self._solve_head()
            decision = self._decide(output, units)
            for meta in output.done_keys().values():
                self._remember(meta)
            for index in range(blocks):
                self.consumed.update(self._names_of_block(index))
                if f"block {index}" in output.done_keys():
                    continue
                on_progress(Progress(blocks + 1 + index, total, f"block {index + 1}: writing"))
                tensors, meta = self._chosen_block(output, index, units, decision)
                output.write_shard(f"block {index}", tensors, meta)
                self._remember(meta)
            on_progress(Progress(total - 1, total, "embeddings, norms and head"))
            if self.head_weight is not None and "head" not in output.done_keys():
                tensors, meta = self._head_shard(self.head_weight)
                output.write_shard("head", tensors, meta)
                self._remember(meta)
            if "rest" not in output.done_keys():
                rest = {n: self.checkpoint.deferred(n) for n in self._rest()}
                output.write_shard("rest", rest, {"layers": [], "exceptions": {}})
            report = self._report_of(units, decision)
            extra = {REPORT_NAME: json.dumps(report, indent=2, sort_keys=True) + "\n"}
            output.finish(self._config_of(report), self.checkpoint.side_files(), extra)
        on_progress(Progress(total, total, "done"))
        return report

    def _remember(self, meta: Mapping[str, Any]) -> None:
        self.layers.extend(meta["layers"])

    # ---- windows

    def _split_windows(self) -> None:
        """Windows that weights are fitted to, and others for choosing."""
        assert self.calibration is not None
        ids_NT = self.calibration.ids_NT
        if len(ids_NT) < 2:
            raise CalibrationError(
                "the calibration text has one window; this method needs a second one to choose "
                "by. Use more text, or shorter windows (--seq-len)."
            )
        seq_len = ids_NT.shape[1]
        judged = max(1, min(-(-self.options.score_tokens // seq_len), len(ids_NT) // 3))
        fitted = max(1, min(-(-self.options.tokens // seq_len), len(ids_NT) - judged))
        # The choice of windows is seeded, but they stand in text order: take both from all of it.
        order = torch.randperm(
            len(ids_NT), generator=torch.Generator().manual_seed(self.recipe.seed)
        )
        self.judged_NT = ids_NT[order[:judged].sort().values]
        self.fitted_NT = ids_NT[order[judged : judged + fitted].sort().values]

    # ---- survey

    def _survey(self, output: OutputFolder, starting: Callable[[int], None]) -> list[Unit]:
        """Solve and score every group of every block, or read what an earlier run found."""
        blocks = len(self.streamed.blocks)
        units: list[Unit] = []
        self._stream_key = "streams 0"
        self.unit_places: list[tuple[int, tuple[str, ...]]] = []
        fitted_NTD = self.streamed.embed(self.fitted_NT, self._batch)
        judged_NTD = self.streamed.embed(self.judged_NT, self._batch)
        self.judged_input_NTD = judged_NTD.clone()
        self._kept_predictions: dict[tuple[int, int], list[_Predictions]] = {}
        self.original = self._original_logits(judged_NTD.clone(), output)
        for index in range(blocks):
            state = output.load_state(f"survey {index}")
            if state is None:
                starting(index)
                if index and f"streams {index}" != self._stream_key:
                    fitted_NTD, judged_NTD = self._load_streams(output, index)
                found, tensors = self._survey_block(index, fitted_NTD, judged_NTD)
                self._stream_key = f"streams {index + 1}"
                output.save_state(self._stream_key, {"fitted": fitted_NTD, "judged": judged_NTD})
                record = json.dumps({"units": [asdict(u) for u in found]}).encode()
                tensors["record"] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
                output.save_state(f"survey {index}", tensors)
                output.drop_state(f"streams {index}")
            else:
                self._stream_key = ""
                record = json.loads(bytes(state["record"].tolist()))
                found = [Unit(**u) for u in record["units"]]
            units.extend(found)
            groups = self.architecture.groups_of(self.streamed.blocks[index])
            self.unit_places.extend((index, group) for group in groups)
        output.drop_state(f"streams {blocks}")
        return units

    def _load_streams(self, output: OutputFolder, index: int) -> tuple[Tensor, Tensor]:
        state = output.load_state(f"streams {index}")
        assert state is not None, "streams are saved before what was made of them"
        return state["fitted"], state["judged"]

    def _survey_block(
        self, index: int, fitted_NTD: Tensor, judged_NTD: Tensor
    ) -> tuple[list[Unit], dict[str, Tensor]]:
        """All rungs of a block's groups; moves both streams behind the block."""
        path = self.streamed.block_path(index)
        module = self.streamed.blocks[index]
        groups = self.architecture.groups_of(module)
        block = self._block_to_solve(index)
        tensors: dict[str, Tensor] = {}
        units: list[Unit] = []
        perturbed: list[tuple[Unit, int, Tensor]] = []
        alone_NTD = judged_NTD[: max(1, len(judged_NTD) // 2)]
        with self.streamed.loaded(path):
            rows = self._rows(index, fitted_NTD, groups)
            for group in groups:
                candidates = solve_group(group, block, rows.pop(group), self.options, self.rungs)
                weights = [block.weights[p] for p in group]
                unit = Unit(
                    f"{path}.{group[0]}", weights[0].shape[1], sum(len(w) for w in weights), []
                )
                units.append(unit)
                for number, candidate in enumerate(candidates):
                    unit.rungs.append(candidate.facts)
                    tensors |= _stored(group, number, candidate)
                    with self._patched(index, {p: (candidate, p) for p in group}):
                        moved_NTD = self._forward(index, alone_NTD.clone())
                    perturbed.append((unit, number, moved_NTD))
            self._forward(index, judged_NTD)
        for later in range(index + 1, len(self.streamed.blocks)):
            with self.streamed.loaded(self.streamed.block_path(later)):
                for _, _, moved_NTD in perturbed:
                    self._forward(later, moved_NTD)
        with self._head():
            for unit, number, moved_NTD in perturbed:
                unit.rungs[number]["kl"] = self._compare(moved_NTD, stride=2)["kl"]
        return units, tensors

    def _block_to_solve(self, index: int) -> Block:
        path = self.streamed.block_path(index)
        module = self.streamed.blocks[index]
        groups = self.architecture.groups_of(module)
        parameters = {
            name: self.streamed.read(f"{path}.{name}", tuple(p.shape))
            for name, p in module.named_parameters()
        }
        weights = {}
        for name in (n for group in groups for n in group):
            weight = self._oriented(parameters.pop(f"{name}.weight"))
            weights[name] = weight.to(self.device, torch.float32)
        parameters = {n: p.to(self.device) for n, p in parameters.items()}
        return Block(
            path, weights, dict.fromkeys(weights, self.block_format), {}, parameters,
            self.architecture, None, self.recipe.seed + index,
        )  # fmt: skip

    def _rows(
        self, index: int, fitted_NTD: Tensor, groups: tuple[tuple[str, ...], ...]
    ) -> dict[tuple[str, ...], Tensor]:
        """float32 inputs of every group, ``[tokens, in]``; moves the stream behind the block."""
        block = self.streamed.blocks[index]
        rows: dict[tuple[str, ...], list[Tensor]] = {group: [] for group in groups}
        handles = []
        for group in groups:

            def keep(_: Any, inputs: tuple[Tensor, ...], group: tuple[str, ...] = group) -> None:
                x = inputs[0].detach()
                rows[group].append(x.reshape(-1, x.shape[-1]).float())

            handles.append(block.get_submodule(group[0]).register_forward_pre_hook(keep))
        try:
            self._forward(index, fitted_NTD)
        finally:
            for handle in handles:
                handle.remove()
        return {group: torch.cat(parts)[: self.options.tokens] for group, parts in rows.items()}

    @contextmanager
    def _patched(self, index: int, patch: Patch) -> Iterator[None]:
        """Some linears of a loaded block run quantized for the length of a ``with``."""
        patched: list[nn.Module] = []
        try:
            for path, (candidate, inner) in patch.items():
                module = self.streamed.blocks[index].get_submodule(path)
                bias = module.bias

                def forward(
                    x: Tensor, candidate: Candidate = candidate, inner: str = inner,
                    bias: Any = bias,
                ) -> Tensor:  # fmt: skip
                    return candidate.run(inner, x, bias)

                module.forward = forward
                patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward

    # ---- the logits

    @contextmanager
    def _head(self) -> Iterator[None]:
        """What :meth:`_compare` needs in memory."""
        name = f"{self.head}.weight"
        shape = tuple(self.streamed.model.get_parameter(name).shape)
        self._head_tensors = {"weight": self.streamed.read(name, shape)}
        bias = self.checkpoint.resolve(f"{self.head}.bias")
        if bias is not None:
            self._head_tensors["bias"] = self.checkpoint.tensor(bias)
        self._head_tensors = {
            k: v.to(self.device, torch.float32) for k, v in self._head_tensors.items()
        }
        try:
            with self.streamed.tail(), torch.no_grad():
                yield
        finally:
            self._head_tensors = {}

    def _original_logits(self, judged_NTD: Tensor, output: OutputFolder) -> Tensor:
        """What the head of the original model reads, for the judged windows."""
        state = output.load_state("original")
        if state is None:
            for index in range(len(self.streamed.blocks)):
                with self.streamed.loaded(self.streamed.block_path(index)):
                    self._forward(index, judged_NTD)
            state = {"hidden": judged_NTD}
            output.save_state("original", state)
        return state["hidden"]

    def _compare(
        self, hidden_NTD: Tensor, stride: int = 1, head: FlatLinear | None = None
    ) -> dict[str, float]:
        """KL divergence and perplexities of the first windows, whose last hidden state is given.

        Args:
            hidden_NTD: behind the last block, for as many windows as it has.
            stride: only every so many predictions are looked at.
            head: the head of the quantized model, if it is another than the original's.
        """
        divergence = torch.zeros((), dtype=torch.float64)
        nll = {"original": divergence.clone(), "quantized": divergence.clone()}
        tokens = 0
        for sample in range(len(hidden_NTD)):
            targets = self.judged_NT[sample, 1:][::stride].to(self.device)
            hidden_TD = hidden_NTD[sample, :-1][::stride]
            start = 0
            for original in self._original_parts(sample, stride):
                stop = start + len(original.logits_TV)
                logits_TV = self._logits(hidden_TD[start:stop], head)
                lse_T = logits_TV.logsumexp(-1)
                wanted_T1 = targets[start:stop, None]
                nll["original"] += _nll(original.logits_TV, original.lse_T, wanted_T1)
                nll["quantized"] += _nll(logits_TV, lse_T, wanted_T1)
                # sum p (log p - log q), with the difference of logits first: both are large.
                logits_TV.sub_(original.logits_TV).mul_(original.probabilities_TV)
                divergence += _total(lse_T - original.lse_T - logits_TV.sum(-1))
                tokens, start = tokens + stop - start, stop
        perplexity = {k: math.exp(min(float(v) / tokens, 700.0)) for k, v in nll.items()}
        return {
            "kl": max(0.0, float(divergence) / tokens),
            "perplexity_original": perplexity["original"],
            "perplexity_quantized": perplexity["quantized"],
            "perplexity_ratio": perplexity["quantized"] / perplexity["original"],
            "tokens": tokens,
        }

    def _logits(self, hidden_TD: Tensor, head: FlatLinear | None = None) -> Tensor:
        finished_1TD = self.streamed.finish(hidden_TD[None].to(self.device))
        if head is not None:
            logits_1TV: Tensor = head(finished_1TD.float())
            return logits_1TV[0]
        return self.streamed.logits(finished_1TD.float(), self._head_tensors)[0].float()

    def _original_parts(self, sample: int, stride: int) -> Iterator[_Predictions]:
        """What the original model predicts in a window; kept where that takes little memory."""
        kept = self._kept_predictions.get((sample, stride))
        if kept is not None:
            yield from kept
            return
        hidden_TD = self.original[sample, :-1][::stride]
        vocabulary = len(self._head_tensors["weight"])
        total = 8 * vocabulary * self.judged_NT.numel()
        kept = []
        for part_TD in hidden_TD.split(max(1, LOGITS_BYTES // (4 * vocabulary))):
            logits_TV = self._logits(part_TD)
            lse_T = logits_TV.logsumexp(-1)
            found = _Predictions(logits_TV, (logits_TV - lse_T[:, None]).exp_(), lse_T)
            if total <= KEPT_LOGITS_BYTES:
                kept.append(found)
            yield found
        if kept:
            self._kept_predictions[sample, stride] = kept

    # ---- decide

    def _decide(self, output: OutputFolder, units: list[Unit]) -> Decision:
        state = output.load_state("decision")
        if state is not None:
            return Decision(**json.loads(bytes(state["decision"].tolist())))
        judged: dict[tuple[int, ...], dict[str, float]] = {}

        def judge(rungs: Sequence[int]) -> dict[str, float]:
            key = tuple(rungs)
            if key not in judged:
                judged[key] = self._judge(output, units, key)
            return {k: judged[key][k] for k in ("kl", "perplexity_ratio")}

        options = self.options
        decision = decide(
            units, judge, options.budget, None if options.layers == "mixed" else options.layers,
            "bits" if options.inputs == "int8" else "multiplies",
        )  # fmt: skip
        decision.score = judged[tuple(decision.rungs)]
        content = json.dumps(asdict(decision)).encode()
        output.save_state(
            "decision", {"decision": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
        )
        return decision

    def _judge(
        self, output: OutputFolder, units: Sequence[Unit], rungs: Sequence[int]
    ) -> dict[str, float]:
        """The whole model on these rungs against the original."""
        hidden_NTD = self.judged_input_NTD.clone()
        for index in range(len(self.streamed.blocks)):
            chosen = self._chosen(output, index, units, rungs)
            patch = {p: (c, p) for c in chosen.values() if c is not None for p in c.weights}
            with self.streamed.loaded(self.streamed.block_path(index)), self._patched(index, patch):
                self._forward(index, hidden_NTD)
        with self._head():
            head = None
            if self.head_weight is not None:
                bias = self._head_tensors.get("bias")
                head = FlatLinear.from_weight(self.head_weight, bias)
            return self._compare(hidden_NTD, head=head)

    def _chosen(
        self, output: OutputFolder, index: int, units: Sequence[Unit], rungs: Sequence[int]
    ) -> dict[int, Candidate | None]:
        """The solutions of one block's units by number of the unit; None stays 16 bit."""
        state = output.load_state(f"survey {index}")
        assert state is not None
        found: dict[int, Candidate | None] = {}
        for number, (place, group) in enumerate(self.unit_places):
            if place != index:
                continue
            rung = rungs[number]
            if rung == len(units[number].rungs):
                found[number] = None
            else:
                facts = units[number].rungs[rung]
                found[number] = self._restored(group, rung, facts, state)
        return found

    def _restored(
        self, group: tuple[str, ...], rung: int, facts: dict[str, Any], state: Mapping[str, Tensor]
    ) -> Candidate:
        weights = {}
        for path in group:
            stem = f"{rung}/{path}/"
            part = {
                k.removeprefix(stem): v.to(self.device)
                for k, v in state.items()
                if k.startswith(stem)
            }
            weights[path] = FlatWeight(
                part["weight"], part["weight_scale"], part["input_limit"], part["input_source"],
                facts["bits"], len(part["input_limit"]), part.get("input_step"),
                rotated=part.get("input_rotated"),
            )  # fmt: skip
        stem = f"{rung}/{group[0]}"
        smooth, scale = (state.get(f"{stem}/{name}") for name in ("smooth", "scale"))
        return Candidate(
            self.rungs[rung],
            weights,
            None if smooth is None else smooth.to(self.device),
            None if scale is None else scale.to(self.device),
            fold_site_of(group, self.architecture),
            facts,
        )

    # ---- write

    def _chosen_block(
        self, output: OutputFolder, index: int, units: Sequence[Unit], decision: Decision
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The shard of a block as decided, with the smoothing folded into what comes before."""
        path = self.streamed.block_path(index)
        block = self._block_to_solve(index)
        chosen = self._chosen(output, index, units, decision.rungs)
        packed = {p: w for c in chosen.values() if c is not None for p, w in c.weights.items()}
        facts: dict[str, dict[str, Any]] = {}
        shape = self.architecture
        oriented = {f"{n}.weight": self._oriented(w) for n, w in block.weights.items()}
        tensors = oriented | block.parameters
        for candidate in chosen.values():
            if candidate is None or candidate.site is None or candidate.scale_C is None:
                continue
            site, scale_C = candidate.site, candidate.scale_C
            source = site.source
            if source in packed:
                # Rows of integers are rescaled by their scales: exact but for one rounding.
                weight = packed[source]
                rows = rows_of(site.rows, shape, weight.out_features)
                weight.scale[rows] /= scale_C
                only = {n: t for n, t in tensors.items() if n == f"{source}.bias"}
            else:
                only = {n: t for n, t in tensors.items() if n.startswith(f"{source}.")}
            if only:
                without_targets = type(site)(site.source, (), site.rows, site.per_head)
                tensors.update(fold(without_targets, shape, only, scale_C))
        result: dict[str, Tensor] = {}
        meta: dict[str, Any] = {"layers": [], "exceptions": {}}
        for number, (place, group) in enumerate(self.unit_places):
            if place != index:
                continue
            unit, rung = units[number], decision.rungs[number]
            for name in group:
                facts[name] = _layer_record(unit, rung, decision.within_budget)
        for name, weight_OI in block.weights.items():
            stored = self.checkpoint.resolve(f"{path}.{name}.weight")
            assert stored is not None
            record = {
                "name": f"{path}.{name}",
                "in_features": weight_OI.shape[1],
                "out_features": weight_OI.shape[0],
                **facts[name],
            }
            if name in packed:
                weight = packed[name]
                stem = stored.removesuffix(".weight")
                for suffix, tensor in weight.tensors().items():
                    check_finite(f"{path}.{name}.{suffix}", tensor)
                    result[f"{stem}.{suffix}"] = tensor.cpu().contiguous()
                record |= {
                    "format": str(flat_format(weight)),
                    "bits_per_weight": weight.bits_per_weight(),
                    "error": record["output_error"],
                    "error_of": "output",
                }
            else:
                dtype = self.checkpoint.dtype(stored)
                result[stored] = tensors[f"{name}.weight"].to("cpu", dtype).contiguous()
                record |= {
                    "format": None, "bits_per_weight": 8.0 * dtype.itemsize, "error": 0.0,
                    "error_of": "output",
                }  # fmt: skip
            meta["layers"].append(record)
        for name, before in block.parameters.items():
            stored = self.checkpoint.resolve(f"{path}.{name}")
            assert stored is not None
            result[stored] = tensors[name].to("cpu", before.dtype).contiguous()
        return result, meta

    def _solve_head(self) -> FlatWeight | None:
        """The head in 8 bits, if that is asked for; its tensor in the source is then replaced."""
        if self.head_format is None:
            return None
        name = f"{self.head}.weight"
        if not self.checkpoint.tied_head:
            stored = self.checkpoint.resolve(name)
            assert stored is not None
            self.consumed.add(stored)
        shape = tuple(self.streamed.model.get_parameter(name).shape)
        return solve_head(self.streamed.read(name, shape).to(self.device))

    def _head_shard(self, weight: FlatWeight) -> tuple[dict[str, Tensor], dict[str, Any]]:
        name = f"{self.head}.weight"
        shape = tuple(self.streamed.model.get_parameter(name).shape)
        head_OI = self.streamed.read(name, shape)
        wrong = signal = 0.0
        dense_OI = weight.unpack().cpu()
        for exact_OI, packed_OI in zip(head_OI.split(4096), dense_OI.split(4096), strict=True):
            wrong += float((packed_OI - exact_OI.float()).square().sum())
            signal += float(exact_OI.float().square().sum())
        record = {
            "name": self.head,
            "in_features": weight.in_features,
            "out_features": weight.out_features,
            "format": str(flat_format(weight)),
            "bits_per_weight": weight.bits_per_weight(),
            "error": wrong / max(signal, 1e-30),
            "error_of": "weight",
        }
        tensors = {f"{self.head}.{k}": t.cpu().contiguous() for k, t in weight.tensors().items()}
        return tensors, {"layers": [record], "exceptions": {}}

    # ---- the record

    def _report_of(self, units: list[Unit], decision: Decision) -> dict[str, Any]:
        score = decision.score
        cost = {
            "perplexity_original": score["perplexity_original"],
            "perplexity_quantized": score["perplexity_quantized"],
            "kl_mean": score["kl"],
            "tokens": int(score["tokens"]),
        }
        report = self._report(cost)
        report["choice"] = {
            "budget": self.options.budget,
            "within_budget": decision.within_budget,
            "perplexity_ratio": score["perplexity_ratio"],
            "kl": score["kl"],
            "shares": shares(units, decision.rungs),
            "rungs": [r.name for r in self.rungs] + [SIXTEEN_BIT],
            "steps": decision.steps,
        }
        if not decision.within_budget:
            logger.warning(
                "the model is over its budget of %.2f %%, on text that the weights were not fitted "
                "to: perplexity rises by %.2f %%, and the predictions diverge by %.4f nats where "
                "%.4f were allowed",
                100 * self.options.budget, 100 * (score["perplexity_ratio"] - 1), score["kl"],
                math.log1p(self.options.budget),
            )  # fmt: skip
        return report

    def _config_of(self, report: Mapping[str, Any]) -> dict[str, Any]:
        rules: list[tuple[str, Format | None]] = []
        for layer in sorted(self.layers, key=lambda x: x["name"]):
            name = layer["format"]
            rules.append((layer["name"], None if name is None else Format.parse(name)))
        rules.append((f"{self.architecture.blocks}.*", None))
        rules.append((self.head, self.head_format))
        config = dict(self.checkpoint.config)
        if self.head_format is not None:
            config["tie_word_embeddings"] = False
        kept = ("method", "options", "seed", "calibration", "calibration_cost", "versions")
        facts = {key: report[key] for key in (*kept, "choice")}
        facts["layers"] = report["layers"]
        config["quantization_config"] = quantization_config(Scheme(tuple(rules)), **facts)
        return config


def _stored(group: tuple[str, ...], rung: int, candidate: Candidate) -> dict[str, Tensor]:
    """A candidate as tensors of the survey's state; their names say rung and layer."""
    tensors = {}
    for path, weight in candidate.weights.items():
        for suffix, tensor in weight.tensors().items():
            tensors[f"{rung}/{path}/{suffix}"] = tensor.cpu()
    if candidate.smooth_I is not None:
        assert candidate.scale_C is not None
        tensors[f"{rung}/{group[0]}/smooth"] = candidate.smooth_I.cpu()
        tensors[f"{rung}/{group[0]}/scale"] = candidate.scale_C.cpu()
    return tensors


def _layer_record(unit: Unit, rung: int, within: bool) -> dict[str, Any]:
    """What is written of a layer: its rung and every rung's score."""
    tried = [{"rung": r["rung"], "kl": r["kl"], "error": r["output_error"]} for r in unit.rungs]
    record: dict[str, Any] = {"tried": tried}
    if rung == len(unit.rungs):
        return record | {"rung": SIXTEEN_BIT, "kl": 0.0, "growth": 0.0}
    return record | unit.rungs[rung]
