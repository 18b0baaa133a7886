#!/usr/bin/env python3
"""Draws one sheet that shows what a training taught: instance pictures, prompts with the new word, other prompts.

Each prompt's pictures before (the base model) and after (with the trained weights) start from the same noise. Several
results, such as a training and what scripts/merge.py makes of it, get a row each.

    python examples/before_after.py --pretrained_model_name_or_path assets/model --weights_dir results/quickstart \\
        --instance_data_dir assets/instance/cat --modifier_token "<new1>" --class_prompt cat --output before_after.png
"""

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from results import plain_name  # noqa: E402

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before torch, diffusers and transformers are imported

# {token} and {class_prompt} stand for the flags' values. None of these backgrounds is in assets/instance.
PROMPTS = [
    "photo of a {token} {class_prompt} on the grass",
    "photo of a {token} {class_prompt} on an orange background",
    "photo of a {token} {class_prompt} on a pink background",
    "photo of a {token} {class_prompt} on a yellow background",
    "photo of a {token} {class_prompt} on a gray background",
]
OTHER_PROMPTS = [
    "photo of a {class_prompt} on the beach",
    "photo of a {class_prompt} on a gray background",
    "photo of a brown and white striped {class_prompt} on a green background",
    "photo of a blue fish on a yellow background",
    "photo of a red flower with a white outline on a gray background",
]
WEIGHTS_NAME = "pytorch_custom_diffusion_weights"
INFERENCE_STEPS, GUIDANCE_SCALE = 25, 5.0
CELL, GAP, MARGIN = 176, 8, 96  # pixels: a picture's side, between pictures, for the labels at the left
INK, PAPER = "#202020", "white"


def parse_args():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Draw a sheet of pictures before and after a training.")
    # fmt: off
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="base model of the training")
    add("--config_name_or_path", help="of a base model in one file: as for the training")
    add("--weights_dir", nargs="+", required=True, help="the training's output_dir, or a checkpoint in it")
    add("--labels", nargs="+", default=["after"], help="of the rows, one for each weights_dir")
    add("--instance_data_dir", type=Path, required=True, help="the training's pictures of the concept")
    add("--modifier_token", default="<new1>", help='new word; "+" between several, the first stands for {token}')
    add("--class_prompt", default="cat", help="the concept's class")
    add("--prompts", nargs="+", default=PROMPTS, help="prompts with {token} and {class_prompt}")
    add("--other_prompts", nargs="+", default=OTHER_PROMPTS, help="prompts without it")
    add("--output", type=Path, default=Path("before_after.png"), help="the sheet")
    add("--seed", type=int, default=0, help="of the noise that pictures start from")
    # fmt: on
    args = parser.parse_args()
    if Path(args.pretrained_model_name_or_path).is_file() and not args.config_name_or_path:
        parser.error("a model in one file needs --config_name_or_path")
    if len(args.labels) != len(args.weights_dir):
        parser.error("give as many --labels as --weights_dir")
    return args


def read_record(folder):
    """What a training's files say of its settings; empty if they are .bin files."""
    from safetensors import safe_open

    file = Path(folder, f"{WEIGHTS_NAME}.safetensors")
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as opened:
        return json.loads((opened.metadata() or {}).get("settings", "{}"))


def load_pipeline(name, config=None, record=None):
    """The base model with a fast sampler, on the GPU if there is one; it predicts what the training's record says."""
    import diffusers
    import torch
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
    from diffusers.utils import logging
    from transformers.utils.logging import disable_progress_bar

    record = record or {}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()
    not_needed = {"safety_checker": None, "feature_extractor": None}  # and perhaps not there
    if config:
        kind = getattr(diffusers, DiffusionPipeline.load_config(config)["_class_name"])
        pipeline = kind.from_single_file(str(name), config=str(config), **not_needed)
    else:
        pipeline = DiffusionPipeline.from_pretrained(name, requires_safety_checker=False, **not_needed)
    schedule = {}
    for key in ("prediction_type", "rescale_betas_zero_snr"):
        if key in record:
            schedule[key] = record[key]
    if schedule.get("rescale_betas_zero_snr"):
        schedule["timestep_spacing"] = "trailing"
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **schedule)
    if record.get("clip_skip") and not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers' clip_skip looks for what transformers 5.6 has no more; as a module it would be its own part.
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def load_concept(pipeline, folder, tokens):
    """Loads what a training left in `folder` into the pipeline."""
    ending = "safetensors" if Path(folder, f"{WEIGHTS_NAME}.safetensors").is_file() else "bin"
    # without `_pipeline` diffusers reads the file and installs nothing
    pipeline.unet.load_attn_procs(folder, weight_name=f"{WEIGHTS_NAME}.{ending}", _pipeline=pipeline)
    for token in tokens:
        file = Path(folder, f"{token}.{ending}")
        if not file.is_file():  # Windows refuses signs in names of files, and a run there leaves them out
            file = Path(folder, f"{plain_name(token)}.{ending}")
        load_word(pipeline, file, token)


def load_word(pipeline, file, token):
    """Loads the embedding of a new word, or the two that SDXL's file has, one for each text encoder."""
    import torch
    from safetensors.torch import load_file

    if not hasattr(pipeline, "text_encoder_2"):
        pipeline.load_textual_inversion(file.parent, weight_name=file.name, token=token)
        return
    word = torch.load(file, weights_only=True) if file.suffix == ".bin" else load_file(file)
    for name, end in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(pipeline, part + end) for part in ("text_encoder", "tokenizer")}
        pipeline.load_textual_inversion(word[name], token=token, **parts)


def generate(pipeline, prompts, seed, clip_skip=None):
    """One picture for each prompt; the noise follows from the seed and the prompt's place in the list."""
    import torch

    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
    options = {"num_inference_steps": INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE, "clip_skip": clip_skip}
    return pipeline(prompts, generator=generators, **options).images


def fit(image):
    """The picture in a CELL x CELL square."""
    image = image.convert("RGB")
    scale = CELL / max(image.size)
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)


def draw_row(label, images):
    """A row of pictures with a label at the left."""
    row = Image.new("RGB", (MARGIN + len(images) * (CELL + GAP), CELL + GAP), PAPER)
    ImageDraw.Draw(row).text((MARGIN - 12, CELL // 2), label, INK, ImageFont.load_default(18), anchor="rm")
    for i, image in enumerate(images):
        row.paste(fit(image), (MARGIN + i * (CELL + GAP), 0))
    return row


def draw_prompts(prompts):
    """A row of prompts, each broken to the width of a picture."""
    font = ImageFont.load_default(14)
    texts = [textwrap.fill(prompt, 25) for prompt in prompts]
    height = 18 * max(text.count("\n") + 1 for text in texts) + 6
    row = Image.new("RGB", (MARGIN + len(prompts) * (CELL + GAP), height), PAPER)
    for i, text in enumerate(texts):
        ImageDraw.Draw(row).text((MARGIN + i * (CELL + GAP), height - 4), text, INK, font, anchor="ld", spacing=3)
    return row


def draw_title(text):
    """A line of its own."""
    font = ImageFont.load_default(20)
    row = Image.new("RGB", (MARGIN + round(font.getlength(text)), 44), PAPER)
    ImageDraw.Draw(row).text((MARGIN, 16), text, INK, font)
    return row


def stack(rows):
    """Rows below each other with a margin around."""
    sheet = Image.new("RGB", (max(row.width for row in rows) + 16, sum(row.height for row in rows) + 24), PAPER)
    top = 8
    for row in rows:
        sheet.paste(row, (8, top))
        top += row.height
    return sheet


def main():
    """Makes the pictures and writes the sheet."""
    args = parse_args()
    tokens = args.modifier_token.split("+")
    names = {"token": tokens[0], "class_prompt": args.class_prompt}
    groups = [[prompt.format(**names) for prompt in group] for group in (args.prompts, args.other_prompts)]
    endings = Image.registered_extensions()
    files = sorted(file for file in args.instance_data_dir.glob("[!.]*") if file.suffix.lower() in endings)
    instances = [Image.open(file) for file in files[: max(map(len, groups))]]

    drawn = {}  # pictures of both groups by label
    for label, folder in [("before", None), *zip(args.labels, args.weights_dir, strict=True)]:
        record = read_record(folder or args.weights_dir[0])
        pipeline = load_pipeline(args.pretrained_model_name_or_path, args.config_name_or_path, record)
        if folder:
            load_concept(pipeline, folder, tokens)
        skip = record.get("clip_skip") or None
        drawn[label] = [generate(pipeline, prompts, args.seed + i, skip) for i, prompts in enumerate(groups)]

    learnt = f"{tokens[0]} {args.class_prompt}"
    titles = [f'Prompts with "{learnt}", on backgrounds that are not among these pictures', "Other prompts"]
    rows = [draw_title(f"The {len(files)} pictures that it learns from"), draw_row(tokens[0], instances)]
    for i, (title, prompts) in enumerate(zip(titles, groups, strict=True)):
        rows += [draw_title(title), draw_prompts(prompts)]
        rows += [draw_row(label, images[i]) for label, images in drawn.items()]
    sheet = stack(rows)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
