#!/usr/bin/env python3
"""Measures what it takes to export a result as one file: its size, the time, and the memory of the process.

    python benchmarks/one_file.py [--size sd14]

The model has random weights (made from a config, so nothing is downloaded; kept in results/models), and the result
moves its keys and values a little. It is exported from the model as a folder, and then from the file that this made.
Memory is "resident" with the pages of mapped files, which the system can take back, and "anonymous" without them.
Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from memory import INTERVAL, memory_of
from step import ROOT, SIZES, make_model


def make_in_half(size):
    """The model's folder; its weights are made in half precision, as an XL in single takes 14 GB."""
    import torch

    torch.set_default_dtype(torch.float16)
    return make_model(size)


def make_result(model, folder):
    """Writes a result without words whose keys and values are those of a model, moved a little."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = {}
    for file in (model / "unet").glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            names = list(content.keys())
            for name in [name for name in names if ".attn2.to_k." in name or ".attn2.to_v." in name]:
                layer, projection = name.removesuffix(".weight").split(".attn2.")
                value = content.get_tensor(name).float()
                weights[f"{layer}.attn2.processor.{projection}_custom_diffusion.weight"] = value + 0.01
    folder.mkdir()
    save_file(weights, folder / "pytorch_custom_diffusion_weights.safetensors", {"settings": json.dumps({})})
    return folder


def measure(result, output, model, *flags):
    """Exports once; returns seconds, and the peaks of resident and anonymous memory in GiB."""
    command = [sys.executable, ROOT / "scripts" / "export.py", result, "--pretrained_model_name_or_path", model]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--format=checkpoint", f"--output={output}", *flags], text=True)
    peaks = (0, 0)
    while process.poll() is None:
        time.sleep(INTERVAL)
        peaks = tuple(map(max, peaks, memory_of(process)))
    if process.returncode:
        raise SystemExit(f"error: the export ended with exit status {process.returncode}")
    return time.perf_counter() - start, *peaks


def main():
    """Exports from the folder and from the file, and prints a table."""
    parser = argparse.ArgumentParser(description="Measure the export of one file.")
    parser.add_argument("--size", choices=SIZES, default="sd14", help="tiny: to see that it works")
    args = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("error: this measures on Linux only: it reads /proc")
    (ROOT / "results").mkdir(exist_ok=True)
    rows = []
    # In results/ and not in /tmp, which may lie in memory.
    with tempfile.TemporaryDirectory(dir=ROOT / "results") as scratch, ProcessPoolExecutor(1) as pool:
        model = pool.submit(make_in_half, args.size).result()
        result = pool.submit(make_result, model, Path(scratch, "result")).result()
        first, second = Path(scratch, "first.safetensors"), Path(scratch, "second.safetensors")
        rows.append(("a folder", first, measure(result, first, model)))
        rows.append(("a file", second, measure(result, second, first, f"--config_name_or_path={model}")))
        print(f"\n{args.size}, fp16\n\n| base | size | time | resident GiB | anonymous GiB |")
        print("| --- | --- | --- | --- | --- |")
        for base, file, (seconds, resident, anonymous) in rows:
            size = f"{file.stat().st_size / 1e9:.2f} GB"
            print(f"| {base} | {size} | {seconds:.1f} s | {resident:.2f} | {anonymous:.2f} |")


if __name__ == "__main__":
    main()
