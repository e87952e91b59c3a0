"""Every CUDA kernel under compute-sanitizer, at odd sizes. Needs a GPU and the CUDA toolkit.

    python benchmarks/sanitize_cuda.py [--tools memcheck,racecheck,synccheck] [--jobs 8]

Each part (one storage format, the flat kernels, those of a decoding step) runs in a process of its
own under each tool. Results are also held against float64 on the CPU, so that a kernel that reads
the wrong place inside its own memory does not pass. Ends with an error unless all is clean.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lutra.formats.bitplanes import BitPlanes, groups_per_row
from lutra.kernels.cuda import launch, nvrtc
from lutra.kernels.cuda.layout import Layout

TOOLS = ("memcheck", "racecheck", "synccheck")
# Each tensor is an allocation of its own: torch's blocks of 2 MiB would hide what lies behind it.
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
ALLOWED = 2.5  # times the error of rounding; wrong indices miss by far more
FLOAT32_ALLOWED = 1e-5
TOKENS = (1, 2, 3, 4, 5, 8, 11, 16, 17, 33, 64, 65, 100, 130, 200, 300)


@dataclass(frozen=True)
class Format:
    """A weight whose kernels are run.

    Attributes:
        shape: rows and inputs.
        bits, group, uniform: of the levels.
        scale, x: dtypes of the stored scales and of the activations.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    uniform: bool
    scale: torch.dtype = torch.float16
    x: torch.dtype = torch.float16

    @property
    def name(self) -> str:
        out, inputs = self.shape
        kind = "ubcq" if self.uniform else "bcq"
        dtypes = "".join(
            "f" if t == torch.float32 else "hb"[t == torch.bfloat16] for t in (self.scale, self.x)
        )
        return f"{kind}{self.bits}g{self.group}-{out}x{inputs}-{dtypes}"


FORMATS = (
    Format((33, 300), 3, 128, False),
    Format((130, 1000), 4, 128, True, x=torch.bfloat16),
    Format((257, 1088), 4, 128, False),
    Format((72, 2080), 2, 512, True),
    Format((520, 520), 3, 1 << 20, True, scale=torch.float32),
    Format((47, 160), 2, 32, True, x=torch.bfloat16),
    Format((20, 520), 1, 64, False),
    Format((200, 736), 8, 128, False, scale=torch.float32, x=torch.bfloat16),
    Format((1040, 4224), 2, 128, False),
    Format((9, 300), 3, 128, False),
)


def random_weight(form: Format) -> BitPlanes:
    out, inputs = form.shape
    group = min(form.group, -(-inputs // 32) * 32)
    groups = groups_per_row(inputs, group)
    signs = torch.randint(0, 2, (form.bits, out, inputs)) * 2 - 1
    scale = torch.rand(1 if form.uniform else form.bits, out, groups) + 0.1
    offset = torch.randn(out, groups)
    return BitPlanes.from_signs(signs, scale.to(form.scale), offset.to(form.scale), group)


def distinct(plans: list[Any], layout: Layout, uniform: bool, form: Format) -> Iterator[Any]:
    """Plans that run other machine code than those before them, two for each kernel at most."""
    from lutra.kernels.cuda.products import plan_instances

    seen: set[str] = set()
    kept: Counter[str] = Counter()
    for plan in plans:
        code = repr(list(plan_instances(plan, layout, uniform, form.scale, form.x)))
        if code not in seen and kept[plan.kernel] < 2:
            seen.add(code)
            kept[plan.kernel] += 1
            yield plan


def run_format(form: Format) -> Counter[str]:
    """Products of all numbers of tokens by the plan that is chosen and by others."""
    from lutra.kernels.cuda import float32
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.products import add_steps, run
    from lutra.kernels.cuda.tuning import candidates, choose

    weight = random_weight(form)
    out, inputs = form.shape
    layout = layout_of(out, inputs, form.bits, weight.group_size, form.uniform)
    exact_weight = weight.unpack(torch.float64)
    on_card = BitPlanes(
        weight.planes.cuda(), weight.scale.cuda(), weight.offset.cuda(), inputs, weight.group_size
    )
    planes, scales = to_kernel_order(on_card, layout)
    torch.cuda.synchronize()
    scales = add_steps(scales, layout, form.uniform)
    torch.cuda.synchronize()
    ran: Counter[str] = Counter()
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs).to(form.x)
        exact = x.double() @ exact_weight.T
        rounding = (exact.to(form.x).double() - exact).norm().item()
        on = x.cuda()
        chosen = choose(layout, form.uniform, form.scale.itemsize, tokens, card(0))[0]
        others = candidates(layout, form.uniform, form.scale.itemsize, tokens, card(0))
        for plan in distinct([chosen, *others], layout, form.uniform, form):
            y = torch.full((tokens, out), float("nan"), dtype=form.x).cuda()
            run(plan, on, planes, scales, None, y, layout, form.uniform)
            error = (y.cpu().double() - exact).norm().item()
            if not error <= ALLOWED * max(rounding, 1e-7 * exact.norm().item()):
                print(f"WRONG {form.name} {tokens} tokens: {error / rounding:.2f} {plan}")
            ran[plan.kernel] += 1
    for tokens in (1, 3, 9, 65):  # and with nothing rounded
        x = torch.randn(tokens, inputs)
        exact = x.double() @ exact_weight.T
        y = float32.multiply(x.cuda(), planes, scales, None, layout, form.uniform)
        error = (y.cpu().double() - exact).norm() / exact.norm()
        if not error <= FLOAT32_ALLOWED:
            print(f"WRONG {form.name} {tokens} tokens in float32: {error:.2e}")
        ran["float32"] += 1
    return ran


def run_flat(bits: int) -> Counter[str]:
    """Flattened layers, bit for bit, also by the kernel of other cards."""
    from lutra.formats.flat import FlatWeight, largest_digit
    from lutra.kernels.cuda import flat_products
    from lutra.kernels.cuda.flat_layout import Multiplier, multiplier_of, prepare
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.flat.reference import linear as reference

    ran: Counter[str] = Counter()
    device = card(0)
    most = largest_digit(bits)
    for out, inputs, growth in ((8, 32, 0.0), (200, 416, 0.2), (328, 1013, 0.1)):
        limit = torch.full((inputs,), most)
        limit = torch.where(torch.rand(inputs) < growth, limit * 2, limit)
        wide = ((torch.rand(out, inputs) * 2 - 1) * most).round().long()
        layer = FlatWeight.pack(wide, torch.rand(out) * 1e-3 + 1e-5, limit, bits)
        on_card = FlatWeight.pack(wide.cuda(), layer.scale.cuda(), limit.cuda(), bits)
        own = prepare(on_card, multiplier_of(device.capability, bits))
        others = prepare(on_card, Multiplier(bits, False))
        torch.cuda.synchronize()
        for tokens in (1, 7, 17, 65, 300):
            x = (torch.randn(tokens, inputs) * limit / most).half()
            expected = reference(x, layer, None)
            for prepared, makers in (
                (own, (flat_products.few_plans, flat_products.linear_plans)),
                (others, (flat_products.mma_plans,)),
            ):
                q, step = flat_products.quantize(x.cuda(), prepared)
                job = flat_products.job_of(prepared, out, tokens, x.dtype)
                plans = [flat_products.choose(job, device)[0]] if prepared is own else []
                for make in makers:
                    plans += list(make(job, device))[:2]
                for plan in dict.fromkeys(plans):
                    y = torch.full((tokens, out), float("nan")).half().cuda()
                    flat_products.run(plan, job, q, step, prepared, None, y)
                    if not torch.equal(y.cpu(), expected):
                        print(f"WRONG flat {bits} bits {out}x{inputs}, {tokens} tokens: {plan}")
                    ran[plan.kernel if hasattr(plan, "kernel") else type(plan).__name__] += 1
    return ran


def run_flat_inputs() -> Counter[str]:
    """What is computed on the way to the integers, bit for bit where modules round; rotations."""
    from lutra.formats.flat import FlatWeight, largest_digit, rotate_inputs
    from lutra.kernels.cuda import flat_products
    from lutra.kernels.cuda.flat_layout import multiplier_of, prepare
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.flat.before import Activation, Norm, apply

    ran: Counter[str] = Counter()
    most = largest_digit(8)
    for out, inputs in ((72, 416), (40, 1013)):
        limit = torch.where(torch.rand(inputs) < 0.1, 3 * most, most)
        limit[7] = 100 * most
        wide = ((torch.rand(out, inputs) * 2 - 1) * most).round().long()
        scale = torch.rand(out) * 1e-3 + 1e-5
        layer = FlatWeight.pack(wide.cuda(), scale.cuda(), limit.cuda(), 8)
        prepared = prepare(layer, multiplier_of(card(0).capability, 8))
        gain, shift = (torch.rand(inputs).half().cuda() for _ in range(2))
        for tokens in (1, 7, 65, 300):
            x, times = (torch.randn(tokens, inputs).half().cuda() for _ in range(2))
            for before in (
                Norm(gain, 1e-5), Norm(gain, 1e-5, shift), Activation("relu"),
                Activation("gelu_tanh"), Activation("silu", times),
            ):  # fmt: skip
                y = flat_products.linear(x, prepared, None, out, before)
                expected = flat_products.linear(apply(x, before), prepared, None, out)
                error = (y.float() - expected.float()).norm() / expected.float().norm()
                if error > (1e-2 if isinstance(before, Norm) else 0.0):
                    name = getattr(before, "name", "norm")
                    print(f"WRONG {name} on the way, {tokens} x {inputs}: {error:.2e}")
                ran[type(before).__name__] += 1
    for inputs, block in ((416, 64), (1013, 256)):
        index = torch.randperm(inputs)[: inputs // block * block].view(-1, block).int().cuda()
        for tokens in (1, 2, 9, 131):
            x = torch.randn(tokens, inputs).half().cuda()
            if not torch.equal(flat_products.rotate(x, index), rotate_inputs(x, index)):
                print(f"WRONG rotation of {tokens} x {inputs} in blocks of {block}")
            ran["flat_rotate"] += 1
    return ran


def run_step() -> Counter[str]:
    """Norms, activations, attention and sums of a decoding step."""
    from lutra.kernels.cuda import token_step
    from lutra.kernels.cuda.token_step import AttentionShape

    ran: Counter[str] = Counter()

    def near(name: str, y: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.allclose(y.cpu().float(), expected.float(), rtol=0.02, atol=0.02):
            print(f"WRONG {name}: {(y.cpu().float() - expected.float()).abs().max()}")
        ran[name] += 1

    for dtype in (torch.float16, torch.bfloat16):
        for features, layer_norm in ((64, False), (4104, True), (8200, False)):
            x, delta, weight, bias = (torch.randn(3, features).to(dtype) for _ in range(4))
            pair = (weight[0].contiguous(), bias[0].contiguous() if layer_norm else None)
            for other in (delta, None):
                expected = token_step.add_norm(x, other, *pair, 1e-5, layer_norm)
                found = token_step.add_norm(
                    x.cuda(), None if other is None else other.cuda(),
                    *(None if t is None else t.cuda() for t in pair), 1e-5, layer_norm,
                )  # fmt: skip
                for y, wanted in zip(found, expected, strict=True):
                    near("token_norm", y, wanted)
        x = torch.randn(3, 2832).to(dtype)
        for gated in (True, False):
            near(
                "token_activation",
                token_step.activation(x.cuda(), gated),
                token_step.activation(x, gated),
            )
        for d, heads, kv_heads, batch, capacity, position in (
            (64, 14, 2, 1, 256, 0), (128, 6, 6, 3, 512, 300), (256, 8, 4, 2, 256, 37),
        ):  # fmt: skip
            shape = AttentionShape(heads, kv_heads, d, d**-0.5, 1e-6)
            qkv = torch.randn(batch, (heads + 2 * kv_heads) * d).to(dtype)
            keys, values = (torch.randn(batch, kv_heads, capacity, d).to(dtype) for _ in range(2))
            angle = torch.rand(batch, d // 2) * 6
            tables = tuple(torch.cat([f] * 2, -1).to(dtype) for f in (angle.cos(), angle.sin()))
            where = torch.tensor([position]), torch.arange(batch).int()
            on_card = [t.cuda() for t in (qkv, keys, values, *where)]
            expected = token_step.attention(qkv, keys, values, *where, shape, tables)
            y = token_step.attention(*on_card, shape, tuple(t.cuda() for t in tables))
            near("token_attention", y, expected)
            near("token_attention", on_card[1], keys)
            length = 33
            prompt = torch.randn(batch * length, (heads + 2 * kv_heads) * d).to(dtype)
            angle = torch.rand(batch * length, d // 2) * 6
            tables = tuple(torch.cat([f] * 2, -1).to(dtype) for f in (angle.cos(), angle.sin()))
            norms = (torch.rand(d).to(dtype), torch.rand(d).to(dtype)) if d == 64 else None
            cache = torch.zeros(2, batch, kv_heads, length + 2, d, dtype=dtype)
            on_cache = cache.cuda()
            expected = token_step.prompt_attention(prompt.clone(), *cache, shape, tables, norms)
            y = token_step.prompt_attention(
                prompt.cuda(), *on_cache, shape, tuple(t.cuda() for t in tables),
                None if norms is None else tuple(t.cuda() for t in norms),
            )  # fmt: skip
            near("prompt_heads", y, expected)
            near("prompt_heads", on_cache, cache)
        # A sum over two ranks of which the other one's packets have come already, with their flags.
        values = 4 * 300
        x, other = torch.randn(values).to(dtype), torch.randn(values).to(dtype)
        packets = torch.full((2, 2, 300, 4), 1, dtype=torch.int32)
        packets[..., ::2] = other.view(torch.int32).view(300, 2)
        mine, theirs = packets.cuda(), torch.zeros_like(packets).cuda()
        received = [mine.data_ptr(), theirs.data_ptr()]
        add = token_step.DirectSum(received, 0, values, torch.device("cuda", 0))
        near("token_sum", add(x.cuda()), x.float() + other.float())
    return ran


PARTS: dict[str, Callable[[], Counter[str]]] = {
    "step": run_step,
    "flat4": lambda: run_flat(4),
    "flat8": lambda: run_flat(8),
    "flat-inputs": run_flat_inputs,
    **{form.name: lambda form=form: run_format(form) for form in FORMATS},
}


def product_of_sums(x: torch.Tensor, weight_t: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """``torch.mm`` without the library of products."""
    for i in range(x.shape[0]):
        out[i] = (x[i, :, None].float() * weight_t.float()).sum(0)
    return out


def run_part(name: str, library: bool, overlap: bool) -> None:
    """Run one part.

    Args:
        library: whether rows that `dequantize` has expanded are multiplied by cuBLAS.
        overlap: whether a kernel may start before the one ahead of it has ended.
    """
    torch.manual_seed(0)
    if not overlap:
        launch.Card.dependent_launch = property(lambda card: False)
    if not library:
        torch.mm = product_of_sums
    ran = PARTS[name]()
    torch.cuda.synchronize()
    print("RAN", dict(ran), flush=True)


def check(
    part: str, tool: str, seconds: float, kernels: str, more_options: list[str]
) -> tuple[bool, str]:
    """Whether a part is clean under a tool, and what there is to say.

    Args:
        kernels: names of the kernels that the tool looks at; all of ours if empty.
        more_options: for the process that runs the part.
    """
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    more = ["--racecheck-report", "all"] if tool == "racecheck" else []
    # Only our kernels: racecheck takes barriers of cuBLAS for none, and dies where kernels that it
    # does not look at run among those that it does (also of ours), so products do without cuBLAS.
    # cuda-bindings asks the driver for functions that it does not have, which is no error.
    names = kernels.split(",") if kernels else sorted(
        path.stem for path in Path(nvrtc.__file__).parent.glob("*.cu")
    )  # fmt: skip
    command = [
        sanitizer, "--tool", tool, *more, "--print-limit", "20", "--report-api-errors", "no",
        "--kernel-name", f"regex=^({'|'.join(names)})$", sys.executable, __file__, "--run", part,
        *more_options,
    ]  # fmt: skip
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=os.environ | ALONE
        )
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode() + f"\nnot finished in {seconds} s"
        code = -1
    took = f"{time.monotonic() - start:.0f} s"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    ran = re.findall(r"RAN (.*)", text)
    counts = [int(n) for line in summary for n in re.findall(r"(\d+) (?:error|hazard)", line)]
    wrong = re.findall(r"WRONG.*", text)
    if code == 0 and ran and counts and not any(counts) and not wrong:
        return True, f"{took}, {ran[0]}"
    lines = [line for line in text.splitlines() if line.strip()]
    return False, "\n".join([took, *summary, *wrong[:5], *lines[:12], "...", *lines[-6:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--kernels", default="", help="look at these only; all run")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600, help="for one part under one tool")
    parser.add_argument("--cublas", action="store_true", help="use it under racecheck, too")
    parser.add_argument("--no-overlap", action="store_true", help="each kernel waits for the last")
    parser.add_argument("--run", help="run one part here, without a tool")
    options = parser.parse_args()
    if options.run:
        run_part(options.run, options.cublas, not options.no_overlap)
        return
    overlap = ["--no-overlap"] * options.no_overlap
    pairs = [(p, t) for t in options.tools.split(",") for p in options.parts.split(",")]
    bad = 0

    def one(pair: tuple[str, str]) -> tuple[bool, str]:
        library = ["--cublas"] * (options.cublas or pair[1] != "racecheck")
        return check(*pair, options.seconds, options.kernels, library + overlap)

    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(one, pair): pair for pair in pairs}
        for done in as_completed(running):
            (part, tool), (clean, text) = running[done], done.result()
            print(f"{tool:10} {part:28} {'clean' if clean else 'NOT CLEAN'}  {text}", flush=True)
            bad += not clean
    print(f"{len(pairs) - bad} of {len(pairs)} clean")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
