"""docs/FORMAT.md is true: its reader and its bytes agree with ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lutra.formats.bitplanes import BitPlanes, pack_bits
from lutra.formats.checkpoint import SourceCheckpoint, load_layer, stored_tensor_shapes
from lutra.formats.grouped import Grouped
from lutra.formats.shard import write_shard_file
from lutra.scheme import Format

PAGE = (Path(__file__).parents[1] / "docs" / "FORMAT.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def reader() -> dict:
    (code,) = _blocks("python")
    namespace: dict = {}
    exec(compile(code, "docs/FORMAT.md", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def example() -> bytes:
    (dump,) = _blocks("hexdump")
    return bytes.fromhex("".join(line.split("  ", 1)[1] for line in dump.splitlines()))


def test_the_bytes_of_the_page_are_what_we_write(tmp_path, reader, example):
    read = reader["read_safetensors"](example)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in read.items()}
    write_shard_file(tmp_path / "model.safetensors", tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == example
    length = int.from_bytes(example[:8], "little")
    assert length == 0xF8
    described = json.loads(_blocks("json")[1])
    assert described == json.loads(example[8 : 8 + length])


def test_the_values_of_the_page(tmp_path, reader, example):
    tensors = reader["read_safetensors"](example)
    dense = reader["dense_weight"](tensors, "fc", "bcq2g32", 40)
    assert dense[0, [0, 2, 32, 33]].tolist() == [0.25, 0.75, 1.375, 1.125]
    assert dense[1, 39] == 2.75
    (tmp_path / "model.safetensors").write_bytes(example)
    (tmp_path / "config.json").write_text("{}")
    source = SourceCheckpoint.open(tmp_path, quantized=True)
    ours = load_layer(source, "fc", Format.parse("bcq2g32"), 40)
    assert np.array_equal(ours.unpack(torch.float64).numpy(), dense)


@pytest.mark.parametrize("in_features", [32, 40, 97, 200])
@pytest.mark.parametrize(
    "name",
    ["bcq1g32", "bcq3g64", "bcq4row+f32", "bcq4g32+serve2,3", "ubcq3g128", "ubcq5g32+f32+serve2",
     "ubcq1row", "int4g32", "int8row+f32", "int1g64"],
)  # fmt: skip
def test_the_second_reader_agrees(tmp_path, reader, name, in_features):
    format = Format.parse(name)
    generator = torch.Generator().manual_seed(in_features)
    tensors = {}
    for suffix, (dtype, shape) in stored_tensor_shapes(format, 5, in_features).items():
        if dtype == torch.int32:
            bits = torch.rand(*shape[:2], in_features, generator=generator) > 0.5
            tensors[f"a.b.{suffix}"] = pack_bits(bits)
        elif dtype == torch.uint8:
            codes = torch.randint(0, 2**format.bits, shape, generator=generator)
            tensors[f"a.b.{suffix}"] = codes.to(dtype)
        else:
            tensors[f"a.b.{suffix}"] = torch.randn(shape, generator=generator).to(dtype)
    write_shard_file(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text("{}")
    source = SourceCheckpoint.open(tmp_path, quantized=True)
    ours = load_layer(source, "a.b", format, in_features)
    theirs = reader["read_safetensors"]((tmp_path / "model.safetensors").read_bytes())
    dense = reader["dense_weight"](theirs, "a.b", name, in_features)
    np.testing.assert_allclose(dense, ours.unpack(torch.float64).numpy(), rtol=1e-12, atol=1e-12)
    if isinstance(ours, Grouped):
        return
    assert isinstance(ours, BitPlanes)
    for bits in range(1, format.bits):  # also precisions without scales of their own
        dense = reader["dense_weight"](theirs, "a.b", name, in_features, serve=bits)
        expected = ours.prefix(bits).unpack(torch.float64).numpy()
        np.testing.assert_allclose(dense, expected, rtol=1e-12, atol=1e-12)


def test_sizes_of_the_page():
    for name, expected in {
        "bcq3g128": 3.5, "ubcq3g128": 3.25, "int4g64": 4 + 24 / 64, "bcq2g32+f32": 2 + 3.0,
    }.items():  # fmt: skip
        shapes = stored_tensor_shapes(Format.parse(name), 16, 512)
        stored = sum(int(np.prod(s)) * d.itemsize * 8 for d, s in shapes.values())
        assert stored / (16 * 512) == expected


def test_names_of_the_page_parse():
    line = next(line for line in PAGE.splitlines() if line.endswith("are names."))
    for name in re.findall(r"`([^`]+)`", line):
        assert str(Format.parse(name)) == name
    assert json.loads(_blocks("json")[0])["format_version"] == 1
