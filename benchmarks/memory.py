#!/usr/bin/env python3
"""Measures the memory of the trainer's process over a whole run, by phase: load, train, checkpoint, end.

    python benchmarks/memory.py [--size sd14] [--script train_custom_diffusion.py --script OLDER.py]

A short run in bfloat16 on the CPU, of a model with random weights (made from a config, so nothing is downloaded; kept
in results/models): one instance and one class picture a step, a checkpoint, and a validation picture before the
training and after it. The process is watched from outside, so any version of the trainer can be measured: the phases
are told by the progress bar and by the checkpoint's folder. "Resident" is all memory that the process occupies;
"anonymous" leaves out the pages of mapped files, which the system can take back. Linux only.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from step import ROOT, SIZES, make_model, make_pictures

PHASES = ("load", "first pictures", "train", "checkpoint", "end")
NUM_STEPS, CHECKPOINT_STEP = 6, 3
INTERVAL = 0.01  # between two looks, in seconds
LIMIT = 1.25  # a phase that takes more than so many times the training's memory ends runs that could be trained


def command_line(script, model, folder):
    """The command of a short run: 64 pixels, as pictures are to take no memory worth mentioning."""
    for kind in ("instance", "class"):
        if not (folder / kind).exists():
            make_pictures(folder / kind, 2, (128, 128))
    values = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": folder / "instance",
        "instance_prompt": "photo of a <new1> cat",
        "class_data_dir": folder / "class",
        "class_prompt": "cat",
        "modifier_token": "<new1>",
        "num_class_images": 2,
        "resolution": 64,
        "train_batch_size": 1,
        "mixed_precision": "bf16",
        "max_train_steps": NUM_STEPS,
        "checkpointing_steps": CHECKPOINT_STEP,
        "validation_prompt": "a <new1> cat in a bucket",
        "validation_steps": 1000,
        "num_validation_images": 1,
        "dataloader_num_workers": 0,  # all memory is to be the one process's
        "report_to": "none",
        "output_dir": folder / "output",
    }
    switches = ["--with_prior_preservation", "--real_prior"]
    return [sys.executable, script, *switches, *(f"--{name}={value}" for name, value in values.items())]


def phase_of(printed, output_dir):
    """The phase of a run, from what it has printed and the files that it has made."""
    steps = re.findall(r"steps:[^\r\n]*\| *(\d+)/", printed)
    if not steps:
        return "first pictures" if re.search(r"^Training [\d,]+ parameters", printed, re.MULTILINE) else "load"
    if int(steps[-1]) == NUM_STEPS:
        return "end"
    is_saved = (output_dir / f"checkpoint-{CHECKPOINT_STEP}").exists()
    return "checkpoint" if int(steps[-1]) == CHECKPOINT_STEP and not is_saved else "train"


def memory_of(process):
    """Resident and anonymous memory of a process in GiB, or (0, 0) when it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0, 0
    found = dict(re.findall(r"(VmRSS|RssAnon):\s+(\d+) kB", status))
    return tuple(int(found.get(name, 0)) / 2**20 for name in ("VmRSS", "RssAnon"))


def measure(script, model):
    """Runs the trainer once; returns {phase: (peak of resident, peak of anonymous memory)} in GiB."""
    peaks = dict.fromkeys(PHASES, (0, 0))
    # every step is to move the progress bar, and every line is to come at once
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "0", "PYTHONUNBUFFERED": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as log:
        command, output_dir = command_line(script, model, Path(scratch)), Path(scratch, "output")
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        printed = ""
        while process.poll() is None:
            time.sleep(INTERVAL)
            size = os.fstat(log.fileno()).st_size
            printed = os.pread(log.fileno(), size, 0).decode(errors="replace")
            phase = phase_of(printed, output_dir)
            resident, anonymous = memory_of(process)
            peaks[phase] = max(peaks[phase][0], resident), max(peaks[phase][1], anonymous)
        if process.returncode:
            raise SystemExit(f"error: {script}: ended with exit status {process.returncode}:\n{printed[-3000:]}")
    return peaks


def print_table(script, peaks):
    """Markdown: the phases' peaks and their ratio to the training's."""
    print(f"\n{script}\n\n| | resident GiB | anonymous GiB | of the training's |\n| --- | --- | --- | --- |")
    for phase, (resident, anonymous) in peaks.items():
        ratio = resident / peaks["train"][0]
        print(f"| {phase} | {resident:.2f} | {anonymous:.2f} | {ratio:.2f}{' (!)' if ratio > LIMIT else ''} |")


def main():
    """Measures each script once and prints its table."""
    parser = argparse.ArgumentParser(description="Measure the memory of a training by phase.")
    parser.add_argument("--size", choices=SIZES, default="sd14", help="tiny: to see that it works")
    parser.add_argument("--script", action="append", help="trainer to measure; several to compare them")
    args = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("error: this measures on Linux only: it reads /proc")
    with ProcessPoolExecutor(1) as pool:  # making it takes gigabytes, which this process is not to keep
        model = pool.submit(make_model, args.size).result()
    print(f"{args.size}, bfloat16, 1 + 1 pictures of 64 pixels; (!) is more than {LIMIT} times the training's")
    for script in args.script or [ROOT / "train_custom_diffusion.py"]:
        print_table(script, measure(script, model))


if __name__ == "__main__":
    main()
