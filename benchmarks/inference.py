#!/usr/bin/env python3
"""Times a prediction of the UNet with trained weights loaded by `load_attn_procs` and with the same merged into it.

    python benchmarks/inference.py [--size mid2] [--rounds 15]

Both run in turn in one process, on a GPU in float16 if there is one; batch 2, as guidance has. The model has random
weights and is one of benchmarks/step.py's sizes, kept in results/models.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# ruff: noqa: E402
import train_custom_diffusion as trainer  # isort: skip, first: it quiets the libraries
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from step import SIZES, describe_device, make_model, spread


def pipelines(model, device, dtype):
    """{"loaded": pipeline, "merged": pipeline} with the same weights, which differ from the model's own."""
    found = {name: StableDiffusionPipeline.from_pretrained(model) for name in ("trained", "loaded", "merged")}
    trained = found.pop("trained")
    trained.unet.set_attn_processor(trainer.custom_diffusion_processors(trained.unet, "crossattn_kv"))
    for name, parameter in trained.unet.named_parameters():
        if "custom_diffusion" in name:
            parameter.data.mul_(1.1)
    with tempfile.TemporaryDirectory() as folder:
        result = trainer.Result(Path(folder), words={}, is_xl=False, settings={})
        result.save(trained, result.folder, result.endings)
        result.load_as_a_user(found["loaded"])
        for name, value in result.read(result.folder / result.file()).items():
            own = name.replace(".processor", "").replace("_custom_diffusion", "")
            found["merged"].unet.get_parameter(own).data.copy_(value)
    return {name: pipeline.to(device, dtype) for name, pipeline in found.items()}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Time a prediction with loaded and with merged weights.")
    sizes = [name for name, size in SIZES.items() if not size.text_2]  # without XL
    parser.add_argument("--size", choices=sizes, default="mid2")
    parser.add_argument("--rounds", type=int, default=15, help="how often each has its turn")
    args = parser.parse_args()
    logging.set_verbosity_error()
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    networks = {name: pipeline.unet for name, pipeline in pipelines(make_model(args.size), device, dtype).items()}
    size = SIZES[args.size]
    cells = size.resolution // 8
    latents = torch.randn(2, 4, cells, cells, device=device, dtype=dtype)
    hidden = torch.randn(2, 77, size.text[0], device=device, dtype=dtype)
    seconds, outputs = {name: [] for name in networks}, {}
    for _ in range(args.rounds + 2):
        for name, unet in networks.items():
            start = time.perf_counter()
            outputs[name] = unet(latents, 500, hidden).sample.cpu()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    difference = (outputs["loaded"] - outputs["merged"]).abs().max() / outputs["merged"].abs().max()
    print(f"{args.size}, {describe_device()}, torch {torch.__version__}, {args.rounds} rounds: median (range), seconds")
    for name, values in seconds.items():
        print(f"{name}: {spread(values[2:])}")  # the first two warm up
    ratios = sorted(a / b for a, b in zip(*(values[2:] for values in seconds.values()), strict=True))
    print(f"loaded / merged: {ratios[len(ratios) // 2]:.2f}; largest difference of the outputs: {difference:.1e}")


if __name__ == "__main__":
    main()
