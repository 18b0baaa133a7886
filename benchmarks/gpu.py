#!/usr/bin/env python3
"""Measures the trainer on a GPU that is at hand for a quarter of an hour: one Markdown table, after 8 minutes at most.

    python benchmarks/gpu.py

Needs torch, transformers, diffusers and accelerate alone, and no network: the models have the geometry of Stable
Diffusion 1.4 and XL and random weights. The rows, of which benchmarks/step.py says more, run one after the other, those
that matter most first; one that fails, or for which no time is left, says so in its line. "graphs" are CUDA graphs, as
`accelerate launch --dynamo_backend cudagraphs` makes them. All that was measured is in results/step/gpu.json.

Columns: instance and class pictures a step; seconds from the command to the end of the third step, seconds a step as
median and range, and both together for 250 steps; peak of allocated memory until the training ends, and of what follows
(the proof that the result loads, and two pictures); arithmetic rate as a share of that of matrix products.
"""

import argparse
import json
import re
import signal
import statistics
import time
from dataclasses import replace

import step
from step import CACHED, CHECKPOINTING, Setup

HEAD = ("", "pictures", "start, s", "s a step", "250 steps, s", "GB", "GB, final pictures", "of the limit")


def choose_rows(size):
    """(size, row) pairs of `step.measure`, for Stable Diffusion's geometry and XL's."""
    xl, exact = {"sd14": "sdxl", "tiny": "tinyxl"}[size], Setup("exact bf16", "bf16")
    cached = replace(exact, name="cached bf16", flags=CACHED)
    rows = [
        exact,
        cached,
        replace(exact, name="exact bf16", batch=1),
        replace(cached, name="cached bf16, checkpointing", flags=CACHED + CHECKPOINTING, batch=1),
        replace(cached, name="XL, cached bf16, checkpointing", flags=CACHED + CHECKPOINTING, batch=1),
        replace(cached, name="cached bf16, channels_last", flags=(*CACHED, "--channels_last")),
        # gradients that outlive a step would lie in the memory into which a graph writes the next ones
        replace(cached, name="cached bf16, graphs", flags=(*CACHED, "--set_grads_to_none"), dynamo="cudagraphs"),
        replace(cached, name="cached bf16, checkpointing", flags=CACHED + CHECKPOINTING),
        replace(cached, name="cached fp16", precision="fp16"),
        replace(cached, name="cached bf16, compiled", dynamo="inductor"),
    ]
    return [(xl if row.name.startswith("XL") else size, row) for row in rows]


def cells_of(row):
    """The table's cells of a row that was measured."""
    median = statistics.median(row["times"])
    peak = max(row["start_memory"], row["memory"]) / 1e9
    cells = [f"{row['start']:.0f}", step.spread(row["times"]), f"{row['start'] + 247 * median:.0f}", f"{peak:.2f}"]
    cells.append(f"{row['pictures'] / 1e9:.2f}" if row["pictures"] else "failed")
    return [*cells, f"{step.share_of_limit(row):.0%}" if row["flops"] else "failed"]


def stop(*signal_and_frame):
    """Ends the row that is being measured; a signal handler."""
    raise SystemExit("no time left")


def main():
    """Runs the rows and prints their lines as they come."""
    parser = argparse.ArgumentParser(description="Measure the trainer on a GPU.")
    parser.add_argument("--size", choices=("sd14", "tiny"), default="sd14", help="tiny: to see that it works")
    parser.add_argument("--only", default="", help="regular expression: rows whose name it matches")
    parser.add_argument("--minutes", type=float, default=7.5, help="no row begins or goes on after them")
    args = parser.parse_args()
    import torch

    step.RESULTS.mkdir(parents=True, exist_ok=True)
    report = {"size": args.size, "device": step.describe_device(), "torch": torch.__version__, "rows": []}
    is_cuda, end = torch.cuda.is_available(), time.monotonic() + 60 * args.minutes
    print(f"{report['size']}, {report['device']}, torch {report['torch']}{'' if is_cuda else '; there is no GPU here'}")
    print(f"\n| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}", flush=True)
    signal.signal(signal.SIGALRM, stop)
    for size, setup in [pair for pair in choose_rows(args.size) if re.search(args.only, pair[1].name)]:
        left, (rounds, steps) = end - time.monotonic(), (5, 10) if is_cuda else (2, 1)
        try:
            signal.setitimer(signal.ITIMER_REAL, left) if left > 0 else stop()
            (row,) = step.measure([setup], size, rounds, steps, ("flops", "pictures"))
            signal.setitimer(signal.ITIMER_REAL, 0)
            report["rows"].append(row)
            cells = cells_of(row)
        except (Exception, SystemExit) as error:  # whatever it is, it costs this row alone
            signal.setitimer(signal.ITIMER_REAL, 0)
            last_line = (str(error) or type(error).__name__).strip().splitlines()[-1]
            cells = [f"failed: {last_line[:200]}", *[""] * (len(HEAD) - 3)]
        print(f"| {setup.name} | {' | '.join([f'{setup.batch} + {setup.batch}', *cells])} |", flush=True)
        (step.RESULTS / "gpu.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
