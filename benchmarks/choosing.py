#!/usr/bin/env python3
"""Compares the order in which scripts/evaluate.py puts checkpoints with that of exact measures of the same pictures.

    python benchmarks/choosing.py [--quick]

Trains the small model as docs/choosing.md does, unless that was done, evaluates all checkpoints, and has their pictures
judged by tools/measure.py as well, which knows colours and places and has no learned part. CLIP and DINO have random
weights here: this shows that pictures, features and rows are put together rightly, not what the real ones can see.
Everything lies in results/choosing.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tools")]

import measure  # noqa: E402

# The flags of docs/choosing.md; paths are relative to the repository.
MODEL = ["--pretrained_model_name_or_path", "assets/model", "--instance_data_dir", "assets/instance/cat"]
TRAINING = ["--instance_prompt", "photo of a <new1> cat", "--modifier_token", "<new1>", "--initializer_token", "yellow"]
TRAINING += ["--resolution", "128", "--train_batch_size", "8", "--noaug", "--hflip", "--report_to", "none"]
TRAINING += ["--learning_rate", "1e-2", "--max_train_steps", "240", "--checkpointing_steps", "20"]
PROMPTS = [
    "photo of a {} on the grass",
    "photo of a {} on an orange background",
    "photo of a {} on a gray background",
    "photo of a big {} on a green background",
]
COLUMNS = {  # heading: (measure of evaluate.py, pictures)
    "word: pixel change": ("change", "samples"),
    "image alignment, random CLIP": ("CLIP-I", "samples"),
    "image alignment, random DINO": ("DINO", "samples"),
    "plain class: pixel change": ("plain change", "plain"),
}


def make_judges(folder):
    """Saves a CLIP and a DINO of random weights; returns the flags that name them."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 256}
    config = CLIPConfig(text_config=layers, vision_config=layers | {"image_size": 112, "patch_size": 16})
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPTokenizer.from_pretrained(ROOT / "assets/model/tokenizer").save_pretrained(folder / "clip")
    vision = ViTConfig(image_size=112, patch_size=16, **layers)
    ViTModel(vision, add_pooling_layer=False).save_pretrained(folder / "dino")
    return ["--clip_model", folder / "clip", "--dino_model", folder / "dino"]


def start(*command):
    """Runs a script of this repository."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, env=environment)


def judge(folder):
    """Mean overlap of pictures with the cat's colours, and with its layout."""
    images = [Image.open(file) for file in sorted(folder.iterdir())]
    colour = np.mean([measure.concept_color(image, "cat") for image in images])
    layout = np.mean([measure.concept_layout(image, "cat") for image in images])
    return {"colour": float(colour), "layout": float(layout)}


def rank_correlation(left, right):
    """Spearman's: the correlation of the ranks; equal values have the ranks of their order."""
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


def main():
    """Trains, evaluates, and prints both orders."""
    parser = argparse.ArgumentParser(description="Compare the order of checkpoints with that of exact measures.")
    parser.add_argument("--quick", action="store_true", help="few steps and rough pictures: to see that it works")
    args = parser.parse_args()
    run = ROOT / "results/choosing"
    flags = ["--num_inference_steps", "2"] if args.quick else []
    few = ["--max_train_steps", "3", "--checkpointing_steps", "1"] if args.quick else []
    if not (run / "checkpoint-240").exists():
        start("train_custom_diffusion.py", *MODEL, *TRAINING, *few, "--output_dir", run)
    prompts = run / "benchmark-prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2] if args.quick else PROMPTS))
    output = run / "benchmark"
    flags += [*make_judges(run / "judges"), "--prompts", prompts, "--num_images", "1", "--output_dir", output]
    start("scripts/evaluate.py", "results/choosing", *MODEL, *flags)

    rows = json.loads((output / "evaluation.json").read_text())["rows"][1:]  # without the base model
    exact = {kind: [judge(Path(ROOT, row["pictures"], kind)) for row in rows] for kind in ("samples", "plain")}
    print("\n| step | colour / layout | plain class: colour | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (3 + len(COLUMNS)) + "|")
    for i, row in enumerate(rows):
        word = exact["samples"][i]
        found = [f"{row['step']}", f"{word['colour']:.2f} / {word['layout']:.2f}", f"{exact['plain'][i]['colour']:.2f}"]
        found += [f"{row[name]['mean']:.3g}" for name, _ in COLUMNS.values()]
        print(f"| {' | '.join(found)} |")
    correlations = []
    for name, kind in COLUMNS.values():
        pair = [row[name]["mean"] for row in rows], [row["colour"] for row in exact[kind]]
        correlations.append(f"{rank_correlation(*pair):.2f}")
    print(f"| rank correlation with colour | | | {' | '.join(correlations)} |")


if __name__ == "__main__":
    main()
