"""FlattenQuant: ranges of a group, the choice of bits, whole checkpoints, outliers to test on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lutra
from lutra.api import quantize
from lutra.architectures import architecture_of
from lutra.errors import CalibrationError, CheckpointError, SchemeError
from lutra.formats.checkpoint import SourceCheckpoint, load_layer, read_quantization_config
from lutra.inspection import inspect_checkpoint
from lutra.methods import Block, get_method
from lutra.methods.flattenquant import Options, ladder, solve_group
from lutra.nn_flat import FlatLinear
from lutra.outliers import inject_outliers
from lutra.plan import plan
from lutra.scheme import Format
from lutra.solvers.choose_bits import Unit, decide, shares

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2
}  # fmt: skip
SMALL = {"seq_len": 64, "samples": 10}
FAST = {"tokens": 256, "score_tokens": 128}


def block_of(weight: torch.Tensor, norm: torch.Tensor | None = None) -> Block:
    """A block of which one group, gate and up behind a norm, is solved."""
    half = len(weight) // 2
    weights = {"mlp.gate_proj": weight[:half], "mlp.up_proj": weight[half:]}
    parameters = {} if norm is None else {"post_attention_layernorm.weight": norm}
    return Block("model.layers.7", weights, {}, {}, parameters, architecture_of(LLAMA))


def solve(rows: torch.Tensor, weight: torch.Tensor, norm=None, bits=4, **options):
    chosen = Options(**options)
    group = ("mlp.gate_proj", "mlp.up_proj")
    return solve_group(group, block_of(weight, norm), rows, chosen, ladder(chosen, bits))


def relative_error(candidate, rows: torch.Tensor, weight: torch.Tensor) -> float:
    y = torch.cat([candidate.run(path, rows, None) for path in candidate.weights], dim=1)
    exact = rows @ weight.T
    return float((y - exact).square().sum() / exact.square().sum().clamp_min(1e-30))


def channels(width: int = 96, tokens: int = 600, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, width, generator=generator)
    return rows, 0.1 * torch.randn(64, width, generator=generator)


# ---- one group


def test_the_ladder_falls_in_the_stated_order():
    names = [r.name for r in ladder(Options(static=True), 4)]
    assert names == ["int4", "int4 2x growth", "int8", "int8 per token"]
    assert [r.name for r in ladder(Options(), 8)] == ["int8"]


@pytest.mark.parametrize("static", [False, True])
def test_flattening_holds_what_a_few_large_channels_would_destroy(static: bool):
    rows, weight = channels()
    rows[:, [5, 40, 77]] *= 50
    flat = {c.rung.name: c for c in solve(rows, weight, static=static, growth=0.4, tile=32)}
    plain = {c.rung.name: c for c in solve(rows, weight, static=static, growth=0.0, tile=32)}
    for name in ("int4", "int8"):
        with_growth = relative_error(flat[name], rows, weight)
        without = relative_error(plain[name], rows, weight)
        assert with_growth < without / 3, (name, with_growth, without)
        assert flat[name].facts["columns"] <= flat[name].facts["column_budget"] <= 96 * 1.4
        assert flat[name].facts["wide_channels"] >= 3
    assert relative_error(flat["int8"], rows, weight) < 1e-3


def test_smoothing_is_exact_for_the_norm_that_is_stored():
    rows, weight = channels()
    rows[:, 5] *= 50
    norm = (torch.rand(96) + 0.5).bfloat16()
    for candidate in solve(rows, weight, norm, growth=0.0, tile=32):
        assert candidate.facts["alpha"] is not None
        folded = (norm.float() / candidate.smooth_I).bfloat16().float()
        torch.testing.assert_close(folded * candidate.smooth_I, norm.float(), rtol=1e-6, atol=0)
        assert relative_error(candidate, rows, weight) < 0.1


def test_dead_and_enormous_channels_and_constant_tensors():
    rows, weight = channels()
    rows[:, 3] = 0  # dead input
    weight[:, 9] = 0  # no weight reads it
    weight[11] = 0  # dead output
    rows[:, 20] *= 1e5
    for candidate in solve(rows, weight, growth=0.4, tile=32):
        for packed in candidate.weights.values():
            assert all(t.isfinite().all() for t in packed.tensors().values())
        assert candidate.run("mlp.gate_proj", rows, None).isfinite().all()
    constant = torch.full((200, 96), 2.0)
    for candidate in solve(constant, torch.full((64, 96), 0.5)):
        assert relative_error(candidate, constant, torch.full((64, 96), 0.5)) < 1e-2
    for candidate in solve(torch.zeros(200, 96), weight):
        assert not candidate.run("mlp.gate_proj", torch.zeros(3, 96), None).any()


@pytest.mark.parametrize("width", [1, 31, 33, 100])
@pytest.mark.parametrize("static", [False, True])
def test_any_number_of_inputs(width: int, static: bool):
    rows, weight = channels(width)
    for candidate in solve(rows, weight, static=static):
        assert relative_error(candidate, rows, weight) < 0.15
        assert candidate.run("mlp.up_proj", rows[:0], None).shape == (0, 32)


def test_inputs_that_are_not_finite_name_the_layer():
    rows, weight = channels()
    rows[17, 4] = torch.nan
    with pytest.raises(CalibrationError, match=r"model\.layers\.7\.mlp\.gate_proj"):
        solve(rows, weight)


def test_four_bit_weights_with_eight_bit_inputs_are_not_counted_as_four_bit_multiplies():
    rows, weight = channels()
    (both, *_), (weights_only, *_) = solve(rows, weight), solve(rows, weight, inputs="int8")
    assert relative_error(weights_only, rows, weight) < relative_error(both, rows, weight)
    unit = [Unit("a", 96, 64, [both.facts]), Unit("b", 96, 64, [weights_only.facts])]
    found = shares(unit, [0, 0])
    assert found["int4_multiplies"] == 0.5 and found["int4_weights"] == 1


@pytest.mark.parametrize("name", ["flat4", "flat8", "flat4x12", "flat8x3+static", "flat4+smooth"])
def test_names_of_formats_parse_back(name: str):
    assert str(Format.parse(name)) == name
    assert Format.parse(name).scale_dtype == torch.float32


@pytest.mark.parametrize("name", ["flat3", "flat4x0", "flat4g128", "flat8+serve2"])
def test_names_that_are_no_formats(name: str):
    with pytest.raises(SchemeError):
        Format.parse(name)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"growth": -0.1}, "growth"), ({"layers": "int3"}, "int4"), ({"budget": math.nan}, "budget")],
)
def test_wrong_options(options, words):
    with pytest.raises(SchemeError, match=words):
        get_method("flattenquant").parse_options(options)


def test_none_on_the_command_line_is_a_word_for_options_that_are_words():
    from lutra.scheme import options_from_strings

    options = get_method("flattenquant").parse_options(
        options_from_strings({"smooth": "none", "rotate": "none"})
    )
    assert (options.smooth, options.rotate) == ("none", "none")


# ---- the choice


def units_of(losses: list[float]) -> list[Unit]:
    def rung(name: str, bits: int, kl: float) -> dict:
        return {"rung": name, "bits": bits, "input_bits": bits, "columns": 64, "kl": kl}

    return [
        Unit(f"u{i}", 64, 32, [rung("int4", 4, kl), rung("int4 2x growth", 4, kl / 2),
                               rung("int8", 8, kl / 100)])
        for i, kl in enumerate(losses)
    ]  # fmt: skip


def judge_of(units: list[Unit]):
    def judge(rungs):
        kl = sum(
            u.rungs[r]["kl"] if r < len(u.rungs) else 0.0 for u, r in zip(units, rungs, strict=True)
        )
        return {"kl": kl, "perplexity_ratio": math.exp(kl)}

    return judge


def test_the_cheapest_layers_become_four_bit_until_the_budget_is_spent():
    units = units_of([0.004, 0.001, 0.1, 0.002, 0.006])
    decision = decide(units, judge_of(units), 0.01)
    assert decision.within_budget
    # 0.001 + 0.002 + 0.004 fit; the next fits with twice the growth, the last not at all.
    assert decision.rungs == [0, 0, 2, 0, 2] or decision.rungs == [0, 0, 2, 0, 1]
    assert judge_of(units)(decision.rungs)["kl"] <= math.log(1.01)
    assert all({"what", "kl", "fits"} <= step.keys() for step in decision.steps)


def test_layers_go_down_the_ladder_where_eight_bits_cost_too_much():
    units = units_of([0.5, 0.001])
    units[0].rungs[2]["kl"] = 0.3
    decision = decide(units, judge_of(units), 0.01)
    assert decision.rungs[0] == 3 and decision.within_budget  # 16 bit, and it is on record
    assert [s["fits"] for s in decision.steps][0] is False


def test_forced_layers_say_that_they_are_over_budget():
    units = units_of([0.5, 0.001])
    for unit in units:
        del unit.rungs[1:]
    decision = decide(units, judge_of(units), 0.01, "int4")
    assert decision.rungs == [0, 0] and not decision.within_budget


# ---- checkpoints


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", "int8"), ("opt", "int8"), ("gpt2", "int8"), ("phi", "int8"), ("llama", "mixed")],
)
def test_quantize_load_save_and_inspect(family, layers, tiny_model, text_file, tmp_path):
    from transformers import AutoModelForCausalLM

    source = tiny_model(family, dtype=torch.float32)
    out = tmp_path / "out"
    report = quantize(
        source, out, method="flattenquant", calibration=text_file, **SMALL,
        options={**FAST, "layers": layers, "budget": 0.05, "tile": 16},
    )  # fmt: skip
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = read_quantization_config(config)
    for name, facts in report["layers"].items():
        assert str(scheme.format_of(name)) == str(facts["format"])
        assert "int8" in {t["rung"] for t in facts["tried"]}
    assert config["choice"]["steps"] and "shares" in config["choice"]

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    flat = [m for m in model.modules() if isinstance(m, FlatLinear)]
    assert len(flat) == sum(f["format"] is not None for f in report["layers"].values())
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, wanted = model(ids).logits, original(ids).logits
        one = model(ids[:, :1]).logits
    error = (logits - wanted).square().sum() / (wanted - wanted.mean()).square().sum()
    # A random model's logits say little, so its divergence allows large errors of them.
    assert error < (1e-3 if layers == "int8" else 0.5)
    torch.testing.assert_close(one, logits[:, :1], rtol=1e-3, atol=1e-3)

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
    listed = inspect_checkpoint(out, kernels=True)["layers"]
    assert {"rung", "growth", "threshold", "clipped_weights", "kl", "kernel"} <= listed[0].keys()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_head_in_eight_bits(family, tiny_model, text_file, tmp_path):
    from transformers import AutoModelForCausalLM

    source = tiny_model(family, dtype=torch.float32)
    report = quantize(
        source, tmp_path / "out", method="flattenquant", calibration=text_file, **SMALL,
        options={**FAST, "layers": "int8"}, lm_head_bits=8,
    )  # fmt: skip
    assert report["layers"]["lm_head"]["format"] == "flat8"
    assert report["layers"]["lm_head"]["error"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(model.get_output_embeddings(), FlatLinear)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    ids = torch.randint(1, 257, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, wanted = model(ids).logits, original(ids).logits
    error = (logits - wanted).square().sum() / (wanted - wanted.mean()).square().sum()
    assert error < 2e-3


def test_an_interrupted_run_gives_the_same_bytes(tiny_model, text_file, tmp_path):
    source = tiny_model("llama")
    settings = dict(
        method="flattenquant", calibration=text_file, **SMALL,
        options={**FAST, "budget": 0.05, "tile": 16},
    )  # fmt: skip
    quantize(source, tmp_path / "whole", **settings)
    for stop_at in (1, 4):

        def stop(progress, at=stop_at):
            if progress.done == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "parts", **settings, on_progress=stop)
    quantize(source, tmp_path / "parts", **settings)
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "parts").iterdir())
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"static": True, "weight_scale": "tensor"},
        {"inputs": "int8"},
        {"layers": "int4", "rotate": "hadamard", "growth": 0.25, "tile": 16},
        {"growth": 0.0, "smooth": None},
        {"budget": 0},
    ],
)
def test_options_reach_the_file(options, tiny_model, text_file, tmp_path):
    source = tiny_model("llama", dtype=torch.float32)
    report = quantize(
        source, tmp_path / "out", method="flattenquant", calibration=text_file, **SMALL,
        options={**FAST, **options},
    )  # fmt: skip
    formats = {f["format"] for f in report["layers"].values() if f["format"]}
    if options.get("budget") == 0:  # nothing is exact, so nothing is quantized, and it says so
        assert not formats and {f["rung"] for f in report["layers"].values()} == {"16 bit"}
        assert all(
            layer["rung"] == "16 bit" for layer in inspect_checkpoint(tmp_path / "out")["layers"]
        )
        return
    assert formats
    if options.get("static"):
        assert all("static" in f for f in formats)
    if options.get("layers") == "int4":
        assert all(f.startswith("flat4") for f in formats)
    if options.get("weight_scale") == "tensor":
        for name, facts in report["layers"].items():
            if facts["format"]:
                checkpoint = SourceCheckpoint.open(tmp_path / "out", quantized=True)
                assert len(checkpoint.tensor(f"{name}.weight_scale").unique()) == 1
    result = lutra.evaluate(tmp_path / "out", text=text_file, max_windows=2, seq_len=64)
    assert math.isfinite(result["perplexity"])


def test_what_can_not_be_quantized_is_refused(tiny_model, text_file, tmp_path):
    source = tiny_model("llama")
    call = dict(method="flattenquant", calibration=text_file, **SMALL, options=FAST)
    with pytest.raises(SchemeError, match="head"):
        quantize(source, tmp_path / "out", **call, lm_head_bits=4)
    with pytest.raises(SchemeError, match="4 or 8"):
        quantize(source, tmp_path / "out", **call, bits=3)
    with pytest.raises(CalibrationError, match="second"):
        quantize(source, tmp_path / "out", **{**call, "samples": 1})
    with pytest.raises(CalibrationError, match="calibration text"):
        quantize(source, tmp_path / "out", method="flattenquant")


def test_plan_tells_both_ends(tiny_model):
    result = plan(tiny_model("llama"), "flattenquant", bits=4)
    assert result["format"] == "flat4" and any("8 bits" in w for w in result["warnings"])


def test_a_missing_tensor_is_named(tiny_model, text_file, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    quantize(
        tiny_model("llama"), out, method="flattenquant", calibration=text_file, **SMALL,
        options=FAST,
    )  # fmt: skip
    index = json.loads((out / "model.safetensors.index.json").read_text())
    name = next(n for n in index["weight_map"] if n.endswith("input_limit"))
    file = out / index["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="input_limit"):
        AutoModelForCausalLM.from_pretrained(out)
    layer = name.removesuffix(".input_limit")
    checkpoint = SourceCheckpoint.open(out, quantized=True)
    format = read_quantization_config(checkpoint.config).format_of(layer)
    with pytest.raises(CheckpointError, match="input_limit"):
        load_layer(checkpoint, layer, format, 96)


# ---- the module


def test_the_module_keeps_its_scales_and_takes_any_number_of_tokens():
    rows, weight = channels()
    (candidate, *_) = solve(rows, weight, bits=4)
    packed = candidate.weights["mlp.up_proj"]
    layer = FlatLinear.from_weight(packed, torch.randn(32))
    y = layer(rows)
    assert layer.choice is not None and "kernel=" in repr(layer)
    assert layer(rows[:0]).shape == (0, 32) and layer(rows[:1].view(1, 1, 96)).shape == (1, 1, 32)
    state = layer.state_dict()
    for name, tensor in packed.tensors().items():
        assert torch.equal(state[name], tensor)
    half = layer.half()
    assert half.weight_scale.dtype == torch.float32 and half.bias.dtype == torch.float16
    torch.testing.assert_close(half.float()(rows), y, rtol=1e-2, atol=1e-2)
    fresh = FlatLinear(96, 32, layer.format, bias=True)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(rows), y)


# ---- outliers


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_injected_outliers_change_nothing_but_the_activations(family, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    kinds = ["norms"] if family == "gpt2" else ["norms", "up", "twins"]
    source = tiny_model(family, dtype=torch.float32)
    done = inject_outliers(source, tmp_path / "out", kinds, share=0.05)
    assert len(done["blocks"]) == 2
    before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(1, 257, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=2e-3, atol=2e-3)

    def largest(model: nn.Module) -> float:
        seen: list[float] = []
        for module in model.modules():
            if type(module).__name__ in ("Linear", "Conv1D"):
                module.register_forward_pre_hook(
                    lambda m, x: seen.append(float(x[0].abs().max() / x[0].abs().mean()))
                )
        with torch.no_grad():
            model(ids)
        return max(seen)

    assert largest(after) > 2 * largest(before)


def test_outliers_that_make_no_sense_are_refused(tiny_model, tmp_path):
    source = tiny_model("llama")
    with pytest.raises(SchemeError, match="twins"):
        inject_outliers(source, tmp_path / "out", ["triplets"])
    with pytest.raises(SchemeError, match="share"):
        inject_outliers(source, tmp_path / "out", share=0.9)
    with pytest.raises(SchemeError, match="MLP"):
        inject_outliers(tiny_model("gpt2"), tmp_path / "out", ["up"])


def test_flattening_keeps_a_model_that_plain_eight_bits_lose(tiny_model, text_file, tmp_path):
    hard = tmp_path / "hard"
    plain = tiny_model("llama", dtype=torch.float32)
    inject_outliers(plain, hard, ["norms", "up", "twins"], share=0.05)
    report = quantize(
        hard, tmp_path / "out", method="flattenquant", calibration=text_file, **SMALL,
        options={**FAST, "tile": 16},
    )  # fmt: skip
    assert report["choice"]["within_budget"]
    assert report["choice"]["perplexity_ratio"] <= 1.01 + 1e-9
    rungs = {f["rung"] for f in report["layers"].values()}
    assert rungs <= {"int4", "int4 2x growth", "int8", "16 bit"}


def test_the_source_is_not_touched(tiny_model, tmp_path):
    source = tiny_model("llama")
    before = {p.name: p.read_bytes() for p in Path(source).iterdir()}
    inject_outliers(source, tmp_path / "out")
    assert before == {p.name: p.read_bytes() for p in Path(source).iterdir()}
