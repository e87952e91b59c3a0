"""One file that serves several precisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import dense_twin, logits, make_source, quantize_tiny, tensors_of

import lutra
from lutra.errors import SchemeError
from lutra.formats.bitplanes import BitPlanes
from lutra.nn import QuantizedLinear

KINDS = ["ubcq", "bcq"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("serve") / "src", tie_word_embeddings=False)


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, source: Path, text_file: Path) -> tuple[Path, Any]:
    """A folder of 4 bits that serves 2 and 3 as well, and its report."""
    out = source.parent / request.param
    report = quantize_tiny(
        source, out, "lut-gemm", 4, text=text_file, kind=request.param, serve_bits=(2, 3, 4),
        lm_head_bits=8,
    )  # fmt: skip
    return out, report


@pytest.mark.parametrize("bits", [None, 2, 3, 4])
def test_each_precision_is_a_prefix_of_the_planes(served, source, bits):
    out, report = served
    model, _ = lutra.load(out, bits=bits)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 15
    for name, layer in layers.items():
        stored = layer.stored()
        assert isinstance(stored, BitPlanes)
        if name == "lm_head":  # of its own width, serves nothing else
            assert layer.served_bits == 8 and stored.served is None
            continue
        assert set(stored.served or {}) == {2, 3} and layer.served_bits == (bits or 4)
        expected = stored.prefix(bits or 4).unpack()
        assert torch.equal(layer.bitplanes().unpack(), expected)
    head = report["layers"].pop("lm_head")
    twin = dense_twin(source, out, report, bits or 4)
    report["layers"]["lm_head"] = head
    with torch.no_grad():
        twin.lm_head.weight.copy_(layers["lm_head"].bitplanes().unpack())
    expected = logits(twin)
    assert (logits(model) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_fewer_bits_cost_more(served, source):
    original = logits(lutra.load(source)[0])
    distance = [
        float((logits(lutra.load(served[0], bits=bits)[0]) - original).norm()) for bits in (4, 3, 2)
    ]
    assert distance == sorted(distance) and distance[0] < 0.7 * distance[2]


def test_planes_are_stored_once(served):
    out, report = served
    stored = tensors_of(out)
    layer = "model.layers.0.mlp.down_proj"
    assert stored[f"{layer}.weight"].shape == (4, 64, 3)
    scales = {n.removeprefix(f"{layer}.") for n in stored if n.startswith(f"{layer}.weight_")}
    assert scales == {
        "weight_scale", "weight_offset", "weight_scale_2bit", "weight_offset_2bit",
        "weight_scale_3bit", "weight_offset_3bit",
    }  # fmt: skip
    name = report["layers"][layer]["format"]
    assert name.endswith("+serve2,3")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert [f"{'.'.join(layer.split('.')[:2])}.*", name] in config["scheme"]


def test_precision_can_change_back_and_forth(served):
    model, _ = lutra.load(served[0])
    first = logits(model)
    for bits in (2, 4, 3, 4):
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear) and layer.format.serve_bits:
                layer.serve(bits)
    assert torch.equal(logits(model), first)


def test_saving_a_lower_precision_keeps_the_whole_file(served, tmp_path):
    model, _ = lutra.load(served[0], bits=2)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(served[0]), tensors_of(tmp_path / "saved")
    for name, tensor in after.items():
        if "_proj" in name:
            assert torch.equal(tensor, before[name])
    assert {n for n in before if "_proj" in n} <= after.keys()


def test_precisions_that_are_not_served(served):
    with pytest.raises(SchemeError, match="2, 3, 4, 8"):
        lutra.load(served[0], bits=5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"serve_bits": (5,)}, "4-bit file can not serve 5"),
        ({"serve_bits": (0, 2)}, "can not serve 0"),
        ({"serve_bits": (-1,)}, "can not serve -1"),
        ({"serve_bits": (2,), "method": "rtn"}, "only method lut-gemm"),
        ({"serve_bits": (2,), "method": "gptq", "kind": "int"}, "only method lut-gemm"),
    ],
)
def test_what_can_not_be_served(source, tmp_path, changes, words):
    with pytest.raises(SchemeError, match=words):
        quantize_tiny(source, tmp_path / "out", bits=4, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("serve", [(1,), (1, 2, 3), (4, 4)])
def test_without_calibration(source, tmp_path, kind, serve):
    report = quantize_tiny(source, tmp_path / "out", bits=4, kind=kind, serve_bits=serve)
    for bits in {*serve, 4}:
        expected = logits(dense_twin(source, tmp_path / "out", report, bits))
        found = logits(lutra.load(tmp_path / "out", bits=bits)[0])
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_one_bit_of_one_bit(source, tmp_path):
    report = quantize_tiny(source, tmp_path / "out", bits=1, serve_bits=(1,))
    assert report["layers"]["model.layers.0.mlp.up_proj"]["format"] == "ubcq1g32"


def test_trained_on_the_blocks(source, tmp_path, text_file):
    options = {"rounds": 1, "reconstruct": True, "steps": 3, "batch": 2}
    report = quantize_tiny(
        source, tmp_path / "out", bits=3, text=text_file, serve_bits=(2,), options=options
    )
    for bits in (2, 3):
        expected = logits(dense_twin(source, tmp_path / "out", report, bits))
        found = logits(lutra.load(tmp_path / "out", bits=bits)[0])
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
