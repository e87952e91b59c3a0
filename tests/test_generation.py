"""Decoding by steps gives the tokens of transformers' own loop, and refuses what can not work.

On a CPU the steps are not recorded, and what a GPU fuses is computed by torch; everything around it
is the same. Tests marked gpu record them.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import TINY_FAMILIES
from quantized import make_source, quantize_tiny
from transformers import RepetitionPenaltyLogitsProcessor

import lutra
from lutra.bench.tokens import PROMPTS, compare_tokens, reference_tokens
from lutra.errors import LutraError
from lutra.runtime import generation
from lutra.runtime.step import DecodeStep, capacity_for, likeliest

FUSED = {"llama", "mistral", "qwen2", "qwen3", "opt"}
BOTH = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def _models(folder: Any, family: str, device: str = "cpu", **options: Any) -> tuple[Any, Any]:
    """A quantized model twice: as transformers runs it, and decoding by steps."""
    if not (folder / "out").exists():
        if device == "cuda":  # heads of a size that the kernels know
            options = {"hidden_size": 256, "intermediate_size": 384} | options
            if family == "opt":
                options = {"hidden_size": 256, "ffn_dim": 384, "word_embed_proj_dim": 256}
            if family == "gpt2":
                options = {"n_embd": 256}
            if family == "qwen3":
                options["head_dim"] = 64
        src = make_source(folder / "src", family, **options)
        quantize_tiny(src, folder / "out", "rtn", 4)
    dtype = "float32" if device == "cpu" else "float16"
    model, _ = lutra.load(folder / "out", device=device, dtype=dtype)
    plain = copy.deepcopy(model)
    plain.__dict__.pop("generate", None)
    return plain, generation.enable(model, devices=("cpu", "cuda"))


def _assert_same(
    plain: Any, found: torch.Tensor, wanted: torch.Tensor, processor: Any = None
) -> None:
    """The same tokens, up to the first choice between scores that 16 bits do not tell apart."""
    for row, (a, b) in enumerate(zip(found.tolist(), wanted.tolist(), strict=True)):
        at = next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)
        if at is None:
            continue
        assert plain.dtype == torch.float16, (row, a, b)
        with torch.no_grad():
            before = wanted[row : row + 1, :at]
            scores = plain(before).logits[:, -1].float()
            scores = (scores if processor is None else processor(before, scores))[0]
        assert abs(float(scores[a[at]] - scores[b[at]])) < 0.01, (row, at, a, b)


def _steps(model: Any) -> list[DecodeStep]:
    return list(model.lutra_decoding.steps.values())


def _prompt(batch: int, length: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 257, (batch, length), generator=generator).to(device)


@BOTH
@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_tokens_are_those_of_transformers(family, device, tmp_path):
    plain, model = _models(tmp_path, family, device)
    for batch, length in ((1, 5), (3, 9)):
        ids = _prompt(batch, length, device)
        wanted = plain.generate(ids, max_new_tokens=12, do_sample=False)
        found = model.generate(ids, max_new_tokens=12, do_sample=False)
        _assert_same(plain, found, wanted)
    (first, second) = _steps(model)
    assert first.batch == 1 and second.batch == 3
    assert (first.fallback is None) == (family in FUSED)
    assert first.is_recorded == (device == "cuda")
    again = model.generate(_prompt(1, 5, device), max_new_tokens=12, do_sample=False)
    _assert_same(plain, again, plain.generate(_prompt(1, 5, device), max_new_tokens=12))
    assert len(_steps(model)) == 2


@BOTH
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_prompts_of_unequal_length(family, device, tmp_path):
    plain, model = _models(tmp_path, family, device)
    ids = _prompt(3, 10, device)
    mask = torch.ones_like(ids)
    mask[0, :6] = mask[2, :1] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, padding in enumerate((6, 0, 1)):
        alone = plain.generate(ids[row : row + 1, padding:], max_new_tokens=8, do_sample=False)
        found = together[row, 10:]
        expected = alone[0, 10 - padding :]
        assert torch.equal(found[: len(expected)], expected), row


@BOTH
@pytest.mark.parametrize("family", sorted(FUSED))
def test_prompts_read_by_fused_blocks(family, device, tmp_path):
    plain, model = _models(tmp_path, family, device)
    ids = _prompt(3, 21, device)
    with torch.no_grad():
        own = plain(ids, use_cache=True)
        wanted = own.logits[:, -1].float()
        step = DecodeStep(model, 3, 64)
        assert step.fallback is None
        step._reads_fused = True  # on a CPU the same, by torch
        found = step.prefill(ids).float()
        error = (found - wanted).abs().max() / wanted.abs().max()
        assert error < (1e-4 if device == "cpu" else 4e-3)
        for layer, stored in zip(step.cache.step_layers, own.past_key_values.layers, strict=True):
            for a, b in ((layer.keys, stored.keys), (layer.values, stored.values)):
                assert (a[:, :, :21] - b).abs().max() <= (1e-4 if device == "cpu" else 2e-2)
                assert (a[:, :, 32:] == 0).all()  # prompts of 21 are filled up to 32
    assert all("forward" not in module.__dict__ for module in model.modules())


@BOTH
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_prompts_are_filled_up_and_recorded(family, device, tmp_path, monkeypatch):
    """What fills up a prompt, or was in the cache before it, changes no token."""
    plain, model = _models(tmp_path, family, device)
    monkeypatch.setattr("lutra.runtime.step.PROMPTS_KEPT", 2)
    step = DecodeStep(model, 2, 128)
    step._reads_fused = True

    def tokens(ids: torch.Tensor) -> torch.Tensor:
        step.prefill(ids)
        for _ in range(5):
            step.advance()
        length = ids.shape[1]
        assert int(step.cache.position) == length + 5
        return step.tokens[length : length + 6].T

    with torch.no_grad():
        for seed, length in enumerate((40, 60, 3, 16, 41, 2, 90, 64, 17, 100)):
            ids = _prompt(2, length, device, seed)
            wanted = plain.generate(ids, max_new_tokens=6, do_sample=False)
            first, second = tokens(ids), tokens(ids)
            assert torch.equal(first, second)  # as it was launched, and as it was recorded
            _assert_same(plain, torch.cat([ids, first], dim=1), wanted)
    assert list(step._prompts) == [32, 128]  # those used last
    assert step.recorded_prompts() == ([32, 128] if device == "cuda" else [])
    assert DecodeStep(model, 40, 128)._padded_length(100) is None  # rows enough by themselves


def test_a_prompt_is_filled_up_within_the_cache_and_the_positions(tmp_path):
    _, model = _models(tmp_path, "opt")
    step = DecodeStep(model, 1, 256)
    assert step._padded_length(5) is None  # on a CPU products of more rows take longer
    step._reads_fused = True
    assert [step._padded_length(n) for n in (1, 16, 17, 97, 128)] == [16, 16, 32, 128, 128]
    assert step._padded_length(129) is None  # 192 pass the positions


@BOTH
def test_drawn_tokens_and_processors(device, tmp_path, monkeypatch):
    # A prompt that is filled up may run other kernels, which round otherwise, and what is drawn
    # shows the last bit: here both models read it as it is.
    monkeypatch.setattr("lutra.runtime.step.MOST_PADDED_ROWS", 0)
    plain, model = _models(tmp_path, "llama", device)
    ids = _prompt(2, 7, device)
    for options in (
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 4},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        found = []
        for m in (plain, model):
            torch.manual_seed(3)
            found.append(m.generate(ids, max_new_tokens=10, **options))
        wanted, ours = found
        if options["do_sample"]:
            assert torch.equal(ours, wanted), options
        else:
            penalty = RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])
            _assert_same(plain, ours, wanted, penalty)


@BOTH
def test_ends_of_texts(device, tmp_path):
    plain, model = _models(tmp_path, "llama", device)
    ids = _prompt(3, 6, device)
    free = plain.generate(ids, max_new_tokens=12, do_sample=False)
    ends = [int(free[0, 8]), int(free[1, 10])]  # so that sequences end at different steps
    for end in (ends[0], ends):
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": end, "pad_token_id": 5}
        wanted = plain.generate(ids, max_new_tokens=12, **options)
        assert torch.equal(model.generate(ids, max_new_tokens=12, **options), wanted)
    one = plain.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=ends[0])
    found = model.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=ends[0])
    assert torch.equal(found, one)


class _Streamer:
    def __init__(self, stop_after: int | None = None) -> None:
        self.pieces: list[list[int]] = []
        self.stop_after, self.ended = stop_after, False

    def put(self, value: torch.Tensor) -> None:
        if self.stop_after is not None and len(self.pieces) > self.stop_after:
            raise KeyboardInterrupt
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@BOTH
def test_streaming_and_interrupts(device, tmp_path):
    plain, model = _models(tmp_path, "llama", device)
    ids = _prompt(1, 6, device)
    streamer = _Streamer()
    whole = model.generate(ids, max_new_tokens=9, do_sample=False, streamer=streamer)
    assert streamer.ended and sum(streamer.pieces, []) == whole[0].tolist()
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=9, do_sample=False, streamer=_Streamer(4))
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), whole)


def test_what_can_not_work_is_refused(tmp_path):
    _, model = _models(tmp_path, "opt")
    with pytest.raises(LutraError, match="128 positions.*at most 8 new"):
        model.generate(_prompt(1, 120), max_new_tokens=20, do_sample=False)
    with pytest.raises(LutraError, match="128 positions.*Shorten"):
        model.generate(_prompt(1, 130), max_new_tokens=20, do_sample=False)
    with pytest.raises(LutraError, match="no tokens"):
        model.generate(torch.zeros((1, 0), dtype=torch.long), max_new_tokens=4, do_sample=False)


def test_other_ways_of_decoding_are_left_to_transformers(tmp_path):
    plain, model = _models(tmp_path, "llama")
    ids = _prompt(1, 6)
    for options in (
        {"num_beams": 3},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 2},
    ):
        options = {"max_new_tokens": 6, "do_sample": False} | options
        a, b = (m.generate(ids, **options) for m in (plain, model))
        assert torch.equal(getattr(a, "sequences", a), getattr(b, "sequences", b)), options
    assert _steps(model) == []
    window_plain, window = _models(tmp_path / "w", "mistral")  # window of 32 tokens
    a, b = (m.generate(_prompt(1, 30), max_new_tokens=9) for m in (window_plain, window))
    assert torch.equal(a, b) and _steps(window) == []


def test_recordings_follow_the_weights(tmp_path):
    plain, model = _models(tmp_path, "llama")
    ids = _prompt(1, 6)
    model.generate(ids, max_new_tokens=4, do_sample=False)
    (before,) = _steps(model)
    assert before.is_current()
    model.to(torch.float64)
    assert not before.is_current()
    model.to(torch.float32)
    found = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, plain.generate(ids, max_new_tokens=4, do_sample=False))
    assert before not in _steps(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(ids, max_new_tokens=4, do_sample=False), found)
    assert _steps(twin)[0].model is twin
    assert twin.generate.__reduce__()[1] == (twin,)


@BOTH
def test_a_dropped_model_is_freed_at_once(device, tmp_path):
    _, model = _models(tmp_path, "llama", device)
    model.generate(_prompt(1, 6, device), max_new_tokens=4, do_sample=False)
    (step,) = _steps(model)
    watched = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert watched() is None
    finally:
        gc.enable()
    with pytest.raises(LutraError, match="does not exist"):
        step.prefill(_prompt(1, 6, device))


def test_blocks_are_their_own_again(tmp_path):
    _, model = _models(tmp_path, "llama")
    model.generate(_prompt(1, 6), max_new_tokens=4, do_sample=False)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_likeliest_is_the_first_of_equals():
    for vocabulary in (257, 512, 50272):
        logits = torch.randn(3, vocabulary).round(decimals=1)
        first = [int((row == row.max()).nonzero()[0]) for row in logits]
        chosen = torch.zeros((3, 1), dtype=torch.int64)
        assert likeliest(logits, chosen)[:, 0].tolist() == first == chosen[:, 0].tolist()


@pytest.mark.parametrize(
    ("tokens", "capacity"), [(1, 256), (256, 256), (257, 512), (4096, 4096), (4097, 6144)]
)
def test_capacities(tokens, capacity):
    assert capacity_for(tokens) == capacity


@BOTH
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_eager_compiled_and_recorded_give_the_same_tokens(family, device, tmp_path):
    plain, model = _models(tmp_path, family, device)
    ids = prompt = _prompt(1, 6, device)
    wanted = plain.generate(ids, max_new_tokens=6, do_sample=False)
    compiled = torch.compile(plain, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, compiled(ids).logits[:, -1:].argmax(-1)], dim=1)
    _assert_same(plain, ids, wanted)
    _assert_same(plain, model.generate(prompt, max_new_tokens=6, do_sample=False), wanted)
    assert _steps(model)[0].is_recorded == (device == "cuda")


def test_tokens_are_compared_with_a_reference(tmp_path):
    src = make_source(tmp_path / "src", "llama")
    quantize_tiny(src, tmp_path / "out", "rtn", 4)
    wanted = reference_tokens(tmp_path / "out", PROMPTS[:3], 12)
    found = compare_tokens(tmp_path / "out", wanted, "cpu", "float32")
    assert (found["equal"], found["ties"], found["other"]) == (3, 0, 0)
    wanted[1]["tokens"][4] ^= 1
    wanted[2]["tokens"][7] ^= 1
    wanted[2]["gaps"][7] = 1e-4
    found = compare_tokens(tmp_path / "out", wanted, "cpu", "float32")
    assert (found["equal"], found["ties"], found["other"]) == (1, 1, 1)
    assert [(d["prompt"], d["at"]) for d in found["departures"]] == [(1, 4), (2, 7)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["stories260k", "tinystories-656k", "wiki-opt-34m", "wiki-llama-63m"]
)
def test_trained_models_give_the_tokens_of_a_cpu(name, shared, tmp_path):
    lutra.quantize(
        shared / "models" / name, tmp_path / "out", method="rtn", bits=4, group_size=32
    )  # fmt: skip
    wanted = reference_tokens(tmp_path / "out")
    found = compare_tokens(tmp_path / "out", wanted, "cuda", "float32")
    assert found["other"] == 0, found
    assert found["recorded"]
