"""Hardware counters of one product on the GPU, short. Needs Nsight Compute (`ncu`).

    python benchmarks/profile_cuda.py --shape 12288x12288 --format bcq2 --batch 1 [--plan 3]

prints for every kernel of one product (behind products with other weights, so that caches are cold)
its time, bytes, how busy each unit was, and why warps waited. Clocks are left as they are. `--plan`
takes the n-th possible plan instead of the chosen one; `--list` shows them.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys

COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "smsp__cycles_active.avg",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.per_cycle_active",
    "smsp__warps_eligible.avg.per_cycle_active",
    "launch__registers_per_thread",
    "launch__grid_size",
    "launch__occupancy_limit_shared_mem",
)
PATTERNS = (
    "breakdown:sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "breakdown:gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "regex:smsp__average_warps_issue_stalled_.*_per_issue_active.ratio",
)
ROTATION = 6  # weights multiplied before the one that is profiled


def inner(options: argparse.Namespace) -> None:
    """The products themselves; only the last lies between profiler marks."""
    import torch

    from lutra.bench.cuda import random_planes
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.products import add_steps, run
    from lutra.kernels.cuda.tuning import candidates, choose

    out, inputs = (int(n) for n in options.shape.split("x"))
    found = re.fullmatch(r"(u?bcq)([1-8])(?:g(\d+))?", options.format)
    if found is None:
        raise SystemExit(f"--format {options.format}: such as bcq3 or ubcq4g64")
    uniform, bits, group = found[1] == "ubcq", int(found[2]), int(found[3] or 128)
    layout = layout_of(out, inputs, bits, group, uniform)
    plan, reason = choose(layout, uniform, 2, options.batch, card(0))
    plans = candidates(layout, uniform, 2, options.batch, card(0))
    if options.list:
        print("\n".join(f"{i} {p}" for i, p in enumerate(plans)))
        return
    if options.plan is not None:
        plan, reason = plans[options.plan], f"plan {options.plan}"
    print(f"PLAN {plan}: {reason}", flush=True)
    x = torch.randn(options.batch, inputs, device="cuda").half()
    y = torch.empty(options.batch, out, device="cuda").half()
    weights = []
    for _ in range(ROTATION):
        planes = random_planes(out, inputs, bits, group, uniform, torch.device("cuda"))
        planes_, scales = to_kernel_order(planes, layout)
        torch.cuda.synchronize()
        weights.append((planes_, add_steps(scales, layout, uniform)))
    torch.cuda.synchronize()
    for planes_, scales in weights:
        run(plan, x, planes_, scales, None, y, layout, uniform)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run(plan, x, *weights[0], None, y, layout, uniform)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def show(text: str, all_counters: bool) -> None:
    """Counters from ncu's table, one line each; stalls and units from the largest on."""
    table = text[text.index('"ID"') :]
    header, units, *rows = csv.reader(io.StringIO(table))
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        print(f"\n{cells['Kernel Name'][:100]}  grid {cells['Grid Size']} x {cells['Block Size']}")
        unit = dict(zip(header, units, strict=True))
        named = [n for n in header if n in COUNTERS]
        for name in named:
            print(f"  {name:58} {cells[name]:>16} {unit[name]}")
        for pattern in (r"smsp__average_warps_issue_stalled_(\w+)_per", r"(.*pct.*)"):
            values = {}
            for name in header:
                match = re.match(pattern, name.split("breakdown:")[-1])
                if match and name not in named and re.fullmatch(r"[\d.,]+", cells[name]):
                    values[match[1]] = float(cells[name].replace(",", ""))
            best = sorted(values.items(), key=lambda item: -item[1])
            kept = best if all_counters else best[:8]
            print("  " + ", ".join(f"{n} {v:.2f}" for n, v in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="12288x12288", help="OUTxIN")
    parser.add_argument("--format", default="bcq3", help="bcq or ubcq, bits, g and the group")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--plan", type=int)
    parser.add_argument("--list", action="store_true", help="show the possible plans, no counters")
    parser.add_argument("--all", action="store_true", help="every counter that was read")
    parser.add_argument("--run", action="store_true", help="the products alone, without ncu")
    options = parser.parse_args()
    if options.run or options.list:
        inner(options)
        return
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    own = [f"--{k}={v}" for k, v in vars(options).items() if k in ("shape", "format", "batch")]
    own += [] if options.plan is None else [f"--plan={options.plan}"]
    command = [
        ncu, "--clock-control", "none", "--profile-from-start", "off", "--page", "raw", "--csv",
        "--metrics", ",".join([*COUNTERS, *PATTERNS]), sys.executable, __file__, "--run", *own,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    print(*re.findall(r"PLAN .*", done.stdout), sep="\n")
    if '"ID"' not in done.stdout:
        sys.exit(f"ncu gave no counters:\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}")
    show(done.stdout, options.all)


if __name__ == "__main__":
    main()
