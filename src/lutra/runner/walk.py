"""The walk through a model: block after block, statistics in, packed weights out.

One decoder block is in memory at a time, with the calibration activations. Two streams of
activations run side by side: what the original model would compute (for all samples if the method
aims at it, for a few otherwise, to know the cost) and what the quantized blocks before this one
compute, from which the statistics come. A finished block is on disk with the activations behind it
before the next begins, so an interrupted run goes on with the next block and gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutra.errors import CalibrationError, CheckpointError, SchemeError
from lutra.evaluate.load import check_device, load_tokenizer
from lutra.formats.checkpoint import SourceCheckpoint, check_finite, quantization_config
from lutra.formats.output import OutputFolder
from lutra.methods import Block, BlockRunner, InputStatistics, Method, Result, get_method
from lutra.runner.allocator import return_large_blocks
from lutra.runner.calibrate import Calibration, calibration_windows
from lutra.runner.stream import StreamedModel, compute_dtype
from lutra.scheme import Format, Scheme
from lutra.solvers.gptq_loop import output_error

TRACKED_SAMPLES = 8
"""Samples that run through the original model too, to tell what quantization cost."""
TOKENS_PER_BATCH = 8192

REPORT_NAME = "lutra_report.json"


@dataclass(frozen=True)
class Progress:
    """What a progress display needs: a step that is about to begin.

    Attributes:
        done, total: units of work (blocks, then the rest).
        what: for people.
    """

    done: int
    total: int
    what: str


@dataclass(frozen=True)
class Recipe:
    """A quantization, fully said. Everything that changes the bytes of the output is here.

    Attributes:
        method: name of the method.
        bits: width of the weights.
        group_size: inputs per group; -1 for one group per row.
        kind: kind of format; empty for the method's default.
        serve_bits: lower precisions that the file shall serve too.
        lm_head_bits: width of the head; 0 leaves it as it is.
        calibration: text file, or None.
        samples, seq_len: windows of calibration text and their length in tokens.
        seed: for the choice of windows and the order of training.
        options: the method's own options.
    """

    method: str
    bits: int
    group_size: int = 128
    kind: str = ""
    serve_bits: tuple[int, ...] = ()
    lm_head_bits: int = 0
    calibration: Path | None = None
    samples: int = 128
    seq_len: int = 1024
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def format(self, method: Method, bits: int, serve_bits: tuple[int, ...] = ()) -> Format:
        """The storage format of a layer with ``bits``.

        Raises:
            SchemeError: bits, group size or kind out of range, or not of this method.
        """
        kind = self.kind or method.formats[0]
        if kind not in method.formats:
            raise SchemeError(
                f"method {method.name} writes the formats {', '.join(method.formats)}, not {kind!r}"
            )
        return Format(kind, bits, self.group_size, serve_bits=serve_bits)


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe,
    device: str = "cpu",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Quantize a checkpoint folder into a new one. Running it again resumes an interrupted run.

    Args:
        src: folder or hub id of a checkpoint.
        dst: folder to write; must not exist.
        recipe: what to do.
        device: where to compute.
        on_progress: called before each block.

    Returns:
        The content of the report that lies in ``dst``.

    Raises:
        LutraError: with a message that names the file, tensor or option and the way out.
    """
    check_device(device)
    method = get_method(recipe.method)
    options = method.parse_options(recipe.options)
    serve = tuple(sorted({b for b in recipe.serve_bits if b != recipe.bits}))
    if serve and method.name != "lut-gemm":
        raise SchemeError("only method lut-gemm writes files that serve several precisions")
    needs = method.needs(options)
    format = recipe.format(method, recipe.bits, serve)
    head_format = recipe.format(method, recipe.lm_head_bits) if recipe.lm_head_bits else None
    if needs and recipe.calibration is None:
        advice = " or choose the weight-only mode (--set calibrated=false)"
        raise CalibrationError(
            f"method {method.name} needs calibration text: add --calibration FILE with a few "
            f"hundred kB of text like that the model is for"
            + (advice if hasattr(options, "calibrated") else "")
        )
    return_large_blocks()
    checkpoint = SourceCheckpoint.open(src)
    formats = {"blocks": format} | ({"head": head_format} if head_format else {})
    walk_of = _Walk
    if method.scope == "model":
        from lutra.runner.model_walk import ModelWalk as walk_of
    walk = walk_of(checkpoint, Path(dst), recipe, method, options, formats, torch.device(device))
    return walk.run(on_progress)


class _Walk:
    """State of one run. See :func:`quantize_checkpoint`."""

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        dst: Path,
        recipe: Recipe,
        method: Method,
        options: Any,
        formats: Mapping[str, Format],
        device: torch.device,
    ) -> None:
        self.checkpoint, self.dst, self.recipe = checkpoint, dst, recipe
        self.method, self.options, self.device = method, options, device
        stored = checkpoint.dtype(max(checkpoint.names(), key=checkpoint.nbytes))
        self.dtype, self.dtype_reason = compute_dtype(stored, device)
        self.streamed = StreamedModel(checkpoint, self.dtype, device)
        self.streamed.check_shapes()
        self.architecture = self.streamed.architecture
        if method.scope != "layer" and not self.architecture.known:
            raise SchemeError(
                f"method {method.name} needs to know the structure of a model, and "
                f"{self.architecture.family!r} has no entry in lutra.architectures. "
                "rtn, gptq and lut-gemm work layer by layer on any family."
            )
        self.head = self.architecture.head
        self.head_format = formats.get("head")
        self.block_format = formats["blocks"]
        self.exceptions: dict[str, Format] = {}
        self.needs = method.needs(options)
        self.calibration = self._read_calibration()
        self.consumed: set[str] = set()  # names in the source that a quantized shard replaces
        self.layers: list[dict[str, Any]] = []

    def _read_calibration(self) -> Calibration | None:
        recipe = self.recipe
        if recipe.calibration is None:
            return None
        config = self.checkpoint.config
        positions = config.get("max_position_embeddings") or config.get("n_positions")
        seq_len = min(recipe.seq_len, positions or recipe.seq_len)
        tokenizer = load_tokenizer(self.checkpoint)
        return calibration_windows(
            tokenizer, recipe.calibration, recipe.samples, seq_len, recipe.seed
        )

    # ---- the run

    def run(self, on_progress: Callable[[Progress], None]) -> dict[str, Any]:
        blocks = len(self.streamed.blocks)
        # 8 bits a weight and the 16-bit rest are an upper bound of what is written.
        with OutputFolder(self.dst, self._fingerprint(), self._output_bytes()) as output:
            if not output.resumed:
                self.checkpoint.check_weights()
            for meta in output.done_keys().values():
                self._remember(meta)
            finished = sum(key.startswith("block ") for key in output.done_keys())
            streams = self._start(output, finished)
            for index in range(blocks):
                self.consumed.update(self._names_of_block(index))
            for index in range(finished, blocks):
                on_progress(Progress(index, blocks + 1, f"block {index + 1} of {blocks}"))
                tensors, meta = self._block(index, streams)
                output.write_shard(f"block {index}", tensors, meta, state=streams or None)
                self._remember(meta)
            on_progress(Progress(blocks, blocks + 1, "embeddings, norms and head"))
            cost = self._outside_blocks(output, streams)
            report = self._report(cost)
            extra = {REPORT_NAME: json.dumps(report, indent=2, sort_keys=True) + "\n"}
            output.finish(self._config(report), self.checkpoint.side_files(), extra)
        on_progress(Progress(blocks + 1, blocks + 1, "done"))
        return report

    def _remember(self, meta: Mapping[str, Any]) -> None:
        self.layers.extend(meta["layers"])
        self.exceptions.update({k: Format.parse(v) for k, v in meta["exceptions"].items()})

    def _fingerprint(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "source": self.checkpoint.fingerprint(),
            "method": recipe.method,
            "format": str(self.block_format),
            "head": str(self.head_format),
            "options": {k: recipe.options[k] for k in sorted(recipe.options)},
            "calibration": self.calibration.facts if self.calibration else None,
            "seed": recipe.seed,
            "compute": f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}",
        }

    def _output_bytes(self) -> int:
        """Bytes of the finished folder, from shapes alone, with the activations of a resume."""
        total = 0
        in_blocks = {n for i in range(len(self.streamed.blocks)) for n in self._names_of_block(i)}
        for name in self.checkpoint.names():
            size = self.checkpoint.nbytes(name)
            shape = self.checkpoint.shape(name)
            if name in in_blocks and len(shape) == 2:
                group = self.block_format.group_size_for(shape[1])
                per_weight = self.block_format.bits * (1 + 32 / group) + 32 / group
                size = int(shape[0] * shape[1] * per_weight / 8)
            total += size
        if self.calibration is not None:
            width = self.checkpoint.config.get("hidden_size") or 0
            total += 2 * self.calibration.ids_NT.numel() * width * self.dtype.itemsize
        return total

    # ---- activations

    @property
    def _batch(self) -> int:
        assert self.calibration is not None
        return max(1, TOKENS_PER_BATCH // self.calibration.facts["seq_len"])

    def _start(self, output: OutputFolder, finished: int) -> dict[str, Tensor]:
        """The two streams of activations in front of block ``finished``."""
        if self.calibration is None:
            return {}
        # Also on a resumed run: this is where the blocks' other arguments are recorded.
        hidden_NTD = self.streamed.embed(self.calibration.ids_NT, self._batch)
        if finished:
            streams = output.load_state(f"block {finished - 1}")
            assert streams is not None
            return streams
        tracked = TRACKED_SAMPLES
        aims_at_original = bool(self.needs & {"shift", "block"})
        return {
            "original": hidden_NTD.clone() if aims_at_original else hidden_NTD[:tracked].clone(),
            "quantized": hidden_NTD if self.needs else hidden_NTD[:tracked].clone(),
        }

    def _forward(self, index: int, hidden_NTD: Tensor) -> Tensor:
        """Output of a block for all samples, batch by batch; the input's memory is reused."""
        with torch.no_grad():
            for part in hidden_NTD.split(self._batch):
                output = self.streamed.run_block(index, part.to(self.device))
                part.copy_(output)
        if not torch.isfinite(hidden_NTD).all():
            raise CheckpointError(
                f"the activations behind {self.streamed.block_path(index)} are not finite. "
                "The weights or the config of the source are damaged, or overflow "
                f"{str(self.dtype).removeprefix('torch.')}."
            )
        return hidden_NTD

    def _statistics(
        self, index: int, streams: Mapping[str, Tensor], groups: tuple[tuple[str, ...], ...]
    ) -> dict[str, InputStatistics]:
        """One set of statistics per group of linears that share their input."""
        block = self.streamed.blocks[index]
        sums = {group: _InputSums() for group in groups}
        seen: dict[tuple[str, ...], Tensor] = {}
        handles = []
        for group in groups:

            def keep(_: Any, inputs: tuple[Tensor, ...], group: tuple[str, ...] = group) -> None:
                seen[group] = inputs[0].detach()

            handles.append(block.get_submodule(group[0]).register_forward_pre_hook(keep))
        try:
            with torch.no_grad():
                follow = "shift" in self.needs
                quantized = streams["quantized"].split(self._batch)
                originals = streams["original"].split(self._batch) if follow else quantized
                for part, original in zip(quantized, originals, strict=True):
                    reference: dict[tuple[str, ...], Tensor] = {}
                    if follow:
                        self.streamed.run_block(index, original.to(self.device))
                        reference = dict(seen)
                    self.streamed.run_block(index, part.to(self.device))
                    for group, total in sums.items():
                        total.add(seen[group], reference.get(group))
        finally:
            for handle in handles:
                handle.remove()
        return {path: sums[group].mean() for group in groups for path in group}

    # ---- one block

    def _names_of_block(self, index: int) -> list[str]:
        path = self.streamed.block_path(index)
        names = []
        for name, _ in self.streamed.blocks[index].named_parameters():
            stored = self.checkpoint.resolve(f"{path}.{name}")
            if stored is not None:
                names.append(stored)
        return names

    def _block(
        self, index: int, streams: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Quantize one block and move both streams behind it; its shard and the shard's meta."""
        path = self.streamed.block_path(index)
        module = self.streamed.blocks[index]
        groups = self.architecture.groups_of(module)
        linears = [name for group in groups for name in group]
        parameters = {
            name: self.streamed.read(f"{path}.{name}", tuple(p.shape))
            for name, p in module.named_parameters()
        }
        # Conv1D (GPT-2) stores [in, out]; everything behind this line sees [out, in].
        outputs_first = {n: self._oriented(parameters.pop(f"{n}.weight")) for n in linears}
        with self.streamed.loaded(path):
            inputs: dict[str, InputStatistics] = {}
            if "hessian" in self.needs:
                inputs = self._statistics(index, streams, groups)
            if "original" in streams:
                streams["original"] = self._forward(index, streams["original"])
            block = Block(
                path,
                {n: w.to(self.device, torch.float32) for n, w in outputs_first.items()},
                dict.fromkeys(linears, self.block_format),
                inputs,
                {n: p.to(self.device) for n, p in parameters.items()},
                self.architecture,
                self._block_runner(index, streams) if "block" in self.needs else None,
                self.recipe.seed + index,
            )
            result = self.method.quantize(block, self.options)
            if "quantized" in streams:
                with torch.no_grad():
                    for name, packed in result.weights.items():
                        dense = self._oriented(packed.unpack())
                        module.get_parameter(f"{name}.weight").copy_(dense)
                    for name, value in result.parameters.items():
                        module.get_parameter(name).copy_(value)
                streams["quantized"] = self._forward(index, streams["quantized"])
        tensors = {}
        for name, value in parameters.items():
            stored = self.checkpoint.resolve(f"{path}.{name}")
            assert stored is not None
            tensors[stored] = result.parameters.get(name, value).to("cpu", value.dtype)
        meta: dict[str, Any] = {"layers": [], "exceptions": {}, "notes": result.notes}
        for name in linears:
            stored = self.checkpoint.resolve(f"{path}.{name}.weight")
            assert stored is not None
            self._add_layer(f"{path}.{name}", stored, name, block, result, tensors, meta)
        return tensors, meta

    def _oriented(self, weight: Tensor) -> Tensor:
        """Between the model's orientation and [out, in]; its own inverse."""
        return weight.t().contiguous() if self.architecture.transposed else weight

    def _add_layer(
        self,
        layer: str,
        stored: str,
        name: str,
        block: Block,
        result: Result,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
    ) -> None:
        """Enter one packed layer into a shard and its meta."""
        packed = result.weights[name]
        weight_OI = block.weights[name]
        format = block.formats[name]
        if packed.scale.dtype != format.scale_dtype:
            format = replace(format, scale_dtype=packed.scale.dtype)
            meta["exceptions"][layer] = str(format)
        stem = stored.removesuffix(".weight")
        for suffix, tensor in packed.tensors().items():
            check_finite(f"{layer}.{suffix}", tensor)
            tensors[f"{stem}.{suffix}"] = tensor.cpu().contiguous()
        error = result.errors.get(name)
        if error is None and name in block.inputs:
            error = output_error(weight_OI, packed.unpack(), block.inputs[name].hessian_II)
        elif error is None:
            difference = (weight_OI - packed.unpack()).square().sum()
            error = float(difference / weight_OI.square().sum().clamp_min(1e-30))
        meta["layers"].append(
            {
                "name": layer,
                "format": str(format),
                "in_features": weight_OI.shape[1],
                "out_features": weight_OI.shape[0],
                "bits_per_weight": packed.bits_per_weight(),
                "error": error,
                "error_of": "output" if block.inputs else "weight",
            }
        )

    def _block_runner(self, index: int, streams: Mapping[str, Tensor]) -> BlockRunner:
        # _forward has already moved the original stream behind this block.
        targets_NTD, inputs_NTD = streams["original"], streams["quantized"]

        def run(parameters: Mapping[str, Tensor], samples: Tensor) -> Tensor:
            cast = {n: self._oriented(p).to(self.dtype) for n, p in parameters.items()}
            hidden = inputs_NTD[samples].to(self.device)
            return self.streamed.call_block(index, cast, hidden)

        def target(samples: Tensor) -> Tensor:
            return targets_NTD[samples].to(self.device)

        return BlockRunner(len(inputs_NTD), run, target)

    # ---- embeddings, norms, head

    def _outside_blocks(
        self, output: OutputFolder, streams: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Write everything that is not in a block. Returns the cost on the tracked samples."""
        cost: dict[str, Any] = {}
        hidden: dict[str, Tensor] = {}
        if streams:
            with self.streamed.tail(), torch.no_grad():
                for name, stream in streams.items():
                    parts = stream.to(self.device).split(self._batch)
                    hidden[name] = torch.cat([self.streamed.finish(p) for p in parts])
        head_name = f"{self.head}.weight"
        head_shape = tuple(self.streamed.model.get_parameter(head_name).shape)
        head_OI = self.streamed.read(head_name, head_shape)
        quantized_head_OI = head_OI
        if self.head_format is not None:
            quantized_head_OI, tensors, meta = self._quantize_head(head_OI, hidden.get("quantized"))
            if not self.checkpoint.tied_head:
                stored = self.checkpoint.resolve(f"{self.head}.weight")
                assert stored is not None
                self.consumed.add(stored)
            if "head" not in output.done_keys():
                output.write_shard("head", tensors, meta)
                self._remember(meta)
        if hidden:
            cost = self._cost(hidden, head_OI, quantized_head_OI)
        del head_OI, quantized_head_OI, hidden
        if "rest" not in output.done_keys():
            rest = {n: self.checkpoint.deferred(n) for n in self._rest()}
            output.write_shard("rest", rest, {"layers": [], "exceptions": {}})
        return cost

    def _rest(self) -> list[str]:
        return [n for n in self.checkpoint.names() if n not in self.consumed]

    def _quantize_head(
        self, head_OI: Tensor, hidden_NTD: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """The head as a block of its own, with nothing to fold."""
        assert self.head_format is not None
        inputs = {}
        if hidden_NTD is not None and "hessian" in self.needs:
            sums = _InputSums()
            for part in hidden_NTD.split(self._batch):
                sums.add(part, part if "shift" in self.needs else None)
            inputs["head"] = sums.mean()
        block = Block(
            self.head,
            {"head": head_OI.to(self.device, torch.float32)},
            {"head": self.head_format},
            inputs,
            {},
            replace(self.architecture, folds=(), groups=(("head",),)),
        )
        result = self.method.quantize(block, self.options)
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {"layers": [], "exceptions": {}}
        self._add_layer(self.head, f"{self.head}.weight", "head", block, result, tensors, meta)
        return result.weights["head"].unpack().cpu(), tensors, meta

    def _cost(
        self, hidden: Mapping[str, Tensor], head_OI: Tensor, quantized_head_OI: Tensor
    ) -> dict[str, Any]:
        """Perplexity before and after, and KL divergence, on the tracked calibration samples."""
        assert self.calibration is not None
        heads = {"original": {"weight": head_OI}, "quantized": {"weight": quantized_head_OI}}
        bias_name = self.checkpoint.resolve(f"{self.head}.bias")
        if bias_name is not None:
            for head in heads.values():
                head["bias"] = self.checkpoint.tensor(bias_name)
        heads = {
            k: {n: t.to(self.device, torch.float32) for n, t in head.items()}
            for k, head in heads.items()
        }
        nll = dict.fromkeys(heads, 0.0)
        divergence, tokens = 0.0, 0
        with self.streamed.tail():
            for sample in range(min(TRACKED_SAMPLES, len(self.calibration.ids_NT))):
                targets = self.calibration.ids_NT[sample, 1:].to(self.device)
                logp = {}
                for k, head in heads.items():
                    hidden_1ND = hidden[k][sample : sample + 1].float()
                    logits_NV = self.streamed.logits(hidden_1ND, head)[0, :-1]
                    logp[k] = logits_NV.log_softmax(-1)
                for k, value in logp.items():
                    nll[k] -= float(value.gather(1, targets[:, None]).sum())
                original = logp["original"]
                divergence += float((original.exp() * (original - logp["quantized"])).sum())
                tokens += len(targets)
        return {
            # A broken model's perplexity may leave the range of numbers.
            "perplexity_original": math.exp(min(nll["original"] / tokens, 700.0)),
            "perplexity_quantized": math.exp(min(nll["quantized"] / tokens, 700.0)),
            "kl_mean": divergence / tokens,
            "tokens": tokens,
        }

    # ---- the record

    def _report(self, cost: Mapping[str, Any]) -> dict[str, Any]:
        recipe = self.recipe
        weights = sum(x["in_features"] * x["out_features"] for x in self.layers)
        stored = sum(
            x["in_features"] * x["out_features"] * x["bits_per_weight"] for x in self.layers
        )
        return {
            "method": recipe.method,
            "bits": recipe.bits,
            "group_size": recipe.group_size,
            "options": dict(recipe.options),
            "seed": recipe.seed,
            "bits_per_weight": stored / weights,
            "calibration": self.calibration.facts if self.calibration else None,
            "calibration_cost": dict(cost) or None,
            "compute": {
                "dtype": str(self.dtype).removeprefix("torch."), "reason": self.dtype_reason
            },
            "family": self.architecture.family,
            "family_known": self.architecture.known,
            "versions": _versions(),
            "layers": {x["name"]: {k: v for k, v in x.items() if k != "name"} for x in self.layers},
        }  # fmt: skip

    def _config(self, report: Mapping[str, Any]) -> dict[str, Any]:
        rules: list[tuple[str, Format | None]] = sorted(self.exceptions.items())
        if self.head not in self.exceptions:
            rules.append((self.head, self.head_format))
        rules.append((f"{self.architecture.blocks}.*", self.block_format))
        config = dict(self.checkpoint.config)
        if self.head_format is not None:
            config["tie_word_embeddings"] = False
        kept = ("method", "options", "seed", "calibration", "calibration_cost", "versions")
        facts = {key: report[key] for key in kept}
        config["quantization_config"] = quantization_config(Scheme(tuple(rules)), **facts)
        return config


class _InputSums:
    """Running sums behind :class:`InputStatistics`."""

    def __init__(self) -> None:
        self.tokens = 0
        self.gram: Tensor | None = None
        self.absolute: Tensor | None = None
        self.shift: Tensor | None = None

    def add(self, x: Tensor, original: Tensor | None) -> None:
        x_NI = x.reshape(-1, x.shape[-1]).float()
        self.tokens += len(x_NI)
        gram, absolute = x_NI.T @ x_NI, x_NI.abs().sum(0)
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.absolute = absolute if self.absolute is None else self.absolute.add_(absolute)
        if original is not None:
            shift = (original.reshape(x_NI.shape).float() - x_NI).T @ x_NI
            self.shift = shift if self.shift is None else self.shift.add_(shift)

    def mean(self) -> InputStatistics:
        assert self.gram is not None and self.absolute is not None
        shift = None if self.shift is None else self.shift / self.tokens
        return InputStatistics(
            self.gram / self.tokens, self.absolute / self.tokens, self.tokens, shift
        )


def _versions() -> dict[str, str]:
    import transformers

    import lutra

    return {
        "lutra": lutra.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
