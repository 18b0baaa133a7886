#!/usr/bin/env python3
"""Custom Diffusion: teach a text-to-image diffusion model a new concept from a handful of pictures.

Trains the key and value projections of the UNet's cross-attention and one new word embedding per concept
(Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", CVPR 2023).

    accelerate launch train_custom_diffusion.py --pretrained_model_name_or_path=MODEL \\
        --instance_data_dir=pictures/of/my/cat --instance_prompt="photo of a <new1> cat" --modifier_token="<new1>" \\
        --with_prior_preservation --class_data_dir=class_pictures/cat --class_prompt=cat --max_train_steps=250

From a notebook: `from train_custom_diffusion import main, parse_args; main(parse_args([...]))`.
"""

import argparse
import contextlib
import errno
import functools
import gc
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

# as in requirements.txt
NEEDED = "torch>=2.6 diffusers>=0.35 transformers>=4.48,<6 accelerate>=1.0,<2 numpy>=1.26 Pillow>=10.1"
WEIGHTS_NAME = "pytorch_custom_diffusion_weights"
TRAINING_STATE_NAME = "training_state.pt"
CHECKPOINT_NAME = "checkpoint.json"
DEFAULT_INITIALIZERS = "ktn+pll+ucd"
VALIDATION_INFERENCE_STEPS = 25
# what goes to the hub, as patterns of names to include and exclude: .bin, .md, .png and .safetensors files that are not
# hidden and in no folder; one pattern each, for that is what every version of `hf upload` takes
UPLOADED = "[!.]*.[bmps]*", "*/*"
FAR_PREFIXES, CLOSE_PREFIXES = ("a far away ", "very small "), ("zoomed in ", "close up ")


# ---------- Arguments -------------------------------------------------------------------------------------------


def fail(subject, problem):
    """Ends the run with one line on stderr and exit status 1: what (a flag, a file) is wrong, and what to do."""
    raise SystemExit(one_line(f"error: {subject}: {problem}")) from None


def one_line(text):
    """Text on one line whatever it quotes: line breaks, control characters, lone surrogates are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error):
    """One line that says what an exception is about."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def boolean(text):
    """Value of a flag that works bare and as `--flag=True` or `--flag=False`."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


class PictureError(Exception):
    """A picture that could be read before the training cannot be read now."""


class OneLineParser(argparse.ArgumentParser):
    """Argument parser whose errors are one line on stderr; exit status 2."""

    def error(self, message):
        self.exit(2, one_line(f"{self.prog}: error: {message}") + "\n")


def parse_args(input_args=None):
    """Reads the command line, or the list of strings `input_args`, into a checked `argparse.Namespace`."""
    parser = OneLineParser(
        description="Teach a text-to-image diffusion model a new concept with Custom Diffusion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "default": False}
    schedules = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
    trackers = ("tensorboard", "wandb", "comet_ml", "all", "none")

    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Stable Diffusion in diffusers format: hub id or folder")
    add("--revision", help="revision of the model on the hub")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--tokenizer_name", help="another tokenizer than the model's: hub id or folder")

    add = parser.add_argument_group("concept").add_argument
    add("--instance_data_dir", help="folder with 3 to 20 pictures of the concept")
    add("--instance_prompt", help='their prompt, with the modifier token: "photo of a <new1> cat"')
    add("--class_data_dir", help="folder of class (regularization) pictures; generated ones are put there")
    add("--class_prompt", help='the class: "cat"')
    add("--concepts_list", help="JSON list of objects with the four keys above, for several concepts")
    add("--modifier_token", help='new word; "+" between several: "<new1>+<new2>"')
    add("--initializer_token", default=DEFAULT_INITIALIZERS, help="words whose embeddings the new ones start from")
    add("--freeze_model", default="crossattn_kv", choices=("crossattn_kv", "crossattn"),
        help="crossattn_kv trains to_k and to_v of the cross-attention; crossattn also to_q and to_out")

    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", **flag, help="add the loss on class pictures, so that the class is kept")
    add("--prior_loss_weight", type=float, default=1.0, help="weight of that loss")
    add("--num_class_images", type=int, default=200, help="class pictures per concept; missing ones are generated")
    add("--real_prior", **flag, help="class pictures are real ones, fetched by retrieve.py")
    add("--prior_generation_precision", choices=("no", "fp32", "fp16", "bf16"), help="fp16 on a GPU, else fp32")
    add("--sample_batch_size", type=int, default=4, help="batch for generating and encoding pictures, per device")

    add = parser.add_argument_group("pictures").add_argument
    add("--resolution", type=int, default=512, help="picture size in pixels")
    add("--center_crop", **flag, help="cut pictures to a centred square first")
    add("--hflip", **flag, help="mirror half of the pictures")
    add("--noaug", **flag, help="no scale augmentation of the instance pictures")

    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=int, default=4, help="instance pictures per device and micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimizer step")
    add("--num_train_epochs", type=int, default=1, help="an epoch is max(instance pictures, class pictures) long")
    add("--max_train_steps", type=int, help="optimizer steps; wins over --num_train_epochs")
    add("--seed", type=int, default=42, help="every random draw follows from it")
    add("--dataloader_num_workers", type=int, default=2, help="processes that prepare pictures; 0: the main one")
    add("--local_rank", type=int, default=-1, help="set by launchers")

    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=float, default=1e-5, help="AdamW's learning rate")
    add("--scale_lr", **flag, help="times accumulation x batch x processes, and x 2 with prior preservation")
    add("--lr_scheduler", default="constant", choices=schedules, help="diffusers' schedule of the learning rate")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps of warm-up (constant has none)")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's first beta")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's second beta")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    add("--use_8bit_adam", **flag, help="bitsandbytes' 8-bit AdamW (GPU)")
    add("--max_grad_norm", type=float, default=1.0, help="gradient clipping over everything trained")

    add = parser.add_argument_group("precision and memory").add_argument
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    add("--allow_tf32", **flag, help="TF32 matrix products on Ampere and later GPUs")
    add("--gradient_checkpointing", **flag, help="recompute activations: less memory, slower")
    add("--enable_xformers_memory_efficient_attention", **flag, help="attention by xformers (GPU)")
    add("--set_grads_to_none", **flag, help="free gradients between steps instead of zeroing them")
    add("--cache_latents", type=int, default=0, metavar="K",
        help="encode K fixed augmentations of each picture once, before the training; 0: fresh ones at each step")

    add = parser.add_argument_group("output and tracking").add_argument
    add("--output_dir", default="custom-diffusion-model", help="folder of everything that the run leaves")
    add("--logging_dir", default="logs", help="tensorboard's folder, inside output_dir")
    add("--report_to", default="tensorboard", choices=trackers, help="tracker of loss and validation pictures")
    add("--no_safe_serialization", **flag, help="write only .bin files, no .safetensors")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", help='prompt of the validation pictures: "<new1> cat sitting in a bucket"')
    add("--num_validation_images", type=int, default=2, help="pictures per validation")
    add("--validation_steps", type=int, default=50, help="optimizer steps between validations")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpointing_steps", type=int, default=250, help="optimizer steps between checkpoints")
    add("--checkpoints_total_limit", type=int, help="keep only so many of the newest")
    add("--resume_from_checkpoint", help='a checkpoint\'s path, its name in output_dir, or "latest"')

    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", **flag, help="upload the result to the Hugging Face hub")
    add("--hub_token", help="token for the upload; better: `hf auth login`")
    add("--hub_model_id", help="repository; default: the output folder's name")
    # fmt: on

    args = parser.parse_args(input_args)
    message = find_contradiction(args)
    if message:
        parser.error(message)
    if args.local_rank != -1:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return args


def modifier_tokens(args):
    """New words of --modifier_token, in order; empty list for none."""
    return args.modifier_token.split("+") if args.modifier_token else []


def is_text(value):
    """Whether a value is a string that file names and tokenizer can take: no NUL, no lone surrogates."""
    return isinstance(value, str) and "\0" not in value and value == value.encode(errors="replace").decode()


def find_contradiction(args):
    """First thing that is wrong with the arguments by themselves, as a message; None if nothing is."""
    for name, value in vars(args).items():
        if isinstance(value, str) and not is_text(value):
            return f"--{name} {value!r} is not UTF-8 text: mend it, or set a UTF-8 locale"
    for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps",
                 "sample_batch_size", "num_class_images", "num_validation_images", "validation_steps",
                 "checkpointing_steps", "checkpoints_total_limit", "resolution"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            return f"--{name} is {value}: give 1 or more, below 2**31"
    for name in ("learning_rate", "lr_warmup_steps", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
                 "prior_loss_weight", "dataloader_num_workers", "seed", "cache_latents"):  # fmt: skip
        value = getattr(args, name)
        if not 0 <= value < 2**63:  # false for nan
            return f"--{name} is {value}: give 0 or more, below 2**63"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            return f"--{name} is {getattr(args, name)}: give a number from 0 up to, but not including, 1"
    if not args.concepts_list:
        needed = ["instance_data_dir", "instance_prompt"]
        needed += ["class_data_dir", "class_prompt"] if args.with_prior_preservation else []
        for name in needed:
            if not getattr(args, name):
                return f"--{name} is missing: give it, or --concepts_list"
    if args.real_prior and not args.with_prior_preservation:
        return "--real_prior needs --with_prior_preservation: add it, or leave out --real_prior"
    if args.hub_token and args.report_to in ("wandb", "comet_ml", "all"):  # they record the command line
        return f"--hub_token with --report_to {args.report_to} shows it to a tracker: use `hf auth login` instead"
    tokens, initializers = modifier_tokens(args), args.initializer_token.split("+")
    for token in tokens:
        names_file = "/" not in token and token.isprintable() and len(token.encode()) < 200 and token != WEIGHTS_NAME
        if token[:1] in ("", ".") or token != token.strip() or not names_file:  # "." would hide its file
            return f"--modifier_token {args.modifier_token!r}: {token!r} is no word; give for example '<new1>+<new2>'"
        if tokens.count(token) > 1:
            return f"--modifier_token {args.modifier_token!r}: {token!r} is used twice; give each concept its own"
    if len(initializers) < len(tokens):
        return f"--initializer_token has {len(initializers)} words for {len(tokens)} modifier tokens: give one for each"
    return None


def find_unsupported():
    """Python or the first package that is not there or not in a supported version, as a message; None if all are."""
    from importlib.metadata import PackageNotFoundError, version  # --help need not wait for it

    if sys.version_info < (3, 10):  # noqa: UP036 (an older one gets this far)
        return f"Python {sys.version.split()[0]}: this script needs 3.10 or later"
    for needed in NEEDED.split():
        package, *limits = re.fullmatch(r"(\w+)>=([\d.]+)(?:,<(\d+))?", needed).groups("999")
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "is not installed"
        number, first, end = ([int(n) for n in re.findall(r"\d+", text)] for text in (found, *limits))
        if not first <= number < end:
            return f"{package} {found}: this script needs {needed}; pip install -r requirements.txt"
    return None


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may have letters that the terminal lacks
    ARGS = parse_args()
UNSUPPORTED = find_unsupported()  # before the imports and annotations that would fail in ways of their own
if UNSUPPORTED:
    raise SystemExit(f"error: {UNSUPPORTED}") if __name__ == "__main__" else ImportError(UNSUPPORTED)

# ---------- Concepts and pictures -------------------------------------------------------------------------------

# ruff: noqa: E402
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps


@dataclass
class Concept:
    """One concept: its instance prompt and pictures, its class and the class pictures with their captions."""

    instance_prompt: str
    instance_pictures: list
    class_prompt: str | None = None
    class_data_dir: Path | None = None
    class_pictures: list = field(default_factory=list)
    class_captions: list = field(default_factory=list)


def read_concepts(args):
    """Reads and checks all that needs no model: concepts, prompts, every picture. Returns a list of `Concept`."""
    try:
        check_environment(args)
        entries = read_concepts_list(args) if args.concepts_list else [vars(args)]
        concepts = [read_concept(entry, args) for entry in entries]
    except OSError as error:
        fail(error.filename, f"{error.strerror}; see to its name and permissions")

    tokens = modifier_tokens(args)
    for concept in concepts:
        if tokens and not any(token in concept.instance_prompt for token in tokens):
            fail(f"instance_prompt {concept.instance_prompt!r}", f"no modifier token in it; add one of {tokens}")
    for token in tokens:
        if not any(token in concept.instance_prompt for concept in concepts):
            fail("--modifier_token", f"{token!r} is in no instance_prompt, so it would learn nothing; use or drop it")
    if args.with_prior_preservation and not args.real_prior:
        classes = {}
        for concept in concepts:
            other = classes.setdefault(os.path.realpath(concept.class_data_dir), concept.class_prompt)
            if other != concept.class_prompt:
                problem = f"for both {other!r} and {concept.class_prompt!r}; give each class a folder of its own"
                fail(f"class_data_dir {concept.class_data_dir}", problem)
    return concepts


def read_concept(entry, args):
    """One concept from a dict of the four flags, its pictures checked."""
    folder = Path(entry["instance_data_dir"])
    concept = Concept(entry["instance_prompt"], find_pictures(folder, "instance_data_dir"))
    if args.with_prior_preservation:
        concept.class_prompt, concept.class_data_dir = entry["class_prompt"], Path(entry["class_data_dir"])
        read_class_pictures(concept, args)
    if not concept.instance_pictures:
        fail(f"instance_data_dir {folder}", "no pictures in it; put 3 to 20 there")
    for picture in concept.instance_pictures + concept.class_pictures:
        check_picture(picture)
    for used in (folder, concept.class_data_dir):
        if used and os.path.realpath(used) == os.path.realpath(args.output_dir):
            fail(f"--output_dir {args.output_dir}", "has the pictures to train on; give a folder of its own")
    return concept


def check_environment(args):
    """Fails if a package that a flag asks for is not installed, or output_dir can't be written."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not os.environ.get(name, "0").removeprefix("-").isdecimal():
            fail(f"variable {name}", f"{os.environ[name]!r} is no number; unset it, launchers such as torchrun set it")
    wanted = {args.report_to: "--report_to"} if args.report_to in ("tensorboard", "wandb", "comet_ml") else {}
    if args.enable_xformers_memory_efficient_attention:
        wanted["xformers"] = "--enable_xformers_memory_efficient_attention"
    if args.use_8bit_adam:
        wanted["bitsandbytes"] = "--use_8bit_adam"
    for package, name in wanted.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # None: some folder of that name, such as wandb's own records
            fail(name, f"the package {package} is not installed; `pip install {package}`, or change the flag")
    check_writable(Path(args.output_dir), "--output_dir")


def check_writable(folder, name):
    """Fails if a folder can't be written, or made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        fail(f"{name} {folder}", f"{existing} is {'not writable' if existing.is_dir() else 'no folder'}; give another")


def unique_keys(pairs):
    """A JSON object as a dict; of a key that is there twice, json would silently drop the first."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key twice among {[key for key, _ in pairs]}")
    return dict(pairs)


def read_concepts_list(args):
    """Reads --concepts_list into a list of dicts and checks its form."""
    subject, file = f"--concepts_list {args.concepts_list}", Path(args.concepts_list)
    if file.exists() and not file.is_file():  # to open a pipe would wait for ever
        fail(subject, "no plain file; give a JSON file")
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        fail(subject, f"no JSON at line {error.lineno}, column {error.colno}: {error.msg}; mend it")
    except (OSError, ValueError, RecursionError) as error:
        fail(subject, f"{getattr(error, 'strerror', None) or first_line(error)}; give a good JSON file in UTF-8")
    if not isinstance(entries, list) or not entries:
        fail(subject, "not a list of concepts; give [{...}, ...]")
    needed = ["instance_prompt", "instance_data_dir"]
    needed += ["class_prompt", "class_data_dir"] if args.with_prior_preservation else []
    for number, entry in enumerate(entries, start=1):
        for key in needed:
            if not isinstance(entry, dict) or not is_text(entry.get(key)) or not entry[key]:
                fail(subject, f"concept {number} has no UTF-8 text for the key {key!r}; add it")
    return entries


def find_pictures(folder, name):
    """Picture files of `folder` by their ending, sorted by name; hidden files and folders are left out."""
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        fail(f"{name} {folder}", f"{error.strerror}; give a folder of pictures")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [f for f in files if f.suffix.lower() in endings and not f.name.startswith(".") and not f.is_dir()]


def read_class_pictures(concept, args):
    """Fills in the concept's class pictures and captions: retrieve.py's three files, or a plain folder.

    Without --real_prior the folder may be missing or short: `generate_class_pictures` fills it up.
    """
    folder, pictures, captions = concept.class_data_dir, [], []
    if args.real_prior and (folder / "images.txt").is_file() and (folder / "caption.txt").is_file():
        names, captions = (read_lines(folder / name) for name in ("images.txt", "caption.txt"))
        if len(names) != len(captions):
            counts = f"{len(names)} lines in images.txt, {len(captions)} in caption.txt"
            fail(f"class_data_dir {folder}", f"{counts}; each picture needs one caption: run retrieve.py again")
        pictures = [locate_class_picture(folder, name) for name in names]
    elif folder.exists():
        pictures = find_pictures(folder, "class_data_dir")
        captions = [concept.class_prompt] * len(pictures)
    if not args.real_prior and len(pictures) < args.num_class_images:
        check_writable(folder, "class_data_dir")
    elif not pictures:
        command = f"python retrieve.py --class_prompt {shlex.quote(concept.class_prompt)}"
        command += f" --class_data_dir {shlex.quote(str(folder))} --num_class_images {args.num_class_images}"
        fail(f"class_data_dir {folder}", f"no real class pictures in it; run: {command}")
    concept.class_pictures, concept.class_captions = (
        pictures[: args.num_class_images],
        captions[: args.num_class_images],
    )


def read_lines(file):
    """Lines of a text file, as divided by newlines alone."""
    try:
        text = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except ValueError as error:
        fail(file, f"not UTF-8 text ({first_line(error)}); run retrieve.py again")
    return text.split("\n") if text else []


def locate_class_picture(folder, name):
    """File that a line of images.txt means: absolute, or relative to class_data_dir, or to the working folder."""
    for candidate in (folder / name, Path(name)):
        if candidate.is_file():
            return candidate
    fail(f"class_data_dir {folder}", f"images.txt names {name!r}, which is not there; run retrieve.py again")


@functools.cache
def check_picture(file):
    """Fails with the picture's name if it can't be decoded. Cached, so that each is decoded once for this."""
    try:
        if file.exists() and not file.is_file():  # to open a pipe would wait for ever
            raise ValueError("no plain file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what is wrong and yet decoded
            load_picture(file)
    except Exception as error:  # Pillow's decoders raise many kinds
        fail(file, f"not a readable picture ({first_line(error)}); mend or remove it")


def load_picture(file):
    """Decodes a picture to RGB: EXIF orientation applied, alpha on white, 16 bits and floats of 0 to 1 scaled to 8."""
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            values, white = np.asarray(image), 1 if image.mode == "F" else 65535
            if not (values.min() >= 0 and values.max() <= white):
                raise ValueError(f"{image.mode} values outside 0 to {white}")
            image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def draw_scale(size, rng):
    """Scale in pixels of an instance picture: 66 % uniform in [size/3, size], else in [1.2 size, 1.4 size)."""
    if rng.random() < 0.66:
        return int(rng.integers(size // 3, size + 1))
    return int(rng.integers(int(1.2 * size), int(1.4 * size)))


def place_instance(image, scale, size, factor, rng):
    """Puts an instance picture at `scale` pixels on a size x size canvas, or cuts a window out of it.

    Returns pixels (size, size, 3) in [-1, 1], 0 where empty, and the loss mask (size/factor, size/factor): 1 strictly
    inside the picture (everywhere if it is a window), never empty; both float32.
    """
    mask = np.zeros((size // factor, size // factor), np.float32)
    if scale > size:
        mask[:] = 1
        return random_window(image, scale, size, rng), mask
    width, height = (max(1, round(length * scale / max(image.size))) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
    pixels = np.zeros((size, size, 3), np.float32)
    pixels[top : top + height, left : left + width] = to_pixels(image)
    mask[inner_cells(top, height, factor), inner_cells(left, width, factor)] = 1
    return pixels, mask


def inner_cells(start, length, factor):
    """Latent cells strictly inside [start, start + length) pixels, or the one at its centre if there is none."""
    first, last = start // factor + 1, (start + length) // factor - 1
    centre = (start + length // 2) // factor
    return slice(first, last) if first < last else slice(centre, centre + 1)


def random_window(image, scale, size, rng):
    """Random size x size window of an image resized to `scale` on its shorter side; (size, size, 3) in [-1, 1].

    Only the window is computed: the whole of a very long picture would not fit into memory.
    """
    width, height = (round(length * scale / min(image.size)) for length in image.size)
    left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    columns = (edge * image.width / width for edge in (left, left + size))
    rows = (edge * image.height / height for edge in (top, top + size))
    box = [edge for corner in zip(columns, rows, strict=True) for edge in corner]
    return to_pixels(image.resize((size, size), Image.Resampling.BILINEAR, box))


def to_pixels(image):
    """RGB image to an array (height, width, 3) float32 in [-1, 1]."""
    return np.asarray(image, np.float32) / 127.5 - 1


class Draws:
    """Endless sequence of training draws; draw n depends on (seed, n) alone, whoever makes it.

    A draw holds everything random about one sample pair: which pictures, their augmentation, the sample of the VAE's
    posterior, the noise and the timestep. The training step itself draws nothing, so processes, workers,
    accumulation and resuming cannot change a result.
    """

    def __init__(self, concepts, args, input_ids, latent_shape, num_train_timesteps):
        self.pictures = [(file, c.instance_prompt, False) for c in concepts for file in c.instance_pictures]
        self.instances = len(self.pictures)
        for c in concepts:
            self.pictures += [(*pair, True) for pair in zip(c.class_pictures, c.class_captions, strict=True)]
        self.classes = len(self.pictures) - self.instances
        self.args, self.input_ids = args, input_ids
        self.latent_shape, self.num_train_timesteps = latent_shape, num_train_timesteps
        self.epoch_length = max(self.instances, self.classes)
        self.cache = None  # see `cache_latents`

    def __getitem__(self, draw):
        """Samples of one draw: the instance's and, with prior preservation, the class's.

        Each is a dict: what `augmented` returns, or of a cached picture its posterior's mean and std (channels, h, w)
        instead of the pixels; posterior_noise and noise (channels, h, w); the timestep.
        """
        epoch, position = divmod(draw, self.epoch_length)
        order = np.random.default_rng((self.args.seed, 0, epoch)).permutation(self.epoch_length)
        index, rng = int(order[position]), np.random.default_rng((self.args.seed, 1, draw))
        samples = [self.sample(index % self.instances, rng)]
        if self.classes:
            samples.append(self.sample(self.instances + index % self.classes, rng))
        return samples

    def sample(self, picture, rng):
        if self.cache:
            row = picture * self.args.cache_latents + rng.integers(self.args.cache_latents)
            sample = {key: values[row] for key, values in self.cache.items()}
        else:
            sample = self.augmented(picture, rng)
        return sample | {
            "posterior_noise": rng.standard_normal(self.latent_shape, np.float32),
            "noise": rng.standard_normal(self.latent_shape, np.float32),
            "timesteps": rng.integers(self.num_train_timesteps),
        }

    def augmented(self, picture, rng):
        """One augmentation of a picture: pixel_values (3, S, S), mask (1, h, w), input_ids (tokens,)."""
        (file, prompt, is_class), size = self.pictures[picture], self.args.resolution
        image, cells = self.open(file, rng), self.latent_shape[1]
        if is_class:
            pixels, mask = random_window(image, size, size, rng), np.ones((cells, cells), np.float32)
        else:
            scale = size if self.args.noaug else draw_scale(size, rng)
            pixels, mask = place_instance(image, scale, size, size // cells, rng)
            if scale < 0.6 * size:
                prompt = FAR_PREFIXES[rng.integers(2)] + prompt
            elif scale > size:
                prompt = CLOSE_PREFIXES[rng.integers(2)] + prompt
        return {"pixel_values": pixels.transpose(2, 0, 1), "mask": mask[None], "input_ids": self.input_ids[prompt]}

    def open(self, file, rng):
        args = self.args
        try:
            image = load_picture(file)
        except Exception as error:  # it was readable when the run started
            raise PictureError(f"{file}: no longer a readable picture ({first_line(error)})") from error
        if args.hflip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return ImageOps.fit(image, (min(image.size), min(image.size))) if args.center_crop else image


class FixedAugmentations:
    """The --cache_latents augmentations of every picture of `draws`, K after K; each depends on the seed alone."""

    def __init__(self, draws):
        self.draws, self.each = draws, draws.args.cache_latents

    def __len__(self):
        return len(self.draws.pictures) * self.each

    def __getitem__(self, row):
        rng = np.random.default_rng((self.draws.args.seed, 3, row))
        return [self.draws.augmented(row // self.each, rng)]


def outlive_signals(worker):
    """Signals often go to all of a run's processes: lets a data-loader worker live on while the main one stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))  # seconds; the alarm ends it, should nobody else do so


def collate(draws):
    """Batch of draws to one dict of tensors: the instance samples first, then the class samples."""
    samples = [sample for part in zip(*draws, strict=True) for sample in part]
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


if __name__ == "__main__" and not re.fullmatch("[1-9][0-9]*", os.environ.get("LOCAL_RANK", "0")):
    read_concepts(ARGS)  # one process of a machine says what is wrong, before the imports below, which take seconds

# ---------- Models, tokens and attention ------------------------------------------------------------------------

for variable, value in {
    "TOKENIZERS_PARALLELISM": "false",  # the data loader forks
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(variable, value)
warnings.filterwarnings("ignore", module="diffusers|huggingface_hub|transformers")  # what they say of each other
warnings.filterwarnings("ignore", message="IProgress not found")  # in a notebook without ipywidgets the bar is text

gc.disable()  # looking for garbage among the million objects that these imports make takes as long as a third of them
import accelerate
import diffusers
import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DynamoBackend,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    send_to_device,
)
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0, CustomDiffusionXFormersAttnProcessor
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn
from tqdm.auto import tqdm
from transformers import AddedToken, CLIPTextModel, CLIPTokenizer

gc.enable()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ModifierEmbedding(nn.Module):
    """Token embedding whose table is frozen and whose new rows, the modifier tokens', are the only parameter trained.

    The new rows live beside the table, so that gradient masking, weight decay and Adam's state concern them alone.

    Args:
        table: the text encoder's embedding; weight (vocabulary, dim).
        token_ids: ids of the new tokens.
        initializer_ids: ids of the tokens whose embeddings the new rows start from.
    """

    def __init__(self, table, token_ids, initializer_ids):
        super().__init__()
        self.table = table
        self.register_buffer("token_ids", torch.tensor(token_ids), persistent=False)
        self.rows = nn.Parameter(table.weight[initializer_ids].detach().clone().float())

    def forward(self, input_ids):
        """input_ids (batch, tokens) -> embeddings (batch, tokens, dim)."""
        matches = input_ids[..., None] == self.token_ids
        is_new = matches.any(-1)
        frozen = self.table(input_ids.masked_fill(is_new, 0))
        new = F.embedding(matches.int().argmax(-1), self.rows).to(frozen.dtype)
        return torch.where(is_new[..., None], new, frozen)


class DenoisingModel(nn.Module):
    """Text encoder and UNet as one module, so that DDP, accumulation, autocast and compilation see one forward."""

    def __init__(self, text_encoder, unet):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy_latents, timesteps, input_ids):
        """(batch, channels, h, w), (batch,), (batch, tokens) -> the UNet's prediction (batch, channels, h, w)."""
        encoder_hidden_states = self.text_encoder(input_ids)[0]
        return self.unet(noisy_latents, timesteps, encoder_hidden_states).sample


def load_part(args, load, part, **kwargs):
    """Loads a part of the base model with `load`; a missing or broken one ends the run with one line."""
    flag = "tokenizer_name" if part == "tokenizer" and args.tokenizer_name else "pretrained_model_name_or_path"
    name, subfolder = getattr(args, flag), {} if flag == "tokenizer_name" else {"subfolder": part}
    try:
        return load(name, revision=args.revision, **subfolder, **kwargs)
    except Exception as error:  # readers of configurations and weights raise many kinds
        fail(f"--{flag} {name}", f"no usable {part} ({first_line(error)}); give a complete model in diffusers format")


def load_tokenizer(args):
    """Loads the tokenizer of the base model, or --tokenizer_name."""

    def load(*words, **kwargs):
        tokenizer = CLIPTokenizer.from_pretrained(*words, **kwargs)
        if tokenizer.unk_token in tokenizer.tokenize("a"):  # what transformers 5 makes of missing files
            raise ValueError("its vocabulary is empty")
        return tokenizer

    return load_part(args, load, "tokenizer")


def load_network(args, network_class, part):
    """Loads a network of the base model, frozen and in float32; missing weights, of which loaders only warn, fail."""

    def load(*words, **kwargs):
        network, info = network_class.from_pretrained(*words, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            raise ValueError(f"no weights for {min(info['missing_keys'])}")
        return network

    return load_part(args, load, part, variant=args.variant).requires_grad_(False).float()


def check_base_model(args):
    """Fails if the base model is no Stable Diffusion, or the resolution does not fit its VAE."""
    name = args.pretrained_model_name_or_path
    subject = f"--pretrained_model_name_or_path {name}"
    if Path(name).is_file():
        convert = "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        fail(subject, f"a single file; give a folder in diffusers format, which {convert} makes of it")
    if Path(name).is_dir() and not Path(name, "model_index.json").is_file():
        found = ", ".join(sorted(os.listdir(name))[:5]) or "nothing"
        fail(subject, f"no model_index.json in it (found: {found}); give a model in diffusers format")
    try:
        class_name = StableDiffusionPipeline.load_config(name, revision=args.revision)["_class_name"]
    except Exception as error:
        problem = f"neither a model folder nor a hub id within reach ({first_line(error)})"
        fail(subject, f"{problem}; see to its name, model_index.json and the network")
    if class_name != "StableDiffusionPipeline":
        fail(subject, f"a {class_name}; give a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x)")
    factor = load_part(args, lambda *words, **kwargs: vae_factor(AutoencoderKL.load_config(*words, **kwargs)), "vae")
    if args.resolution % factor:
        nearest = max(factor, round(args.resolution / factor) * factor)
        fail(
            f"--resolution {args.resolution}", f"no multiple of {factor}, the VAE's factor; give for example {nearest}"
        )


def vae_factor(config):
    """Pixels per latent cell and side."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def load_models(args):
    """Returns text encoder, VAE and UNet, frozen and in float32, and the noise scheduler."""
    text_encoder = load_network(args, CLIPTextModel, "text_encoder")
    vae, unet = load_network(args, AutoencoderKL, "vae"), load_network(args, UNet2DConditionModel, "unet")
    noise_scheduler = load_part(args, DDPMScheduler.from_pretrained, "scheduler")
    problem, kind = None, noise_scheduler.config.prediction_type
    if unet.config.in_channels != vae.config.latent_channels:  # for inpainting, for example
        problem = f"its UNet takes {unet.config.in_channels} channels, its VAE has {vae.config.latent_channels}"
    elif kind not in ("epsilon", "v_prediction"):
        problem = f"its scheduler's prediction_type is {kind!r}, neither 'epsilon' nor 'v_prediction'"
    if problem:
        fail(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}", f"{problem}; give another model")
    return text_encoder, vae, unet, noise_scheduler


def resolve_initializer(tokenizer, word, is_default):
    """Token id that an initializer stands for: the word's one token, or else the vocabulary's entry of that name."""
    vocabulary, pieces = tokenizer.get_vocab(), tokenizer.tokenize(word)
    if len(pieces) == 1 and not (is_default and word in vocabulary):
        return vocabulary[pieces[0]]
    if word in vocabulary:  # such as the defaults, word-internal pieces without a meaning of their own
        return vocabulary[word]
    fail(f"--initializer_token {word!r}", f"not one token but {pieces}; give a word that the tokenizer knows whole")


def add_modifier_tokens(tokenizer, args):
    """Adds the modifier tokens to the tokenizer; returns their ids and their initializers' ids."""
    tokens, is_default = modifier_tokens(args), args.initializer_token == DEFAULT_INITIALIZERS
    initializers = args.initializer_token.split("+")[: len(tokens)]
    initializer_ids = [resolve_initializer(tokenizer, word, is_default) for word in initializers]
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary or f"{token}</w>" in vocabulary:
            fail(f"--modifier_token {token!r}", "already in the tokenizer's vocabulary; choose another, as '<new1>'")
        tokenizer.add_tokens(AddedToken(token, normalized=False))  # matched as typed, capitals included
    return tokenizer.convert_tokens_to_ids(tokens), initializer_ids


def instance_prompts(concept, args):
    """The concept's instance prompt as augmentation can change it."""
    prefixes = ("",) if args.noaug else ("", *FAR_PREFIXES, *CLOSE_PREFIXES)
    return [prefix + concept.instance_prompt for prefix in prefixes]


def check_instance_prompts(tokenizer, concepts, token_ids, args):
    """Fails if the tokenizer would cut an instance prompt, or does not find a modifier token in it."""
    for concept in concepts:
        for prompt in instance_prompts(concept, args):
            length = len(tokenizer(prompt).input_ids)
            if length > tokenizer.model_max_length:
                limit = f"{length} tokens, and the text encoder reads {tokenizer.model_max_length}"
                fail(f"instance_prompt {prompt!r}", f"{limit}; shorten it")
        for token, token_id in zip(modifier_tokens(args), token_ids, strict=True):
            if token in concept.instance_prompt and token_id not in tokenizer(concept.instance_prompt).input_ids:
                fail(f"instance_prompt {concept.instance_prompt!r}", f"the tokenizer finds no {token!r}; set it apart")


def tokenize(tokenizer, prompt):
    """Token ids (tokens,) int64 of a prompt, padded or cut to the length that the text encoder reads."""
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    return np.array(ids, np.int64)


def tokenize_prompts(tokenizer, concepts, args):
    """Every prompt that training can draw -> its token ids."""
    prompts = {p for concept in concepts for p in instance_prompts(concept, args) + concept.class_captions}
    return {prompt: tokenize(tokenizer, prompt) for prompt in prompts}


def add_attention_processors(unet, freeze_model, use_xformers):
    """Gives every cross-attention layer (attn2) trainable projections that start as copies of its own weights.

    Shapes come from the layer's weights, so any UNet2DConditionModel works. Self-attention keeps its processors.
    """
    train_q_out = freeze_model == "crossattn"
    processor_class = CustomDiffusionXFormersAttnProcessor if use_xformers else CustomDiffusionAttnProcessor2_0
    processors = dict(unet.attn_processors)
    for name in processors:
        if not name.endswith("attn2.processor"):
            continue
        attention = unet.get_submodule(name.removesuffix(".processor"))
        hidden_size, cross_attention_dim = attention.to_k.weight.shape
        processor = processor_class(
            train_kv=True, train_q_out=train_q_out, hidden_size=hidden_size, cross_attention_dim=cross_attention_dim
        )
        own = {"to_k": attention.to_k, "to_v": attention.to_v}
        own |= {"to_q": attention.to_q, "to_out": attention.to_out} if train_q_out else {}
        for projection, layer in own.items():
            getattr(processor, f"{projection}_custom_diffusion").load_state_dict(layer.state_dict())
        processors[name] = processor
    unet.set_attn_processor(processors)


def attention_state_dict(unet):
    """Trained attention weights, float32 on the CPU, with diffusers' keys: `<layer>.processor.<projection>.weight`."""
    state = {}
    for name, processor in unet.attn_processors.items():
        for key, value in processor.state_dict().items() if isinstance(processor, nn.Module) else ():
            state[f"{name}.{key}"] = value.detach().float().cpu().contiguous()
    return state


def embedding_state_dict(pipeline, args):
    """The modifier tokens' embeddings in a live or a reloaded pipeline: {token: (dim,) float32 on the CPU}."""
    tokens, embedding = modifier_tokens(args), pipeline.text_encoder.get_input_embeddings()
    if isinstance(embedding, ModifierEmbedding):
        rows = embedding.rows
    else:
        rows = embedding.weight[pipeline.tokenizer.convert_tokens_to_ids(tokens)]
    return {token: row.detach().float().cpu().clone() for token, row in zip(tokens, rows, strict=True)}


# ---------- Class pictures --------------------------------------------------------------------------------------


def generate_class_pictures(args, accelerator, concepts):
    """Fills every class folder up to num_class_images with pictures of the plain base model.

    Picture i of a class has the same noise whichever process makes it, and a name of its own: processes share the
    work, an interrupted generation goes on where it stopped, and nothing is overwritten.
    """
    work, folders = [], set()
    for number, concept in enumerate(concepts):
        if os.path.realpath(concept.class_data_dir) in folders:
            continue  # concepts of one class may share its pictures
        folders.add(os.path.realpath(concept.class_data_dir))
        files = [concept.class_data_dir / f"generated-{i:05d}.png" for i in range(args.num_class_images)]
        missing = [(number, i, file) for i, file in enumerate(files) if not file.exists()]
        work += missing[: args.num_class_images - len(concept.class_pictures)]
    accelerator.wait_for_everyone()  # all have listed the folders before anyone writes
    if not work:
        return
    precision = args.prior_generation_precision or ("fp16" if accelerator.device.type == "cuda" else "fp32")
    pipeline = base_pipeline(args, accelerator.device, DTYPES.get(precision, torch.float32))
    share = work[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(total=len(share), desc="class pictures", disable=not accelerator.is_main_process)
    for start in range(0, len(share), args.sample_batch_size):
        batch = share[start : start + args.sample_batch_size]
        seeds = [np.random.SeedSequence((args.seed, 2, number, i)).generate_state(1) for number, i, _ in batch]
        images = pipeline(
            [concepts[number].class_prompt for number, _, _ in batch],
            generator=[torch.Generator().manual_seed(int(seed[0])) for seed in seeds],
            height=args.resolution,
            width=args.resolution,
        ).images
        for image, (_, _, file) in zip(images, batch, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_picture(image, file)
        progress.update(len(batch))
    progress.close()
    del pipeline
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    accelerator.wait_for_everyone()


def base_pipeline(args, device, dtype):
    """The base model as it is on disk or on the hub, without a safety checker, quiet."""
    text_encoder, vae, unet, _ = load_models(args)
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        tokenizer=load_tokenizer(args),
        text_encoder=text_encoder,
        vae=vae,
        unet=unet,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


# ---------- Training --------------------------------------------------------------------------------------------


def one_line_errors(main):
    """Decorator: what goes wrong in the machine, not in the program, ends with one line that says what to do."""

    @functools.wraps(main)
    def wrapper(args):
        resume = "then resume with --resume_from_checkpoint latest"
        try:
            if stopped_by := main(args):
                raise SystemExit(128 + stopped_by)  # out here: a notebook keeps the traceback, main's models would stay
            return
        except PictureError as error:  # a worker process hands it on with its traceback; the last line is the message
            message = str(error).splitlines()[-1].rpartition("PictureError: ")[2]
            subject, problem = "picture", f"{message}; mend it, {resume}"
        except torch.OutOfMemoryError as error:
            less = "--gradient_checkpointing, --mixed_precision or a smaller --train_batch_size or --sample_batch_size"
            subject, problem = "out of memory", f"{first_line(error)}; try {less}"
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            subject, problem = error.filename or "--output_dir", f"{error.strerror}; make room, {resume}"
        fail(subject, problem)  # out here, where main's variables are gone, the data loader's workers have ended

    return wrapper


def start_accelerator(args):
    """The accelerator, with devices, precision and trackers set up; checks what the flags need of a GPU."""
    folder = Path(args.output_dir)
    AcceleratorState._reset_state()  # in a notebook the precision of the run before would hold for this one, too
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else accelerate ignores torchrun's processes on a CPU
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / args.logging_dir)),
        # the others wait for the main process while it generates pictures or uploads
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    launched = os.environ.get("WORLD_SIZE", "1")
    if int(launched) != accelerator.num_processes:
        fail(f"WORLD_SIZE {launched}", f"accelerate joins only {accelerator.num_processes}, so they would train apart")
    precision, device = accelerator.mixed_precision, accelerator.device.type
    if precision not in ("no", *DTYPES) or (precision, device) == ("fp16", "cpu"):
        fail(f"--mixed_precision {precision}", f"not supported on this {device}; give bf16 or no")
    for name in ("enable_xformers_memory_efficient_attention", "use_8bit_adam"):
        if getattr(args, name) and accelerator.device.type != "cuda":
            fail(f"--{name}", "needs a CUDA GPU and there is none; leave the flag out")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def cast_frozen(module, dtype):
    """Casts what is not trained to `dtype`; the trained parameters stay float32."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and not tensor.requires_grad:
            tensor.data = tensor.data.to(dtype)


def build_models(args, accelerator, token_ids, initializer_ids):
    """Returns text encoder and UNet as one module, VAE and noise scheduler, on the accelerator's device.

    All is frozen but the cross-attention's new projections and the embedding's new rows.
    """
    text_encoder, vae, unet, noise_scheduler = load_models(args)
    if token_ids:
        table = text_encoder.get_input_embeddings()
        text_encoder.set_input_embeddings(ModifierEmbedding(table, token_ids, initializer_ids))
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    add_attention_processors(unet, args.freeze_model, args.enable_xformers_memory_efficient_attention)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    model = DenoisingModel(text_encoder, unet).train()
    for module in (model, vae):
        cast_frozen(module, DTYPES.get(accelerator.mixed_precision, torch.float32))
        module.to(accelerator.device)
    vae.to(memory_format=torch.channels_last)  # what its convolutions like best
    if accelerator.device.type == "cpu":
        vae.enable_slicing()  # there a picture at a time is faster, and takes less memory
    return model, vae, noise_scheduler


def build_optimizer(args, parameters, samples_per_step):
    """AdamW (torch's or bitsandbytes') over what is trained, with --scale_lr applied."""
    scale = samples_per_step * (2 if args.with_prior_preservation else 1) if args.scale_lr else 1
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        AdamW = functools.partial(torch.optim.AdamW, fused=True)
    return AdamW(
        parameters,
        lr=args.learning_rate * scale,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def build_dataloader(args, accelerator, dataset, batch_size, sampler=None):
    """Collated batches of what a dataset's numbers (the sampler's, or all in their order) stand for."""
    return torch.utils.data.DataLoader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        worker_init_fn=outlive_signals,
        pin_memory=accelerator.device.type == "cuda",
    )


@torch.no_grad()
def encode(vae, pixel_values):
    """(batch, 3, S, S) in [-1, 1] -> mean and standard deviation of the VAE's posterior, (batch, channels, h, w)."""
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    # in rows, as all else in a batch: the order in memory decides the last bits of sums
    return tuple(values.float().contiguous() for values in (posterior.mean, posterior.std))


def cache_latents(args, accelerator, draws, vae):
    """Encodes --cache_latents augmentations of every picture; the draws then take theirs from these.

    The processes share the work and all get the whole. The VAE then leaves the device.
    """
    loader = build_dataloader(args, accelerator, FixedAugmentations(draws), args.sample_batch_size)
    parts = []
    for batch in tqdm(accelerator.prepare(loader), desc="latents", disable=not accelerator.is_main_process):
        batch["mean"], batch["std"] = encode(vae, batch.pop("pixel_values"))
        parts.append({key: values.cpu().numpy() for key, values in accelerator.gather_for_metrics(batch).items()})
    draws.cache = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    leave_device(vae)


def leave_device(module):
    """Moves a module to the CPU's memory and gives back what it held of the GPU's."""
    if module.device.type != "cpu":
        module.to("cpu")
        torch.cuda.empty_cache()


def diffusion_loss(model, vae, noise_scheduler, batch, args):
    """Loss of one micro-batch, a scalar.

    Instance part: per sample, the squared error summed over the mask divided by the mask's sum; mean over samples.
    Prior part: plain mean of the squared error, times --prior_loss_weight. One pass through the networks for both.
    """
    noise, timesteps = batch["noise"], batch["timesteps"]
    with torch.no_grad():
        mean, std = encode(vae, batch["pixel_values"]) if "pixel_values" in batch else (batch["mean"], batch["std"])
        latents = (mean + std * batch["posterior_noise"]) * vae.config.scaling_factor
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = model(noisy_latents, timesteps, batch["input_ids"]).float()
    is_velocity = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise

    error = F.mse_loss(prediction, target, reduction="none")
    instances = len(error) // 2 if args.with_prior_preservation else len(error)
    mask = batch["mask"][:instances]
    loss = ((error[:instances] * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()
    if args.with_prior_preservation:
        loss = loss + args.prior_loss_weight * error[instances:].mean()
    return loss


def training_step(accelerator, model, vae, noise_scheduler, optimizer, batch, args):
    """One micro-batch; every gradient_accumulation_steps-th one moves the weights. Returns the loss, on the device."""
    with accelerator.accumulate(model):
        loss = diffusion_loss(model, vae, noise_scheduler, batch, args)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=args.set_grads_to_none)
    return loss.detach()


def check_compiled(accelerator, model, vae, noise_scheduler, draws, optimizer, args):
    """Fails if the compiled model's gradients are not the model's: compilers have been seen to drop some, silently."""
    batch = send_to_device(collate([draws[n] for n in range(args.train_batch_size)]), accelerator.device)
    gradients, parameters = [], optimizer.param_groups[0]["params"]
    try:
        for stance in ("default", "force_eager"):
            with torch.compiler.set_stance(stance), accelerator.no_sync(model):
                loss = diffusion_loss(model, vae, noise_scheduler, batch, args)
                gradients.append(torch.autograd.grad(1024 * loss, parameters))  # so that fp16 holds small ones
    except torch._dynamo.exc.TorchDynamoException as error:
        fail("--dynamo_backend", f"this model can't be compiled here ({first_line(error)}); leave it out")
    for compiled, expected in zip(*gradients, strict=True):
        if (compiled - expected).norm() > 0.3 * expected.norm():  # far above what rounding to bfloat16 does
            compiler = f"torch {torch.__version__}'s {accelerator.state.dynamo_plugin.backend.value.lower()}"
            fail("--dynamo_backend", f"{compiler} makes wrong gradients of this model; leave it out")


@one_line_errors
def main(args):
    """Trains the concepts that `args` (from `parse_args`) describe and leaves the result in args.output_dir."""
    # Setup concepts, tokens and class pictures
    concepts = read_concepts(args)
    accelerator = start_accelerator(args)
    check_base_model(args)
    tokenizer = load_tokenizer(args)
    token_ids, initializer_ids = add_modifier_tokens(tokenizer, args)
    check_instance_prompts(tokenizer, concepts, token_ids, args)
    if args.with_prior_preservation and not args.real_prior:
        generate_class_pictures(args, accelerator, concepts)
        for concept in concepts:
            read_class_pictures(concept, args)

    # Setup models, data, optimizer and schedule
    model, vae, noise_scheduler = build_models(args, accelerator, token_ids, initializer_ids)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    cells = args.resolution // vae_factor(vae.config)
    latent_shape = (vae.config.latent_channels, cells, cells)
    input_ids = tokenize_prompts(tokenizer, concepts, args)
    draws = Draws(concepts, args, input_ids, latent_shape, noise_scheduler.config.num_train_timesteps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * math.ceil(draws.epoch_length / samples_per_step)
    optimizer = build_optimizer(args, trained.values(), samples_per_step)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )
    if args.cache_latents:
        cache_latents(args, accelerator, draws, vae)
    pipeline = validation_pipeline(tokenizer, model, vae, noise_scheduler)
    checkpoints = Checkpoints(args, accelerator, pipeline, optimizer, lr_scheduler)
    step = checkpoints.resume() if args.resume_from_checkpoint else 0
    sampler = range(step * samples_per_step, max_train_steps * samples_per_step)
    dataloader = build_dataloader(args, accelerator, draws, args.train_batch_size, sampler)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    checkpoints.restore_scaler()
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        check_compiled(accelerator, model, vae, noise_scheduler, draws, optimizer, args)
    repository = create_repository(args) if args.push_to_hub and accelerator.is_main_process else None
    start_tracking(args, accelerator)
    print_summary(accelerator, args, concepts, trained, max_train_steps, samples_per_step)

    # Train: one optimizer step per gradient_accumulation_steps micro-batches
    if step == 0 and accelerator.is_main_process:
        validate(args, accelerator, pipeline, step)
    progress = tqdm(total=max_train_steps, initial=step, desc="steps", disable=not accelerator.is_main_process)
    step_log, step_loss, stopped = StepLog(accelerator, progress), 0.0, False
    with StopSignal() as stop_signal, progress:
        for batch in dataloader if step < max_train_steps else ():
            loss = training_step(accelerator, model, vae, noise_scheduler, optimizer, batch, args)
            step_loss = step_loss + loss / args.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue
            step += 1
            stopped = step_log.add(step, step_loss, lr_scheduler.get_last_lr()[0], stop_signal.number)
            step_loss = 0.0
            if not accelerator.optimizer_step_was_skipped:
                lr_scheduler.step()
            saves = step % args.checkpointing_steps == 0
            validates = step % args.validation_steps == 0 and step < max_train_steps
            if stopped or saves or validates or step == max_train_steps:
                stopped |= step_log.flush()  # what a checkpoint has in it is in the log
            # the others wait for the main process where the next step averages the gradients
            if accelerator.is_main_process and (stopped or saves):
                checkpoints.save(step)
            if stopped:
                break
            if accelerator.is_main_process and validates:
                validate(args, accelerator, pipeline, step)

    # Save, prove that the files load, make the final pictures from them
    if stopped:
        accelerator.print(f"Stopped after step {step}; to go on: the same command with --resume_from_checkpoint latest")
    elif accelerator.is_main_process:
        checkpoints.remove_leftovers()
        save_weights(Path(args.output_dir), args, pipeline)
        finish(args, accelerator, prove_reload(args, pipeline), step, concepts, repository)
    accelerator.wait_for_everyone()
    (model,) = accelerator.free_memory(model)  # first: torch can hang if its end is also the process group's
    accelerator.end_training()
    if stopped:
        return stop_signal.number or signal.SIGTERM  # the decorator exits with it


class StepLog:
    """Shows and tracks each step's loss when the next step is under way, so that the host never waits for the device.

    For the same reason all processes stop one step after a signal, whichever of them it reached.
    """

    def __init__(self, accelerator, progress):
        self.accelerator, self.progress, self.waiting = accelerator, progress, None

    def add(self, step, loss, learning_rate, signal_number):
        """Takes a step's loss, a scalar on the device. Returns whether a process had a signal at the step before."""
        values = self.accelerator.reduce(torch.stack([loss, loss.new_full((), signal_number)]), "mean")
        stopped, copied = self.flush(), None
        if values.is_cuda:
            values, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self.waiting = step, learning_rate, values, copied
        self.progress.update()
        return stopped

    def flush(self):
        """Logs the step that waits. Returns whether a process had a signal then."""
        if not self.waiting:
            return False
        (step, learning_rate, values, copied), self.waiting = self.waiting, None
        if copied:
            copied.synchronize()
        loss, signalled = values.tolist()
        self.progress.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        self.accelerator.log({"loss": loss, "lr": learning_rate}, step=step)
        return signalled > 0


class StopSignal:
    """Keeps SIGTERM (preemption) and SIGINT (Ctrl-C) from ending a run in the middle of a step; a second one does."""

    def __enter__(self):
        self.number, self.handlers = 0, {}
        with contextlib.suppress(ValueError):  # Python handles signals in the main thread only
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.number = number
        signal.signal(number, self.handlers[number])

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# ---------- Tracking and validation -----------------------------------------------------------------------------


def start_tracking(args, accelerator):
    """Makes the output folder and starts the trackers.

    They are told what it takes to repeat the run: every flag that is set, the precision in force, the number of
    processes, the libraries' versions. They never see the hub's token.
    """
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    shown = {key: value for key, value in vars(args).items() if key != "hub_token" and value is not None}
    config = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in shown.items()}
    config["mixed_precision"], config["num_processes"] = accelerator.mixed_precision, accelerator.num_processes
    for library in (accelerate, diffusers, torch, transformers):
        config[f"{library.__name__}_version"] = str(library.__version__)
    os.environ["COMET_OFFLINE_DIRECTORY"] = accelerator.logging_dir  # else the working folder
    logging.disable(logging.ERROR)  # comet_ml would show tracebacks, and the key that its server refuses
    try:
        accelerator.init_trackers("custom-diffusion", config, init_kwargs={"wandb": {"dir": args.output_dir}})
        for tracker in accelerator.trackers:
            if tracker.name == "comet_ml" and not (tracker.writer.alive or tracker.writer.disabled):
                raise ConnectionError("comet_ml can't reach its server, or the server refuses its key")
    except Exception as error:  # network, logins and folders end here
        problem = re.sub("[A-Za-z0-9]{25,}", "***", first_line(error)).rstrip(".")  # keys
        remedy = "log in, or WANDB_MODE=offline, or COMET_START_ONLINE=False with accelerate 1.6, or change the flag"
        fail(f"--report_to {args.report_to}", f"{problem}; {remedy}")
    finally:
        logging.disable(logging.NOTSET)


def print_summary(accelerator, args, concepts, trained, max_train_steps, samples_per_step):
    """Prints what is about to be trained, on what, and how long."""
    attention = sum(p.numel() for name, p in trained.items() if ".attn2." in name)
    rows = sum(p.numel() for p in trained.values()) - attention
    accelerator.print(f"Training {attention:,} parameters of the cross-attention ({args.freeze_model})")
    if rows:
        accelerator.print(f"  and {rows:,} of the embeddings of {', '.join(modifier_tokens(args))}")
    for concept in concepts:
        counts = f"{len(concept.instance_pictures)} pictures, {len(concept.class_pictures)} class pictures"
        accelerator.print(f"  {concept.instance_prompt!r}: {counts}")
    work = f"{max_train_steps} steps of {samples_per_step} instance pictures"
    accelerator.print(f"  {work} on {accelerator.num_processes} process(es), {accelerator.device.type}")


def validation_pipeline(tokenizer, model, vae, noise_scheduler):
    """Pipeline of the live modules, so that validation loads nothing."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=DPMSolverMultistepScheduler.from_config(noise_scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def validate(args, accelerator, pipeline, step):
    """Pictures of --validation_prompt, same noise each time; written to output_dir/validation and the trackers too."""
    if not args.validation_prompt:
        return []
    pipeline.vae.to(accelerator.device)
    with accelerator.autocast():
        images = pipeline(
            args.validation_prompt,
            num_images_per_prompt=args.num_validation_images,
            num_inference_steps=VALIDATION_INFERENCE_STEPS,
            height=args.resolution,
            width=args.resolution,
            generator=torch.Generator(accelerator.device).manual_seed(args.seed),
        ).images
    if args.cache_latents:
        leave_device(pipeline.vae)
    file = validation_file(args, step)
    file.parent.mkdir(exist_ok=True)
    save_picture(label_above(picture_grid(images, 4), f"step {step}" if step else "before", args.resolution), file)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.stack(images)}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": images}, step)
        elif tracker.name == "comet_ml":
            for i, image in enumerate(images):
                tracker.writer.log_image(image, name=f"validation-{i}", step=step)
    return images


def validation_file(args, step):
    """Where the validation pictures of a step are."""
    return Path(args.output_dir, "validation", f"step-{step:06d}.png")


def save_picture(image, file):
    """Writes a PNG file that is complete whenever it is there: a run that goes on reads what a killed one wrote."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    write_file(file, content.getvalue())


def picture_grid(images, columns):
    """Pictures in rows of up to `columns`, each in a cell that holds the largest."""
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    grid = Image.new("RGB", (len(rows[0]) * width, len(rows) * height), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            grid.paste(image, (j * width, i * height))
    return grid


def label_height(resolution):
    """Pixels of the line of text above pictures of that size."""
    return max(16, resolution // 12)


def label_above(image, text, resolution):
    """The picture below a line of text, which fits above the first of the pictures in it."""
    height = label_height(resolution)
    labelled = Image.new("RGB", (image.width, height + image.height), "white")
    labelled.paste(image, (0, height))
    font = ImageFont.load_default(0.7 * height)
    ImageDraw.Draw(labelled).text((height // 4, height // 2), text, "black", font, anchor="lm")
    return labelled


def compare_steps(args, last):
    """Draws before_after.png, the pictures before and after the training, and steps.png, one from each of its stages.

    They are made of the validation's files: a resumed run did not make the first ones itself.
    """
    files = [validation_file(args, n) for n in (0, *range(args.validation_steps, last, args.validation_steps), last)]
    grids = [Image.open(file) for file in files if file.is_file()]
    if len(grids) < 2:
        return
    picture_grid([grids[0], grids[-1]], 1).save(Path(args.output_dir, "before_after.png"))
    shown = np.linspace(0, len(grids) - 1, min(8, len(grids))).round().astype(int)
    first_picture = (0, 0, args.resolution, label_height(args.resolution) + args.resolution)
    picture_grid([grids[i].crop(first_picture) for i in shown], 8).save(Path(args.output_dir, "steps.png"))


# ---------- Weights and checkpoints -----------------------------------------------------------------------------


def digest(tensors):
    """Short hash of named tensors: tells base models apart, wherever their folders lie."""
    content = hashlib.sha256()
    for name, tensor in tensors.items():
        content.update(name.encode() + tensor.detach().numpy().tobytes())
    return content.hexdigest()[:16]


def file_ending(args):
    """Ending of the files that the result is to be loaded from."""
    return "bin" if args.no_safe_serialization else "safetensors"


def save_weights(folder, args, pipeline):
    """Writes what is trained as diffusers' loaders read it, in float32: .bin and, unless told otherwise, .safetensors.

    diffusers' loader wants an entry for every attention layer. For those without trained weights it is `{}` in the
    .bin and a tensor of shape (0,) in the .safetensors.
    """
    attention = attention_state_dict(pipeline.unet)
    layers = {key.rsplit(".processor.", 1)[0] + ".processor" for key in attention}
    untrained = [name for name in pipeline.unet.attn_processors if name not in layers]
    tables = {token: {token: row} for token, row in embedding_state_dict(pipeline, args).items()}
    for name, table in {WEIGHTS_NAME: attention, **tables}.items():
        empty = untrained if name == WEIGHTS_NAME else []
        write_file(folder / f"{name}.bin", to_bytes(table | {layer: {} for layer in empty}))
        if not args.no_safe_serialization:
            content = serialize(table | {layer: torch.empty(0) for layer in empty}, {"format": "pt"})
            write_file(folder / f"{name}.safetensors", content)


def to_bytes(value):
    """What `torch.save` writes for a value. (Writing to a file itself, it hides why the system refused.)"""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def write_file(file, content):
    """Writes bytes beside, flushes them to the disk and renames: a file of that name is always complete."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    with open(unfinished, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(file)


def load_weights(folder, args):
    """Reads `save_weights`' files: trained attention weights by key, and {token: (dim,)}."""

    def load(name):
        if (folder / f"{name}.safetensors").is_file():
            return load_file(folder / f"{name}.safetensors")
        return torch.load(folder / f"{name}.bin", weights_only=True)

    attention = {key: value for key, value in load(WEIGHTS_NAME).items() if len(value)}
    return attention, {token: load(token)[token] for token in modifier_tokens(args)}


class Checkpoints:
    """Saves and resumes training: output_dir/checkpoint-<step>, each also loadable like the final result.

    All processes hold the same state, so the main one alone saves. Every random draw follows from the seed and its
    number, so the step is also the state of every generator and the place in the data. checkpoint.json says when and
    with what the checkpoint was made, and has a SHA-256 of every other file.
    """

    def __init__(self, args, accelerator, pipeline, optimizer, lr_scheduler):
        self.args, self.accelerator, self.pipeline = args, accelerator, pipeline
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.output_dir, self.scaler_state = Path(args.output_dir), None
        # what training starts from; made before a checkpoint is loaded
        self.base_digest = digest(attention_state_dict(pipeline.unet) | embedding_state_dict(pipeline, args))
        # what must not change between the runs, or weights and draws would not fit
        names = ("modifier_token", "freeze_model", "resolution", "train_batch_size", "gradient_accumulation_steps",
                 "with_prior_preservation", "seed", "cache_latents")  # fmt: skip
        self.fixed = {name: getattr(args, name) for name in names} | {"num_processes": accelerator.num_processes}

    def list(self):
        """Checkpoints of the output folder, the oldest first."""

        def age(folder):
            try:
                return json.loads((folder / CHECKPOINT_NAME).read_bytes())["saved"]
            except (OSError, ValueError, KeyError, TypeError):
                return folder.stat().st_mtime

        return sorted((f for f in self.output_dir.glob("checkpoint-*") if f.name[11:].isdigit()), key=age)

    def save(self, step):
        """Writes a checkpoint beside and renames it: a folder of that name is always complete.

        Only then are the oldest ones beyond --checkpoints_total_limit deleted.
        """
        folder, unfinished = (self.output_dir / f"{name}checkpoint-{step}" for name in ("", ".unfinished-"))
        self.remove_leftovers()
        state = {
            "optimizer": self.optimizer.state_dict()["state"],
            "lr_scheduler": self.lr_scheduler.last_epoch,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        try:
            unfinished.mkdir()
            save_weights(unfinished, self.args, self.pipeline)
            write_file(unfinished / TRAINING_STATE_NAME, to_bytes(state))
            record = {"step": step, "saved": time.time(), "made_with": self.fixed, "base_digest": self.base_digest}
            record["base_model"] = self.args.pretrained_model_name_or_path
            record["sha256"] = {file.name: sha256(file) for file in sorted(unfinished.iterdir())}
            write_file(unfinished / CHECKPOINT_NAME, json.dumps(record, indent=2).encode())
        except OSError:
            self.remove_leftovers()  # they would fill a full disk
            raise
        if folder.exists():  # left by an earlier run in the same folder
            folder.rename(self.output_dir / f".unfinished-old-{folder.name}")
        unfinished.rename(folder)
        flush_folder(self.output_dir)
        for old in self.list()[: -self.args.checkpoints_total_limit] if self.args.checkpoints_total_limit else ():
            old.rename(self.output_dir / f".unfinished-deleted-{old.name}")
        self.remove_leftovers()

    def remove_leftovers(self):
        """Deletes what a killed run left unfinished."""
        for leftover in self.output_dir.glob(".unfinished-*"):
            shutil.rmtree(leftover)

    def read(self, folder):
        """The record of a checkpoint whose files are all as they were written; raises ValueError otherwise."""
        name = CHECKPOINT_NAME
        try:
            record = json.loads((folder / name).read_bytes())
            for name, expected in record["sha256"].items():
                if sha256(folder / name) != expected:
                    raise ValueError("other content than was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"damaged: {name}: {getattr(error, 'strerror', None) or first_line(error)}") from error
        return record

    def find(self):
        """Folder and record that --resume_from_checkpoint means; None, None if it is "latest" and there is none yet."""
        name, folders = self.args.resume_from_checkpoint, self.list()
        if name == "latest":
            for folder in reversed(folders):
                try:
                    return folder, self.read(folder)
                except ValueError as error:
                    self.accelerator.print(f"Skipped {folder}, {error}")
            if folders:
                fail(
                    "--resume_from_checkpoint latest", f"all checkpoints in {self.output_dir} are damaged; remove them"
                )
            return None, None
        for folder in (self.output_dir / name, Path(name)):
            if folder.is_dir():
                try:
                    return folder, self.read(folder)
                except ValueError as error:
                    fail(f"--resume_from_checkpoint {folder}", f"{error}; resume from another one")
        known = ", ".join(folder.name for folder in folders) or "none"
        fail(f"--resume_from_checkpoint {name}", f"no such folder; in {self.output_dir} there are: {known}")

    def resume(self):
        """Loads the checkpoint asked for in every process; returns its step, 0 if there is none."""
        step = self.load()
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            fail(
                "--resume_from_checkpoint", f"the processes find different steps, {steps}; let them share --output_dir"
            )
        return step

    def load(self):
        """Loads weights, optimizer and schedule of the checkpoint asked for; returns its step, 0 if there is none.

        Learning rate, schedule and the optimizer's other settings are the command line's, not the checkpoint's.
        """
        folder, record = self.find()
        if folder is None:
            self.accelerator.print(f"No checkpoint in {self.output_dir} yet: starting at the first step")
            return 0
        subject = f"--resume_from_checkpoint {folder}"
        for name, value in self.fixed.items():
            if record["made_with"].get(name) != value:
                fail(subject, f"made with {name} {record['made_with'].get(name)}, this run has {value}; use the same")
        if record["base_digest"] != self.base_digest:
            ours, theirs = self.args.pretrained_model_name_or_path, record["base_model"]
            fail(subject, f"made from the base model {theirs}, whose weights are not those of {ours}; use that one")

        try:
            attention, embeddings = load_weights(folder, self.args)
            state = torch.load(folder / TRAINING_STATE_NAME, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever files that were not written here make the readers raise
            fail(subject, f"can't be read ({first_line(error)}); resume from another one")
        self.pipeline.unet.load_state_dict(attention, strict=False)
        if embeddings:
            rows = self.pipeline.text_encoder.get_input_embeddings().rows
            rows.data.copy_(torch.stack(list(embeddings.values())))
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
        self.lr_scheduler.last_epoch = state["lr_scheduler"] - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses an optimizer step before this one
            self.lr_scheduler.step()
        self.scaler_state = state["scaler"]
        self.accelerator.print(f"Resuming from {folder}, step {record['step']}")
        return record["step"]

    def restore_scaler(self):
        """Gives fp16's gradient scaler, which exists only after `prepare`, its state."""
        if self.scaler_state and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(self.scaler_state)


def sha256(file):
    """SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def flush_folder(folder):
    """Returns when a folder's names are on the disk, not only in the system's cache."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ---------- The result ------------------------------------------------------------------------------------------


def prove_reload(args, pipeline):
    """Loads the saved files as a user does; fails loudly unless that gives the trained networks. Returns a pipeline.

    diffusers' `load_attn_procs` installs nothing, silently, without `_pipeline`; so nothing is taken on trust: the
    reloaded weights must be equal to the last bit, the outputs within rounding (diffusers' loader installs another
    attention kernel). Both are compared in float32. The pipeline returned is the reloaded one.
    """
    device, dtype = pipeline.unet.device, pipeline.vae.dtype
    trained = attention_state_dict(pipeline.unet) | embedding_state_dict(pipeline, args)
    expected = probe(pipeline, args)
    pipeline.unet.to("cpu"), pipeline.text_encoder.to("cpu")  # room for the fresh ones

    ending = file_ending(args)
    try:
        fresh = base_pipeline(args, device, dtype)
        fresh.unet.float(), fresh.text_encoder.float()
        fresh.unet.load_attn_procs(args.output_dir, weight_name=f"{WEIGHTS_NAME}.{ending}", _pipeline=fresh)
        for token in modifier_tokens(args):
            fresh.load_textual_inversion(args.output_dir, weight_name=f"{token}.{ending}")
        reloaded, found = attention_state_dict(fresh.unet) | embedding_state_dict(fresh, args), probe(fresh, args)
    except Exception as error:  # whatever a damaged file makes the loaders raise
        fail(args.output_dir, f"its files are kept, but diffusers can't load them ({first_line(error)})")
    same = trained.keys() == reloaded.keys() and all(torch.equal(trained[key], reloaded[key]) for key in trained)
    close = all(torch.allclose(a, b, rtol=0, atol=1e-3 * a.abs().max()) for a, b in zip(expected, found, strict=True))
    if not (same and close):
        what = "weights" if not same else "outputs"
        loader = f"diffusers {diffusers.__version__}"
        fail(args.output_dir, f"its files are kept, but {loader} loads other {what} from them than were trained")
    fresh.scheduler = pipeline.scheduler
    fresh.unet.to(dtype), fresh.text_encoder.to(dtype)
    return fresh


@torch.no_grad()
def probe(pipeline, args):
    """Text encoder's hidden states and UNet's prediction, float32, for all new words and fixed noisy latents."""
    unet, text_encoder = pipeline.unet.float(), pipeline.text_encoder.float()
    prompt = " ".join(["photo of a", *modifier_tokens(args)])
    input_ids = torch.from_numpy(tokenize(pipeline.tokenizer, prompt))
    hidden = text_encoder(input_ids[None].to(unet.device))[0]
    cells = args.resolution // vae_factor(pipeline.vae.config)
    noise = torch.randn(1, unet.config.in_channels, cells, cells, generator=torch.Generator().manual_seed(0))
    return hidden.cpu(), unet(noise.to(unet.device), 500, hidden).sample.cpu()


def usage_snippet(args, concepts, weights):
    """Python lines that load the result (a folder or hub repository) into the base model and make a picture."""
    prompt = args.validation_prompt or concepts[0].instance_prompt
    ending, base = file_ending(args), repr(args.pretrained_model_name_or_path)
    base += "".join(f", {key}={vars(args)[key]!r}" for key in ("revision", "variant") if vars(args)[key])
    return "\n".join([
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        "# on a GPU: .to('cuda', torch.float16)",
        f"pipeline = DiffusionPipeline.from_pretrained({base}).to(torch.float32)",
        f"weights = {weights!r}",
        f"pipeline.unet.load_attn_procs(weights, weight_name='{WEIGHTS_NAME}.{ending}', _pipeline=pipeline)",
        *(f"pipeline.load_textual_inversion(weights, weight_name={f'{t}.{ending}'!r})" for t in modifier_tokens(args)),
        f"image = pipeline({prompt!r}, num_inference_steps=100, guidance_scale=6.0, eta=1.0).images[0]",
        "image.save('picture.png')",
    ])  # fmt: skip


def finish(args, accelerator, pipeline, step, concepts, repository):
    """Final pictures from the reloaded pipeline, where everything is, and the upload."""
    images = validate(args, accelerator, pipeline, step)
    for i, image in enumerate(images):
        image.save(Path(args.output_dir, f"image_{i}.png"))
    if images:
        compare_steps(args, step)
    print(f"Saved to {args.output_dir}; loads back as trained (checked). To use it:\n")
    print(usage_snippet(args, concepts, args.output_dir))
    if repository:
        upload(args, concepts, images, repository)


def create_repository(args):
    """Makes the hub's repository, if there is none yet, and returns its id.

    That is done before training, so that what would stop the upload stops the run early.
    """
    repository = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return huggingface_hub.create_repo(repository, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # network, token and name end here
        remedy = "see to the network, `hf auth login`, --hub_model_id"
        fail(f"--push_to_hub {repository}", f"{without_token(error, args)}; {remedy}")


def without_token(error, args):
    """All lines of an error, for the hub's reason is in the last ones, without the token, which a server may echo."""
    text = " ".join(str(error).split()) or type(error).__name__
    for token in filter(None, (args.hub_token, huggingface_hub.get_token())):
        text = text.replace(token, "***")
    return text


def upload(args, concepts, images, repository):
    """Writes the model card and uploads the result: no checkpoints, no logs, nothing else that lies there."""
    Path(args.output_dir, "README.md").write_text(model_card(args, concepts, images, repository), encoding="utf-8")
    folder, (included, excluded) = args.output_dir, UPLOADED
    try:
        commit = huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=included,
            ignore_patterns=excluded,
            token=args.hub_token,
        )
    except Exception as error:  # the result is safe on the disk
        later = shlex.join(["hf", "upload", repository, folder, "--include", included, "--exclude", excluded])
        problem = f"{without_token(error, args)}; all is in {folder}; later: {later}"
        fail(f"--push_to_hub {repository}", problem)
    print(f"\nUploaded to {commit.repo_url}")


def model_card(args, concepts, images, repository):
    """Model card: license, base model, tags, a usage snippet that works as pasted, the final pictures."""
    base, pictures = args.pretrained_model_name_or_path, [f"image_{i}.png" for i in range(len(images))]
    prompts = [concept.instance_prompt for concept in concepts]
    shown = f"`{args.validation_prompt}`:\n\n" + " ".join(f"![](./{picture})" for picture in pictures)
    metadata = huggingface_hub.ModelCardData(
        license="creativeml-openrail-m",
        base_model=None if Path(base).is_dir() else base,  # the hub refuses what is not on it
        instance_prompt=", ".join(prompts),
        tags=["text-to-image", "diffusers", "stable-diffusion", "custom-diffusion"],
        widget=[{"text": args.validation_prompt, "output": {"url": picture}} for picture in pictures] or None,
    )
    return f"""---
{metadata.to_yaml()}
---

# {repository}

Custom Diffusion weights for `{base}`, trained on pictures of {", ".join(f"`{prompt}`" for prompt in prompts)}.

```python
{usage_snippet(args, concepts, repository)}
```

{shown if pictures else ""}
"""


if __name__ == "__main__":
    gc.freeze()  # what was imported stays: no more looking for garbage there
    main(ARGS)
