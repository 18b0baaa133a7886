#!/usr/bin/env python3
"""Measures the trainer on a GPU that is at hand for a quarter of an hour: one Markdown table, after 8 minutes at most.

    python benchmarks/gpu.py

Needs torch, transformers, diffusers and accelerate alone, and no network: the models have the geometry of Stable
Diffusion 1.4 and XL and random weights. The rows, of which benchmarks/step.py says more, run one after the other, those
that matter most first; one that fails, or for which no time is left, says so in its line. "graphs" are CUDA graphs, as
`accelerate launch --dynamo_backend cudagraphs` makes them. All that was measured is in results/step/gpu.json.

Columns: instance and class pictures a step; seconds a step as median and range; seconds of a concept, which is from the
command to the end of a run of 250 steps, computed from the start, the steps and the end; peaks of allocated memory in
GB while the model is loaded, in a step, while two pictures are drawn between steps, and at the end, when the result is
proved to load and draws; arithmetic rate as a share of that of matrix products. The last one says what failed.
"""

import argparse
import contextlib
import json
import platform
import re
import signal
import statistics
import subprocess
import time
from dataclasses import replace
from importlib import metadata

import step
from step import CACHED, CHECKPOINTING, Setup

HEAD = (
    "", "pictures", "s a step", "s a concept", "GB, loading", "GB, training", "GB, pictures", "GB, end", "of the limit",
    "failed",
)  # fmt: skip
# GB that a card must have for a row to be tried. XL's training takes 13.6, and to make the model 14.
NEEDED = {"sdxl": 15}


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
    concept, end_memory = "", None
    if row["proof"]:
        seconds, end_memory = row["proof"]
        concept = f"{row['start'] + 247 * median + seconds:.0f}"
    peaks = (row["loading"], max(row["start_memory"], row["memory"]), row["pictures"], end_memory)
    cells = [step.spread(row["times"]), concept]
    cells += [f"{peak / 1e9:.2f}" if peak else "" for peak in peaks]
    return [*cells, f"{step.share_of_limit(row):.0%}" if row["flops"] else "", row["failure"] or ""]


def describe_machine():
    """Card, memory, driver and versions, in two lines."""
    import torch

    parts = [step.describe_device()]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f} GB")
        with contextlib.suppress(Exception):  # some containers have no such command
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
            parts.append(f"driver {subprocess.check_output(command, text=True, timeout=20).strip()}")
        parts.append(f"CUDA {torch.version.cuda}")
    else:
        parts.append("there is no GPU here")
    names = ("torch", "diffusers", "transformers", "accelerate")
    versions = [f"{name} {metadata.version(name)}" for name in names]
    return f"{', '.join(parts)}  \nPython {platform.python_version()}, {', '.join(versions)}"


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
    report = {"size": args.size, "machine": describe_machine(), "rows": []}
    is_cuda, end = torch.cuda.is_available(), time.monotonic() + 60 * args.minutes
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if is_cuda else float("inf")
    print(f"{args.size}, {report['machine']}\n\n| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}", flush=True)
    signal.signal(signal.SIGALRM, stop)
    rounds, steps = (5, 10) if is_cuda else (2, 1)
    for size, setup in [pair for pair in choose_rows(args.size) if re.search(args.only, pair[1].name)]:
        left = end - time.monotonic()
        try:
            if NEEDED.get(size, 0) > memory:
                raise SystemExit(f"left out: needs {NEEDED[size]} GB")
            signal.setitimer(signal.ITIMER_REAL, left) if left > 0 else stop()
            (row,) = step.measure([setup], size, rounds, steps, ("loading", "flops", "pictures", "proof"))
            signal.setitimer(signal.ITIMER_REAL, 0)
            report["rows"].append(row)
            cells = cells_of(row)
        except (Exception, SystemExit) as error:  # whatever it is, it costs this row alone
            signal.setitimer(signal.ITIMER_REAL, 0)
            cells = [*[""] * (len(HEAD) - 3), step.last_line(error)]
        print(f"| {setup.name} | {' | '.join([f'{setup.batch} + {setup.batch}', *cells])} |", flush=True)
        (step.RESULTS / "gpu.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
