#!/usr/bin/env python3
"""Measures what users wait for: a concept in the embedded model, by the trainer and by the example script of diffusers.

    python benchmarks/time_to_concept.py --reference train_custom_diffusion_of_diffusers.py [-- --max_train_steps 400]

All train with the flags of the quickstart, with class pictures or with --keep_apart, as a user starts them, in turn, on
the whole machine (flags after `--` are added). Prints the time of the whole command, and what has been learned,
measured as benchmarks/concept_learning.py does, on its final prompts. The reference needs torchvision; without it the
trainer's own runs are compared. Everything lies in results/concept_learning; an interrupted run goes on where it
stopped.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from concept_learning import (
    ENVIRONMENT,
    MODEL,
    QUICKSTART,
    ROOT,
    WITH_PRIOR,
    folder_of,
    measures,
    set_up,
    span,
    table,
)

MEASURES = ("colour", "layout", "background", "shape")


def train(name, seed, script, flags):
    """Trains, unless that was done; returns the folder of the result and the seconds of the whole command."""
    folder = folder_of(name, seed, flags, Path(script).read_bytes())
    file = folder / "seconds.txt"
    if not file.exists():
        words = [str(ROOT / word) if word.startswith("assets/") else word for word in flags]
        words += ["--seed", str(seed), "--output_dir", str(folder)]
        threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        place = ROOT / "assets/regularization/cat"  # to which the paths in its images.txt are relative, for both
        with open(folder / "log.txt", "w") as log:
            start = time.perf_counter()
            command = [sys.executable, script, *words]
            subprocess.run(command, cwd=place, env=environment, stdout=log, stderr=log, check=True)
            file.write_text(str(time.perf_counter() - start))
    return folder, float(file.read_text())


def main():
    """Trains in turn, then measures, and prints the table."""
    parser = argparse.ArgumentParser(description="Measure the time that it takes to learn a concept.")
    parser.add_argument("--reference", type=os.path.abspath, help="the example script of diffusers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--quick", action="store_true", help="a step, a seed, few rough pictures: to see that it works")
    parser.add_argument("flags", nargs="*", help="flags for all, after --")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.flags = args.seeds[:1], [*args.flags, "--max_train_steps", "1", "--num_class_images", "2"]
    # Preparing a cached sample takes less time than passing it between processes.
    cached = ["--cache_latents", "2", "--dataloader_num_workers", "0"]
    runs = {
        "exact": WITH_PRIOR,
        "cached": [*WITH_PRIOR, *cached],
        "kept apart": QUICKSTART,
        "kept apart, cached": [*QUICKSTART, *cached],
        "kept apart, cached, stopped": [*QUICKSTART, *cached, "--stop_when_learned"],
    }
    runs = {name: (str(ROOT / "train_custom_diffusion.py"), [*flags, *args.flags]) for name, flags in runs.items()}
    if args.reference:
        # What diffusers writes as .safetensors it cannot load.
        flags = [*WITH_PRIOR, *args.flags, "--no_safe_serialization"]
        runs = {"reference": (args.reference, flags), **runs}
    done = {name: [] for name in runs}
    for seed in args.seeds:
        for name, (script, words) in runs.items():
            done[name].append(train(f"time of {name}", seed, script, words))
            print(f"  {name}, seed {seed}: {done[name][-1][1]:.0f} s", file=sys.stderr, flush=True)
    os.environ.update(ENVIRONMENT)
    settings = (MODEL[1], args.quick)
    with ProcessPoolExecutor(min(4, os.cpu_count()), initializer=set_up, initargs=settings) as pool:
        jobs = {name: [pool.submit(measures, folder, "final", ["cat"]) for folder, _ in done[name]] for name in runs}
        results = {name: [job.result() for job in found] for name, found in jobs.items()}
    rows, seconds = [], {name: np.array([seconds for _, seconds in done[name]]) for name in runs}
    for name, found in results.items():
        concept = [result["concepts"]["cat"]["cat"] for result in found]
        plain = [result["leakage"]["cat"][0]["colour"] for result in found]
        times = [f"{np.median(seconds[name]):.0f} ({seconds[name].min():.0f}-{seconds[name].max():.0f})"]
        times.append(span(seconds[name] / next(iter(seconds.values()))))
        rows.append([name, *times, *(span([c[key] for c in concept]) for key in MEASURES), span(plain)])
    print(
        table(["", "s", f"of that of {next(iter(runs))}", *MEASURES, '"cat": overlap with the concept, colour'], rows)
    )


if __name__ == "__main__":
    main()
