"""Does anything work? Quantize a tiny random Llama, save, load it in transformers, generate."""

from __future__ import annotations

import pytest
import torch

import lutra


@pytest.mark.parametrize(
    ("method", "bits"), [("rtn", 4), ("gptq", 3), ("awq", 4), ("lut-gemm", 2)]
)
def test_quantize_save_load_generate(tiny_model, text_file, tmp_path, method, bits):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder, again = tiny_model("llama"), tmp_path / "quantized", tmp_path / "again"
    calibration = None if method == "rtn" else text_file
    report = lutra.quantize(
        source, folder, method=method, bits=bits, group_size=32, calibration=calibration,
        samples=4, seq_len=32,
    )  # fmt: skip
    assert bits < report["bits_per_weight"] <= bits + 1.2

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Tiny", return_tensors="pt")
    produced = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert produced.shape == (1, 8)

    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(produced).logits, reloaded(produced).logits)


def test_eight_bits_are_close_to_the_original(tiny_model, tmp_path):
    source, folder = tiny_model("llama"), tmp_path / "quantized"
    lutra.quantize(source, folder, method="rtn", bits=8, group_size=32)
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        original, quantized = (lutra.load(path)[0](ids).logits for path in (source, folder))
    error = (quantized - original).norm() / original.norm()
    assert error < 0.02
