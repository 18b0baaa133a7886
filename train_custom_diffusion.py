#!/usr/bin/env python3
"""Custom Diffusion: teach a text-to-image diffusion model a new concept from a handful of pictures.

Trains the key and value projections of the UNet's cross-attention and one new word embedding per concept
(Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", CVPR 2023).

On one GPU, or on a CPU:
    accelerate launch train_custom_diffusion.py --pretrained_model_name_or_path=MODEL \\
        --instance_data_dir=pictures/of/my/cat --instance_prompt="photo of a <new1> cat" --modifier_token="<new1>" \\
        --with_prior_preservation --class_data_dir=class_pictures/cat --class_prompt=cat --max_train_steps=250

On four GPUs, and on two machines with four each:
    accelerate launch --multi_gpu --num_processes=4 train_custom_diffusion.py ...
    torchrun --nnodes=2 --node_rank=0 --master_addr=FIRST_MACHINE --nproc_per_node=4 train_custom_diffusion.py ...

In a notebook:
    from train_custom_diffusion import main, parse_args
    main(parse_args(["--pretrained_model_name_or_path=MODEL", ...]))
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

NEEDED = ("torch>=2.6", "diffusers>=0.35", "transformers>=4.48,<6", "accelerate>=1.0,<2", "numpy>=1.26", "Pillow>=10.1")
INSTALL = "run pip install -r requirements.txt, best in a new environment"
WEIGHTS_NAME = "pytorch_custom_diffusion_weights"
MERGE = Path(__file__).resolve().with_name("scripts") / "merge.py"
TRAINING_STATE_NAME, CHECKPOINT_NAME = "training_state.pt", "checkpoint.json"
REMEDIES = {  # by what torch says
    "out of memory": "--gradient_checkpointing or a smaller --train_batch_size or --sample_batch_size takes less",
    "shared memory": "/dev/shm is full; use docker run --shm-size=1g, or --dataloader_num_workers 0",
}
DEFAULT_INITIALIZERS = "ktn+pll+ucd"
STOP_SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, n)]
FAR_PREFIXES, CLOSE_PREFIXES = ("a far away ", "very small "), ("zoomed in ", "close up ")
# read when transformers is imported, which otherwise warns that torchvision is missing; nothing here uses torchvision
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", "IProgress not found")  # by tqdm.auto in a notebook without ipywidgets


def fail(subject, problem):
    """Ends the run with exit status 1 and one line: which flag or file is wrong, and what to do about it."""
    if os.environ.get("CUSTOM_DIFFUSION_TRACEBACK"):
        traceback.print_exc()
    raise SystemExit(f"error: {subject}: {problem}") from None


@contextlib.contextmanager
def failing_as(subject, remedy):
    """Ends the run with one line whatever a library raises in this context: some raise anything."""
    try:
        yield
    except Exception as error:
        while isinstance(error, (ImportError, RuntimeError)) and error.__cause__:
            error = error.__cause__  # lazy imports hide which package is broken
        problem = textwrap.shorten(str(error) or type(error).__name__, 400).rstrip(".")
        fail(subject, f"{problem}; {remedy}")


def boolean(text):
    """argparse type of a flag that works bare and as `--flag=True` or `--flag=False`."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def number(kind, least, below=math.inf):
    """argparse type: a number of the given kind in [least, below)."""

    def parse(text):
        value = kind(text)
        if not least <= value < below:  # false for NaN, too
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {below})")
        return value

    parse.__name__ = kind.__name__  # for argparse's message about text that is not a number
    return parse


def parse_args(input_args=None):
    """Reads the command line, or the list of strings `input_args`, into a checked `argparse.Namespace`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = "accelerate launch train_custom_diffusion.py --pretrained_model_name_or_path MODEL [other flags]"
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # without the usage: one line
    flag = {"type": boolean, "nargs": "?", "const": True, "default": False}
    positive, non_negative = number(int, 1), number(int, 0)
    real, fraction = number(float, 0), number(float, 0, below=1)
    path = os.path.expanduser  # bash leaves the ~ of --flag=~/folder alone
    schedules = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
    trackers = ("tensorboard", "wandb", "comet_ml", "all", "none")
    # fmt: off
    add = parser.add_argument_group("model and concept").add_argument
    add("--pretrained_model_name_or_path", type=path, required=True, help="hub id, or folder in diffusers format")
    add("--revision", help="revision of the model on the hub")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--tokenizer_name", type=path, help="another tokenizer than the model's: hub id or folder")
    add("--instance_data_dir", type=path, help="folder with 3 to 20 pictures of the concept")
    add("--instance_prompt", help='their prompt, with the modifier token: "photo of a <new1> cat"')
    add("--class_data_dir", type=path, help="folder of class (regularization) pictures; generated ones are put there")
    add("--class_prompt", help='the class: "cat"')
    add("--concepts_list", type=path, help="JSON list of objects with the four keys above, for several concepts")
    add("--modifier_token", help='new word; "+" between several: "<new1>+<new2>"')
    add("--initializer_token", default=DEFAULT_INITIALIZERS, help="words whose embeddings the new ones start from")
    add("--freeze_model", default="crossattn_kv", choices=("crossattn_kv", "crossattn"),
        help="crossattn_kv trains to_k and to_v of the cross-attention; crossattn also to_q and to_out")
    add = parser.add_argument_group("class pictures and preprocessing").add_argument
    add("--with_prior_preservation", **flag, help="add the loss on class pictures, so that the class is preserved")
    add("--prior_loss_weight", type=real, default=1.0, help="weight of that loss")
    add("--num_class_images", type=positive, default=200, help="pictures per class; missing ones are generated")
    add("--real_prior", **flag, help="use real class pictures, fetched by retrieve.py; generate none")
    add("--prior_generation_precision", choices=("no", "fp32", "fp16", "bf16"), help="default: fp16 on a GPU")
    add("--sample_batch_size", type=positive, default=4, help="batch for drawing and encoding pictures, per device")
    add("--resolution", type=positive, default=512, help="picture size in pixels")
    add("--center_crop", **flag, help="cut pictures to a centred square first")
    add("--hflip", **flag, help="mirror half of the pictures")
    add("--noaug", **flag, help="no scale augmentation of the instance pictures")
    add("--alpha_mask", **flag, help="the alpha channel of an instance picture masks the loss")
    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=positive, default=4, help="instance pictures per device and micro-batch")
    add("--gradient_accumulation_steps", type=positive, default=1, help="micro-batches per optimizer step")
    add("--num_train_epochs", type=positive, default=1, help="an epoch is max(instance pictures, class pictures) long")
    add("--max_train_steps", type=positive, help="optimizer steps; wins over --num_train_epochs")
    add("--seed", type=non_negative, default=42, help="every random draw follows from it")
    add("--dataloader_num_workers", type=non_negative, default=2, help="processes that load pictures; 0: the main one")
    add("--local_rank", type=int, default=-1, help="not used: launchers set LOCAL_RANK")
    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=real, default=1e-5, help="AdamW's learning rate")
    add("--scale_lr", **flag, help="times accumulation x batch x processes, and x 2 with prior preservation")
    add("--lr_scheduler", default="constant", choices=schedules, help="diffusers' schedule of the learning rate")
    add("--lr_warmup_steps", type=non_negative, default=500, help="optimizer steps of warm-up (constant has none)")
    add("--adam_beta1", type=fraction, default=0.9, help="AdamW's first beta")
    add("--adam_beta2", type=fraction, default=0.999, help="AdamW's second beta")
    add("--adam_weight_decay", type=real, default=1e-2, help="AdamW's weight decay")
    add("--adam_epsilon", type=real, default=1e-8, help="AdamW's epsilon")
    add("--use_8bit_adam", **flag, help="bitsandbytes' 8-bit AdamW (GPU)")
    add("--max_grad_norm", type=real, default=1.0, help="gradient clipping over everything trained; 0: none")
    add = parser.add_argument_group("precision and memory").add_argument
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    add("--allow_tf32", **flag, help="TF32 matrix products on Ampere and later GPUs")
    add("--gradient_checkpointing", **flag, help="recompute activations: less memory, slower")
    add("--channels_last", **flag, help="the UNet's convolutions in channels_last, which GPUs may do faster")
    add("--enable_xformers_memory_efficient_attention", **flag, help="attention by xformers (GPU)")
    add("--set_grads_to_none", **flag, help="free gradients between steps instead of zeroing them")
    add("--cache_latents", type=non_negative, default=0, help="so many augmentations of each picture, encoded once")
    add = parser.add_argument_group("output and validation").add_argument
    add("--output_dir", type=path, default="custom-diffusion-model", help="folder of everything that the run leaves")
    add("--logging_dir", type=path, default="logs", help="tensorboard's folder, inside output_dir")
    add("--report_to", default="tensorboard", choices=trackers, help="tracker of loss and validation pictures")
    add("--no_safe_serialization", **flag, help="write only .bin files, no .safetensors")
    add("--keep_apart", **flag, help="at the end, put the rest back towards what it was (docs/merging.md)")
    add("--validation_prompt", help='prompt of the validation pictures: "<new1> cat sitting in a bucket"')
    add("--num_validation_images", type=positive, default=2, help="pictures per validation")
    add("--validation_steps", type=positive, default=50, help="optimizer steps between validations")
    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpointing_steps", type=positive, default=250, help="optimizer steps between checkpoints")
    add("--checkpoints_total_limit", type=positive, help="keep only so many of the newest")
    add("--resume_from_checkpoint", type=path, help='a checkpoint\'s path, its name in output_dir, or "latest"')
    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", **flag, help="upload the result to the Hugging Face hub")
    add("--hub_token", help="token for the upload; better: `hf auth login`")
    add("--hub_model_id", help="repository; default: the output folder's name")
    # fmt: on
    for action in parser._actions:  # argparse's formatter with defaults would say "(default: None)", too
        action.help += "" if action.default in (None, argparse.SUPPRESS) else " (default: %(default)s)"
    args = parser.parse_args(input_args)
    needed = ["instance_data_dir", "instance_prompt"]
    needed += ["class_data_dir", "class_prompt"] if args.with_prior_preservation else []
    for name in needed if not args.concepts_list else ():
        if not getattr(args, name):
            parser.error(f"--{name} is missing: give it, or --concepts_list")
    if args.real_prior and not args.with_prior_preservation:
        parser.error("--real_prior needs --with_prior_preservation: add it, or leave out --real_prior")
    if args.hub_token and args.report_to in ("wandb", "comet_ml", "all"):  # they record the command line
        parser.error(f"--hub_token would be shown to --report_to {args.report_to}: use `hf auth login` instead")
    tokens = modifier_tokens(args)
    if len(set(tokens)) < len(tokens) or any(not t or t != t.strip() or "/" in t for t in tokens):
        parser.error(f"--modifier_token {args.modifier_token!r}: give different words, for example '<new1>+<new2>'")
    if len(args.initializer_token.split("+")) < len(tokens):
        parser.error(f"--initializer_token {args.initializer_token}: give one for each of {args.modifier_token}")
    if args.keep_apart and (args.freeze_model != "crossattn_kv" or not tokens):
        parser.error("--keep_apart needs --modifier_token and --freeze_model crossattn_kv")
    if args.keep_apart and not MERGE.is_file():
        parser.error(f"--keep_apart needs {MERGE}, from this script's repository")
    check_versions()
    return args


def check_versions():
    """Fails if Python or a package is missing or not in a version that this script works with."""
    if sys.version_info < (3, 10):  # noqa: UP036 (an older one gets this far)
        fail(f"Python {sys.version.split()[0]}", "this script needs 3.10 or later")
    with failing_as("packages", INSTALL):
        from packaging.requirements import Requirement  # here, as --help needs no package

        for needed in map(Requirement, NEEDED):
            found = importlib.metadata.version(needed.name)
            if not needed.specifier.contains(found, prereleases=True):
                raise ImportError(f"{needed.name} {found} is installed, and {needed} is needed")


def modifier_tokens(args):
    """New words of --modifier_token, in order; an empty list for none."""
    return args.modifier_token.split("+") if args.modifier_token else []


if __name__ == "__main__":
    parse_args()  # so that --help and wrong arguments answer before the imports below, which take seconds

gc.disable()  # looking for garbage among the million objects that these imports make takes a fifth of their time
with failing_as("packages", INSTALL):  # one that is broken, torchvision for example, can end any import
    import accelerate
    import diffusers
    import filelock
    import numpy as np
    import torch
    import transformers
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, InitProcessGroupKwargs
    from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
    from diffusers.models import attention_processor
    from diffusers.optimization import get_scheduler
    from diffusers.utils import make_image_grid
    from huggingface_hub import ModelCardData, create_repo, upload_folder
    from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
    from safetensors.torch import load_file
    from safetensors.torch import save as serialize
    from torch import nn
    from torch.utils.data import DataLoader, Dataset, get_worker_info
    from tqdm.auto import tqdm

    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()  # for phones' pictures
gc.enable()
SCHEDULER_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset",
                      "timestep_spacing", "prediction_type", "rescale_betas_zero_snr")  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
XL_NAMES = ("clip_l", "clip_g")  # of a word's embeddings for SDXL's two text encoders


# ---------- Concepts and pictures -------------------------------------------------------------------------------


@dataclasses.dataclass
class Concept:
    """One concept: its instance prompt and class, and (picture, caption) pairs of the instance and of the class."""

    instance_prompt: str
    instance_images: list
    class_prompt: str | None = None
    class_data_dir: Path | None = None
    class_images: list = dataclasses.field(default_factory=list)


def read_concepts(args):
    """Reads and checks what needs no model: the concepts and every picture. Returns a list of `Concept`."""
    concepts, output_dir = [], Path(args.output_dir).resolve()
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        fail(f"--output_dir {args.output_dir}", f"{existing} is not a folder that can be written to; give another")
    for entry in read_concepts_list(args) if args.concepts_list else [vars(args)]:
        folder = Path(entry["instance_data_dir"]).expanduser()
        files, prompt = find_images(folder, "instance_data_dir"), entry["instance_prompt"]
        concept = Concept(prompt, [(file, read_caption(file, prompt)) for file in files])
        if not concept.instance_images:
            fail(f"instance_data_dir {folder}", "no pictures in it; put 3 to 20 there")
        folders = [folder.resolve(), output_dir]
        if args.with_prior_preservation:
            concept.class_prompt = entry["class_prompt"]
            concept.class_data_dir = Path(entry["class_data_dir"]).expanduser()
            read_class_images(concept, args)
            folders.append(concept.class_data_dir.resolve())
        if len(set(folders)) < len(folders):
            fail(f"instance_data_dir {folder}", "it, class_data_dir and output_dir must be different folders")
        concepts.append(concept)
    classes = {(str(c.class_data_dir), c.class_prompt) for c in concepts}
    if len({folder for folder, _ in classes}) < len(classes) and not args.real_prior:
        fail("class_data_dir", f"the same for different class prompts; give each class its own: {sorted(classes)}")
    for file in {file: None for c in concepts for file, _ in c.instance_images + c.class_images}:
        with failing_as(file, "not a readable picture: repair or remove it"):
            load_picture(file)
    return concepts


def read_concepts_list(args):
    """Reads --concepts_list into a list of dicts and checks its form."""
    subject = f"--concepts_list {args.concepts_list}"
    with failing_as(subject, "give a JSON file in UTF-8"):
        entries = json.loads(Path(args.concepts_list).read_text(encoding="utf-8-sig"))
    if not isinstance(entries, list) or not entries:
        fail(subject, "not a list of concepts; give [{...}, ...]")
    needed = ["instance_prompt", "instance_data_dir"]
    needed += ["class_prompt", "class_data_dir"] if args.with_prior_preservation else []
    for index, entry in enumerate(entries, start=1):
        for key in needed:
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key]:
                fail(subject, f"concept {index} has no text for the key {key!r}; add it")
    return entries


def read_class_images(concept, args):
    """Fills in the concept's class pictures and captions: retrieve.py's lists, or a plain folder, if there is one."""
    folder, images, captions = concept.class_data_dir, [], []
    lists = [folder / "images.txt", folder / "caption.txt"]
    if args.real_prior and all(file.is_file() for file in lists):
        with failing_as(f"class_data_dir {folder}", "run retrieve.py again"):
            names, captions = (file.read_text("utf-8").removesuffix("\n").split("\n") for file in lists)
            if len(names) != len(captions):
                raise ValueError(f"{len(names)} lines in images.txt, {len(captions)} in caption.txt")
            # a name is absolute, or relative to class_data_dir or to the working folder
            images = [folder / name if (folder / name).is_file() else Path(name) for name in names if name]
            for image in images:
                image.stat()
    elif folder.exists():
        images = find_images(folder, "class_data_dir")
        captions = [concept.class_prompt] * len(images)
    if args.real_prior and not images:
        command = ["python", "retrieve.py", "--class_prompt", concept.class_prompt, "--class_data_dir", str(folder)]
        command += ["--num_class_images", str(args.num_class_images)]
        fail(f"class_data_dir {folder}", f"no real class pictures in it; run: {shlex.join(command)}")
    concept.class_images = list(zip(images, captions, strict=True))[: args.num_class_images]


def find_images(folder, name):
    """Picture files of a folder by their ending, sorted by name; hidden files and folders are left out."""
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    with failing_as(f"{name} {folder}", "give a folder of pictures"):
        files = [file for file in sorted(folder.iterdir()) if file.name[0] != "." and not file.is_dir()]
    left_out = [file.name for file in files if file.suffix.lower() in {".heic", ".heif", ".hif"} - known]
    if left_out:
        print(f"{name} {folder}: left out {', '.join(left_out)}; to take them, `pip install pillow-heif`")
    return [file for file in files if file.suffix.lower() in known]


def read_caption(image, default):
    """The text of the .txt beside a picture, on one line, or the default if there is none."""
    file = image.with_suffix(".txt")
    with failing_as(file, "give a caption in UTF-8, or remove it"):
        return " ".join(file.read_text("utf-8-sig").split()) if file.exists() else default


def load_picture(file, least=math.inf, keep_alpha=False):
    """Decodes a picture to upright RGB: sRGB, 8 bits, alpha on white, reduced as far as its shorter side allows.

    With `keep_alpha` it shows the colours under the alpha and has that as the X of RGBX, which no resizing multiplies
    into the colours; at least 1, as 0 means an empty canvas. Returns the picture and its size in the file.
    """
    with Image.open(file) as image:
        image, profile = ImageOps.exif_transpose(image), image.info.get("icc_profile")
        if image.mode[0] in "IF":  # 16 bits, or floats of 0 to 1
            values = np.asarray(image) * (255 if image.mode == "F" else 1 / 257)
            image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data or image.mode == "P":
            image = image.convert("RGBA")
        if profile:  # phones have wider colours than sRGB
            srgb, mode = ImageCms.createProfile("sRGB"), "RGBA" if image.mode == "RGBA" else "RGB"
            with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile is as good as none
                image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode=mode)
        if image.mode != "RGBA":
            image = image.convert("RGB")
        elif keep_alpha:
            *colours, alpha = image.split()
            image = Image.merge("RGBX", (*colours, alpha.point(lambda value: max(value, 1))))
        else:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.reduce(max(1, int(min(image.size) // least))), image.size  # by a whole number


def draw_scale(size, rng):
    """Scale in pixels of an instance picture: 66 % uniform in [size/3, size], else in [1.2 size, 1.4 size)."""
    if rng.random() < 0.66:
        return int(rng.integers(size // 3, size + 1))
    return int(rng.integers(int(1.2 * size), int(1.4 * size)))


def place_instance(image, scale, size, factor, rng):
    """Puts an instance picture at `scale` pixels on a transparent size x size canvas, or cuts a window out of it.

    Returns RGBX pixels (size, size, 4), the window's corner (top, left) or None, and the loss mask (size/factor,
    size/factor): 1 strictly inside the picture, or everywhere in a window. The guide's script squeezes pictures to a
    square, here the longer side is at the scale.
    """
    mask = np.full((size // factor, size // factor), scale > size, np.float32)
    if scale > size:
        return *random_window(image, scale, size, rng), mask
    width, height = (max(1, round(length * scale / max(image.size))) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[top : top + height, left : left + width] = image.convert("RGBX")
    mask[inner_cells(top, height, factor), inner_cells(left, width, factor)] = 1
    return pixels, None, mask


def inner_cells(start, length, factor):
    """Latent cells strictly inside [start, start + length) pixels, or the one at its centre if there is none."""
    first, last = start // factor + 1, (start + length) // factor - 1
    centre = (start + length // 2) // factor
    return slice(first, last) if first < last else slice(centre, centre + 1)  # an empty mask makes a loss of NaN


def random_window(image, scale, size, rng):
    """Random window of an image resized to `scale` on its shorter side: RGBX (size, size, 4), uint8; (top, left)."""
    width, height = (round(length * scale / min(image.size)) for length in image.size)
    left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(image.convert("RGBX")), (top, left)


@dataclasses.dataclass
class CustomDiffusionDataset(Dataset):
    """Preprocesses instance pictures, class pictures and their prompts: item n is draw n of an endless sequence.

    A draw has everything random about an instance and a class sample: which pictures, their augmentation, the VAE's
    posterior sample, noise and timestep. It depends on (seed, n) alone and the training step draws nothing, so
    processes, workers, accumulation and resuming cannot change a result.
    """

    concepts: list
    tokenizers: list  # one, or SDXL's two, with the modifier tokens
    class_tokenizers: list  # without them, as a word of a caption may contain one
    size: int  # of the pictures, in pixels
    latent_shape: tuple  # (channels, h, w)
    num_train_timesteps: int
    seed: int
    center_crop: bool
    hflip: bool
    alpha_mask: bool
    aug: bool  # whether instance pictures are scaled, and their prompts say so
    cache: dict | None = None  # from `cache_latents`: arrays that samples then take rows of

    def __post_init__(self):
        self.instances = [pair for c in self.concepts for pair in c.instance_images]
        self.classes = [pair for c in self.concepts for pair in c.class_images]
        self.epoch_length = max(len(self.instances), len(self.classes))
        self.decoded = {}  # the first 64 instance pictures: a phone's take longer to decode than a step takes

    def __getitem__(self, draw):
        """Samples of one draw: the instance's and, with prior preservation, the class's, which has no mask.

        Each is a dict: what `preprocess` returns, with the posterior's mean and std (channels, h, w) for the pixels if
        they are cached; posterior_noise and noise (channels, h, w); the timestep.
        """
        epoch, position = divmod(draw, self.epoch_length)
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.epoch_length)
        index, rng = int(order[position]), np.random.default_rng((self.seed, 1, draw))
        samples = [self.sample(index % len(self.instances), rng)]
        if self.classes:
            samples.append(self.sample(len(self.instances) + index % len(self.classes), rng))
            del samples[1]["mask"]
        return samples

    def sample(self, picture, rng):
        """Sample of a picture, which is given by its number; the class pictures come after the instances."""
        if self.cache:
            augmentations = len(self.cache["mask"]) // len(self.instances + self.classes)
            row = picture * augmentations + rng.integers(augmentations)
            sample = {key: values[row] for key, values in self.cache.items()}
        else:
            sample = self.preprocess(picture, rng)
        return sample | {
            "posterior_noise": rng.standard_normal(self.latent_shape, np.float32),
            "noise": rng.standard_normal(self.latent_shape, np.float32),
            "timesteps": rng.integers(self.num_train_timesteps),
        }

    def preprocess(self, picture, rng):
        """One augmentation of a picture: pixels (4, size, size) uint8 RGBX, mask (1, h, w), input_ids (tokens,).

        X is 0 on an empty canvas; with --alpha_mask it is the alpha, whose mean over a cell is a factor of the mask.
        For SDXL also input_ids_2 (tokens,) and time_ids (6,): height and width of the original, top and left of the
        window in the resized picture, height and width of the result. A picture on a canvas has what inference uses.
        """
        file, prompt = (self.instances + self.classes)[picture]
        is_instance, size, cells = picture < len(self.instances), self.size, self.latent_shape[1]
        image, original = self.decoded.get(file) or load_picture(file, 2 * size, self.alpha_mask and is_instance)
        if is_instance and len(self.decoded) < 64:
            self.decoded[file] = image, original
        if self.hflip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if self.center_crop:
            image, original = ImageOps.fit(image, (min(image.size), min(image.size))), (min(original), min(original))
        if is_instance:
            scale = draw_scale(size, rng) if self.aug else size
            pixels, corner, mask = place_instance(image, scale, size, size // cells, rng)
            if image.mode == "RGBX":  # with an alpha
                alpha = (pixels[..., 3].reshape(cells, size // cells, cells, -1).mean((1, 3)) - 1) / 254  # of 1 to 255
                masked = mask * alpha.clip(0).astype(np.float32)
                mask = masked if masked.any() else mask
            if scale < 0.6 * size:
                prompt = FAR_PREFIXES[rng.integers(2)] + prompt
            elif scale > size:
                prompt = CLOSE_PREFIXES[rng.integers(2)] + prompt
        else:
            (pixels, corner), mask = random_window(image, size, size, rng), np.ones((cells, cells), np.float32)
        sample = {"pixels": pixels.transpose(2, 0, 1), "mask": mask[None]}
        tokenizers = self.tokenizers if is_instance else self.class_tokenizers
        for name, tokenizer in zip(("input_ids", "input_ids_2"), tokenizers, strict=False):
            sample[name] = np.array(tokenizer(prompt, padding="max_length", truncation=True).input_ids, np.int64)
        if len(tokenizers) > 1:
            conditions = (*original[::-1], *corner) if corner else (size, size, 0, 0)
            sample["time_ids"] = np.array((*conditions, size, size), np.float32)
        return sample

    def fixed_augmentations(self, rows, each):
        """Batch for `cache_latents`: augmentation row % each of picture row // each, which depends on (seed, row)."""
        rngs = [np.random.default_rng((self.seed, 3, row)) for row in rows]
        return collate_fn([[self.preprocess(row // each, rng)] for row, rng in zip(rows, rngs, strict=True)])


def collate_fn(draws):
    """Batch of draws to one dict of tensors: the instance samples first, then the class samples."""
    samples = [sample for part in zip(*draws, strict=True) for sample in part]
    rows = {key: [sample[key] for sample in samples if key in sample] for key in samples[0]}
    batch = {key: torch.from_numpy(np.stack(values)) for key, values in rows.items()}
    if get_worker_info():  # shared here, where a full /dev/shm is an error: later the batch would be lost in silence
        batch = {key: values.share_memory_() for key, values in batch.items()}
    return batch


# ---------- Models, tokens and attention ------------------------------------------------------------------------


class ModifierEmbedding(nn.Module):
    """Token embedding whose table is frozen and whose new rows, the modifier tokens', are the only parameter trained.

    The new rows, which start as copies of those of `initializer_ids`, live beside the table: gradient, weight decay and
    Adam's state concern them alone. The guide's script zeroes all other gradients, and weight decay moves those rows.
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
        new = nn.functional.embedding(matches.int().argmax(-1), self.rows).to(frozen.dtype)
        return torch.where(is_new[..., None], new, frozen)


class DenoisingModel(nn.Module):
    """A pipeline's text encoders and UNet as one, so that DDP, accumulation, autocast and compiler see one forward."""

    def __init__(self, pipeline):
        super().__init__()
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder
        self.text_encoder_2 = getattr(pipeline, "text_encoder_2", None)  # SDXL's

    def forward(self, noisy_latents, timesteps, input_ids, input_ids_2=None, time_ids=None):
        """(batch, channels, h, w), (batch,), (batch, tokens) -> the UNet's prediction (batch, channels, h, w).

        SDXL's UNet sees the last but one layer of both encoders, the pooled output of the second, and time_ids.
        """
        if input_ids_2 is None:
            return self.unet(noisy_latents, timesteps, self.text_encoder(input_ids)[0]).sample
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        encoder_hidden_states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        # pooled where transformers does it, which may be the new word: the configuration decides, for users as well
        conditions = {"text_embeds": second.text_embeds, "time_ids": time_ids}
        return self.unet(noisy_latents, timesteps, encoder_hidden_states, added_cond_kwargs=conditions).sample


def text_parts(pipeline):
    """(tokenizer, text encoder) of a pipeline, or SDXL's two pairs."""
    endings = ("", "_2") if hasattr(pipeline, "text_encoder_2") else ("",)
    return [(getattr(pipeline, f"tokenizer{e}"), getattr(pipeline, f"text_encoder{e}")) for e in endings]


def load_tokenizers(args):
    """Loads the base model's tokenizer, or SDXL's two; --tokenizer_name replaces the first. First checks the model."""
    name, subject = args.pretrained_model_name_or_path, "--pretrained_model_name_or_path"
    convert = "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder) makes one of a single file"
    with failing_as(f"{subject} {name}", f"give a hub id within reach or a folder in diffusers format; {convert}"):
        if Path(name).is_dir() and not Path(name, "model_index.json").is_file():
            raise FileNotFoundError(f"no model_index.json but {', '.join(sorted(os.listdir(name))[:5]) or 'nothing'}")
        index = DiffusionPipeline.load_config(name, revision=args.revision)
        *kinds, second = [index.get(part, [None, None])[1] for part in ("unet", "text_encoder", "text_encoder_2")]
        known = kinds == ["UNet2DConditionModel", "CLIPTextModel"]  # pipelines of distilled models have other names
        if not known or second not in (None, "CLIPTextModelWithProjection"):
            fail(f"{subject} {name}", f"a {index['_class_name']}; give a Stable Diffusion 1.x, 2.x or XL")
    tokenizers = []
    for ending in ("", "_2") if second else ("",):
        options = {"revision": args.revision, "subfolder": f"text_encoder{ending}"}
        with failing_as(f"{subject} {name}", "give a complete model"):
            config = transformers.CLIPTextConfig.from_pretrained(name, **options)
        source, options["subfolder"] = name, f"tokenizer{ending}"
        if args.tokenizer_name and not ending:
            source, options["subfolder"], subject = args.tokenizer_name, "", "--tokenizer_name"
        with failing_as(f"{subject} {source}", "give a complete tokenizer"):
            tokenizer = transformers.CLIPTokenizer.from_pretrained(source, **options)
            if tokenizer.unk_token in tokenizer.tokenize("a"):  # what transformers 5 makes of missing files
                raise ValueError("the vocabulary of its tokenizer is empty")
        tokenizer.model_max_length = config.max_position_embeddings  # which a tokenizer's own configuration can lack
        tokenizers.append(tokenizer)
    return tokenizers


def load_pipeline(args, tokenizers):
    """Loads the base model in float32 as a pipeline without a safety checker, which draws with DPM-Solver++."""
    name = args.pretrained_model_name_or_path
    subject = f"--pretrained_model_name_or_path {name}"
    options = {"revision": args.revision, "variant": args.variant, "feature_extractor": None}
    options |= dict(zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False))
    kind, more = diffusers.StableDiffusionXLPipeline, {"image_encoder": None, "add_watermarker": False}
    if len(tokenizers) == 1:  # what is not needed is not asked for
        kind, more = diffusers.StableDiffusionPipeline, {"safety_checker": None, "requires_safety_checker": False}
    with failing_as(subject, "give a complete model, and --variant fp16 if its weight files are named so"):
        config = DDPMScheduler.load_config(name, subfolder="scheduler", revision=args.revision)
        pipeline = kind.from_pretrained(name, **options, **more, scheduler=None)
    # what the model was trained with: its scheduler's other settings may fit no other, and its class want a package
    settings = {key: value for key, value in config.items() if key in SCHEDULER_SETTINGS}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(settings)
    unet, vae, factor = pipeline.unet.config, pipeline.vae.config, pipeline.vae_scale_factor
    if unet.in_channels != vae.latent_channels:  # for inpainting, for example
        fail(subject, f"its UNet takes {unet.in_channels} channels, its VAE has {vae.latent_channels}; give another")
    if config.get("_class_name", "").startswith("EDM"):
        fail(subject, "trained in the EDM formulation; give one that predicts noise or velocity")
    kind = pipeline.scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        fail(subject, f"its scheduler's prediction_type is {kind!r}, neither 'epsilon' nor 'v_prediction'")
    if args.resolution % factor:
        multiple = math.ceil(args.resolution / factor) * factor
        fail(f"--resolution {args.resolution}", f"not a multiple of {factor}, as the VAE wants it; try {multiple}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


def add_modifier_tokens(tokenizer, args):
    """Adds the modifier tokens to the tokenizer; returns their ids and their initializers' ids."""
    tokens, is_default = modifier_tokens(args), args.initializer_token == DEFAULT_INITIALIZERS
    vocabulary, initializer_ids = tokenizer.get_vocab(), []
    for word in args.initializer_token.split("+")[: len(tokens)]:
        pieces = tokenizer.tokenize(word)
        if word in vocabulary and (is_default or len(pieces) > 1):  # a word-internal piece, as the defaults are
            pieces = [word]
        elif is_default:  # of a small test model's tokenizer, which lacks it
            pieces = pieces[:1]
        if len(pieces) != 1:
            fail(f"--initializer_token {word!r}", f"not one token but {pieces}; give a word that is one")
        initializer_ids.append(vocabulary[pieces[0]])
    names = {*vocabulary, *tokens}
    for token in tokens:
        if token in vocabulary or f"{token}</w>" in vocabulary:
            fail(f"--modifier_token {token!r}", "already in the tokenizer's vocabulary; choose another, as '<new1>'")
        if f"{token}_1" in names or token.removesuffix("_1") in names - {token}:
            fail(f"--modifier_token {token!r}", "diffusers reads X_1 as the second vector of X; choose another word")
        tokenizer.add_tokens(transformers.AddedToken(token, normalized=False))  # matched as typed, capitals included
    return tokenizer.convert_tokens_to_ids(tokens), initializer_ids


def check_instance_prompts(tokenizer, concepts, args):
    """Fails if the tokenizer would cut an instance prompt, or does not find the modifier tokens in the prompts."""
    tokens, limit, trained = modifier_tokens(args), tokenizer.model_max_length, set()
    prompts = {file.with_suffix(".txt"): prompt for c in concepts for file, prompt in c.instance_images}
    for source, prompt in [("instance_prompt", c.instance_prompt) for c in concepts] + list(prompts.items()):
        longest = prompt if args.noaug else FAR_PREFIXES[0] + prompt
        found = tokenizer.convert_ids_to_tokens(tokenizer(longest).input_ids)
        if len(found) > limit:
            fail(f"{source} {longest!r}", f"{len(found)} tokens; shorten it to {limit}, which the model reads")
        if tokens and not set(tokens) & set(found):
            fail(f"{source} {prompt!r}", f"none of {tokens} found in it; add one, set apart")
        trained.update(found if prompt in prompts.values() else ())
    for token in set(tokens) - trained:
        fail(f"--modifier_token {token!r}", "in no instance prompt, so it would learn nothing; use or drop it")


def add_attention_processors(unet, freeze_model, use_xformers=False):
    """Gives every cross-attention layer (attn2) trainable projections: copies of its own weights, whose shapes vary."""
    train_q_out = freeze_model == "crossattn"
    kind = "CustomDiffusionXFormersAttnProcessor" if use_xformers else "CustomDiffusionAttnProcessor2_0"
    processor_class = getattr(attention_processor, kind)
    processors = dict(unet.attn_processors)
    for name in (name for name in processors if name.endswith("attn2.processor")):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        # with the sizes hidden_size and cross_attention_dim
        processor = processor_class(True, train_q_out, *attention.to_k.weight.shape)
        for projection in ("to_k", "to_v", "to_q", "to_out") if train_q_out else ("to_k", "to_v"):
            own_weights = getattr(attention, projection).state_dict()
            getattr(processor, f"{projection}_custom_diffusion").load_state_dict(own_weights)
        processors[name] = processor
    unet.set_attn_processor(processors)


def build_models(args, accelerator, pipeline, tokens):
    """Makes the pipeline's networks ready to train; returns text encoders and UNet as one `DenoisingModel`.

    Everything is frozen but the cross-attention's new projections and the embeddings' new rows, which stay float32.
    `tokens` has what `add_modifier_tokens` returned for each tokenizer.
    """
    unet, vae, text_encoders = pipeline.unet, pipeline.vae, [encoder for _, encoder in text_parts(pipeline)]
    for network in (*text_encoders, unet, vae):
        network.requires_grad_(False)
    for text_encoder, (token_ids, initializer_ids) in zip(text_encoders, tokens, strict=True):
        if token_ids:
            table = text_encoder.get_input_embeddings()
            text_encoder.set_input_embeddings(ModifierEmbedding(table, token_ids, initializer_ids))
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()  # the self-attention
    add_attention_processors(unet, args.freeze_model, args.enable_xformers_memory_efficient_attention)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        for text_encoder in text_encoders:
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    model = DenoisingModel(pipeline).train()
    for tensor in (*model.parameters(), *model.buffers(), *vae.parameters()):
        if tensor.is_floating_point() and not tensor.requires_grad:
            tensor.data = tensor.data.to(DTYPES.get(accelerator.mixed_precision, torch.float32))
    if len(text_encoders) > 1 and accelerator.mixed_precision == "fp16" and vae.config.force_upcast:
        vae.float()  # SDXL's overflows in fp16
    model.to(accelerator.device)
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    vae.to(accelerator.device, memory_format=torch.channels_last)  # what its convolutions like best
    if accelerator.device.type == "cpu":
        vae.enable_slicing()  # there a picture at a time is faster, and takes less memory
    return model


def attention_state_dict(unet):
    """Trained attention weights, float32 on the CPU, with diffusers' keys: `<layer>.processor.<projection>.weight`."""
    state = {}
    for name, processor in unet.attn_processors.items():
        for key, value in processor.state_dict().items() if isinstance(processor, nn.Module) else ():
            state[f"{name}.{key}"] = value.detach().float().cpu().contiguous()
    return state


class PromptDataset(list):
    """Prompts for generating the missing class pictures, each with the seed of its noise and the file it goes to.

    Both follow from the picture's number: processes can share the work, and an interrupted generation goes on.
    """

    def __init__(self, concepts, num_class_images, seed):
        missing = {}  # by file, as concepts of one class may share its folder
        for index, concept in enumerate(concepts):
            files = [concept.class_data_dir / f"generated-{i:05d}.png" for i in range(num_class_images)]
            numbers = [i for i, file in enumerate(files) if not file.exists()]
            for i in numbers[: num_class_images - len(concept.class_images)]:
                noise = int(np.random.SeedSequence((seed, 2, index, i)).generate_state(1)[0])
                missing.setdefault(files[i], (concept.class_prompt, noise, files[i]))
        super().__init__(missing.values())


def generate_class_images(args, accelerator, concepts):
    """Fills every class folder up to num_class_images with pictures of the plain base model."""
    dataset = PromptDataset(concepts, args.num_class_images, args.seed)
    accelerator.wait_for_everyone()  # all have listed the folders before anyone writes
    if not dataset:
        return
    precision = args.prior_generation_precision or ("fp16" if accelerator.device.type == "cuda" else "no")
    pipeline = load_pipeline(args, load_tokenizers(args)).to(accelerator.device, DTYPES.get(precision, torch.float32))
    share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    loader = DataLoader(dataset, args.sample_batch_size, sampler=share, collate_fn=list)
    for batch in tqdm(loader, desc="class pictures", disable=not accelerator.is_main_process):
        prompts, seeds, files = zip(*batch, strict=True)
        noises = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipeline(list(prompts), generator=noises, height=args.resolution, width=args.resolution).images
        for image, file in zip(images, files, strict=True):
            write_file(file, to_bytes(image.save, format="PNG"))
    accelerator.wait_for_everyone()
    for concept in concepts:
        read_class_images(concept, args)


# ---------- Training --------------------------------------------------------------------------------------------


def start_accelerator(args):
    """Quiets the libraries and returns the accelerator, with device, precision and trackers chosen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader forks
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="accelerate|diffusers|huggingface_hub|transformers")  # of each other
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler")  # when a run is resumed
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1", "yes", "on"):
            fail(f"ACCELERATE_USE_{name}", "a process cannot save the weights then; run `accelerate config default`")
    accelerate.state.AcceleratorState._reset_state()  # in a notebook the previous run's precision would stay in force
    accelerator = accelerate.Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise accelerate ignores torchrun's processes on a CPU
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.gradient_accumulation_steps),  # not a variable's
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=os.path.join(args.output_dir, args.logging_dir),
        # the others wait for the main process while it generates pictures or uploads
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    precision, device = accelerator.mixed_precision, accelerator.device.type
    supported = ("no", "bf16") if device == "cpu" else ("no", "fp16", "bf16")
    if precision not in supported:
        fail(f"--mixed_precision {precision}", f"not supported on this {device}; give {' or '.join(supported)}")
    if args.report_to != "none" and not accelerator.log_with:  # accelerate leaves out what is not installed
        fail("--report_to", f"the package {args.report_to} is not installed; `pip install {args.report_to}`")
    packages = {"enable_xformers_memory_efficient_attention": "xformers", "use_8bit_adam": "bitsandbytes"}
    for name, package in packages.items():
        if getattr(args, name) and not (importlib.util.find_spec(package) and device == "cuda"):
            fail(f"--{name}", f"needs a CUDA GPU and the package {package}; `pip install {package}`, or leave it out")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def build_optimizer(args, parameters, samples_per_step):
    """AdamW (torch's or bitsandbytes') over what is trained, with --scale_lr applied."""
    scale = samples_per_step * (2 if args.with_prior_preservation else 1) if args.scale_lr else 1
    settings = {"lr": args.learning_rate * scale, "betas": (args.adam_beta1, args.adam_beta2)}
    settings |= {"weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def build_dataloader(args, accelerator, dataset, batch_size, sampler=None, collate_fn=collate_fn):
    """Collated batches of the dataset's items: those of the sampler, or all in order."""
    more = {"collate_fn": collate_fn, "worker_init_fn": ignore_signals, "num_workers": args.dataloader_num_workers}
    return DataLoader(dataset, batch_size, sampler=sampler, pin_memory=accelerator.device.type == "cuda", **more)


def ignore_signals(worker):
    """Lets a data-loader worker live on while the main process stops: signals often go to the whole group."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the worker ends when it is told to, or when its parent is gone


def cache_latents(args, accelerator, dataset, vae):
    """Encodes --cache_latents augmentations of every picture, for the dataset's `cache`; the VAE then moves out."""
    rows, parts = range(len(dataset.instances + dataset.classes) * args.cache_latents), []
    augment = functools.partial(dataset.fixed_augmentations, each=args.cache_latents)
    loader = accelerator.prepare(build_dataloader(args, accelerator, rows, args.sample_batch_size, collate_fn=augment))
    for batch in tqdm(loader, desc="latents", disable=not accelerator.is_main_process):
        batch["mean"], batch["std"] = encode(vae, batch.pop("pixels"))
        parts.append({key: values.cpu().numpy() for key, values in accelerator.gather_for_metrics(batch).items()})
    vae.to("cpu")
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


@contextlib.contextmanager
def delayed_signals():
    """Gives a list that stop signals (preemption, Ctrl-C, a closed window) are added to; a second one ends the run."""
    received, handlers = [], {}

    def note(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    with contextlib.suppress(ValueError):  # Python handles signals in the main thread only
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets for SIGHUP
                handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def one_line_errors(main):
    """Decorator: what goes wrong in the machine, not in the program, ends with one line that says what to do."""

    @functools.wraps(main)
    def wrapper(args):
        try:
            status = main(args)
        except BaseException as error:
            # frees what the frames hold: workers, which Python would wait for, and models, which a notebook would keep
            traceback.clear_frames(error.__traceback__)
            status, said = None, f"{error} {error.__cause__}" if isinstance(error, RuntimeError) else ""
            for text in filter(said.__contains__, REMEDIES):
                status = f"error: {text}: {REMEDIES[text]}"
            if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
                remedy = "check its name, permissions and disk; --resume_from_checkpoint latest goes on then"
                status = f"error: {error.filename or args.output_dir}: {error.strerror}; {remedy}"
            if not status:
                raise
        if status:  # the number of a signal, or a line
            raise SystemExit(status)

    return wrapper


def check_compiled(accelerator, model, vae, noise_scheduler, batch, parameters):
    """Fails if the compiled model leaves parameters without gradients, which a compiler was seen to do silently."""
    batch = {key: values.to(accelerator.device) for key, values in batch.items()}
    with failing_as("--dynamo_backend", "this model cannot be compiled here; leave it out"), accelerator.no_sync(model):
        loss = diffusion_loss(model, vae, noise_scheduler, batch, prior_loss_weight=1)
        gradients = torch.autograd.grad(1024 * loss, parameters)  # so that fp16 holds small ones
        if not all(gradient.any() for gradient in gradients):
            raise RuntimeError(f"torch {torch.__version__} makes gradients of zero")


@torch.no_grad()
def encode(vae, pixels):
    """RGBX (batch, 4, S, S), uint8 -> mean and std of the VAE's posterior, (batch, channels, h, w)."""
    pixel_values = torch.where(pixels[:, 3:] > 0, pixels[:, :3] / 127.5 - 1, 0)  # mid-grey where the canvas is empty
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    # contiguous, as everything else in a batch: the order in memory decides the last bits of sums
    return tuple(values.float().contiguous() for values in (posterior.mean, posterior.std))


def diffusion_loss(model, vae, noise_scheduler, batch, prior_loss_weight):
    """Loss of one micro-batch, a scalar.

    Instance part: per sample, the squared error summed over the mask divided by the mask's sum; mean over samples.
    Prior part: plain mean of the squared error, times prior_loss_weight. One pass through the networks for both.
    """
    noise, timesteps, mask = batch["noise"], batch["timesteps"], batch["mask"]
    with torch.no_grad():
        mean, std = encode(vae, batch["pixels"]) if "pixels" in batch else (batch["mean"], batch["std"])
        latents = (mean + std * batch["posterior_noise"]) * vae.config.scaling_factor
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    conditions = [batch[name] for name in ("input_ids", "input_ids_2", "time_ids") if name in batch]
    prediction = model(noisy_latents, timesteps, *conditions).float()
    is_velocity = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise

    error = nn.functional.mse_loss(prediction, target, reduction="none")
    instance_error, class_error = error[: len(mask)], error[len(mask) :]
    loss = ((instance_error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()
    if len(class_error):
        loss = loss + prior_loss_weight * class_error.mean()
    return loss


def training_step(accelerator, model, vae, noise_scheduler, optimizer, batch, args):
    """One micro-batch; every gradient_accumulation_steps-th one moves the weights. Returns the loss, on the device."""
    with accelerator.accumulate(model):
        loss = diffusion_loss(model, vae, noise_scheduler, batch, args.prior_loss_weight)
        accelerator.backward(loss)
        if accelerator.sync_gradients and args.max_grad_norm:
            accelerator.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=args.set_grads_to_none)
    return loss.detach()


@one_line_errors
def main(args):
    """Trains the concepts that `args` (from `parse_args`) describe and leaves the result in args.output_dir."""
    # Setup concepts, tokens and class pictures
    concepts = read_concepts(args)
    accelerator = start_accelerator(args)
    tokenizers = load_tokenizers(args)
    tokens = [add_modifier_tokens(tokenizer, args) for tokenizer in tokenizers]
    check_instance_prompts(tokenizers[0], concepts, args)
    if args.with_prior_preservation and not args.real_prior:
        generate_class_images(args, accelerator, concepts)

    # Setup models; the pipeline draws the validation pictures with the networks that are being trained
    pipeline = load_pipeline(args, tokenizers)
    vae, noise_scheduler = pipeline.vae, DDPMScheduler.from_config(pipeline.scheduler.config)
    model = build_models(args, accelerator, pipeline, tokens)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    # Setup data, optimizer and schedule
    dataset = CustomDiffusionDataset(
        concepts,
        tokenizers,
        load_tokenizers(args),
        size=args.resolution,
        latent_shape=(vae.config.latent_channels, *[args.resolution // pipeline.vae_scale_factor] * 2),
        num_train_timesteps=noise_scheduler.config.num_train_timesteps,
        seed=args.seed,
        center_crop=args.center_crop,
        hflip=args.hflip,
        alpha_mask=args.alpha_mask,
        aug=not args.noaug,
    )
    if args.cache_latents:
        dataset = dataclasses.replace(dataset, cache=cache_latents(args, accelerator, dataset, vae))
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    max_train_steps = args.max_train_steps or args.num_train_epochs * math.ceil(dataset.epoch_length / samples_per_step)
    optimizer = build_optimizer(args, trained.values(), samples_per_step)
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, max_train_steps)
    checkpoints = Checkpoints(args, accelerator, pipeline, optimizer, lr_scheduler, concepts, samples_per_step)
    step = checkpoints.resume() if args.resume_from_checkpoint else 0
    draws = range(step * samples_per_step, max_train_steps * samples_per_step)
    dataloader = build_dataloader(args, accelerator, dataset, args.train_batch_size, draws)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    if accelerator.state.dynamo_plugin.backend.value != "NO":
        batch = collate_fn([dataset[i] for i in range(args.train_batch_size)])  # of another size it would recompile
        check_compiled(accelerator, model, vae, noise_scheduler, batch, list(trained.values()))
    repository = start_reporting(args, accelerator)
    if accelerator.is_main_process:
        checkpoints.claim_folder()
    starts = [token.removesuffix("</w>") for token in tokenizers[0].convert_ids_to_tokens(tokens[0][1])]
    print_summary(accelerator, args, concepts, trained, starts, max_train_steps, samples_per_step)
    if len(tokenizers) > 1 and args.resolution < 1024:
        accelerator.print("  Stable Diffusion XL is made for --resolution 1024")

    # Train: one optimizer step per gradient_accumulation_steps micro-batches
    if step == 0 and accelerator.is_main_process:
        validate(args, accelerator, pipeline, step)
    progress = tqdm(total=max_train_steps, initial=step, desc="steps", disable=not accelerator.is_main_process)
    step_loss, stopped = 0.0, False
    with delayed_signals() as signals, progress:
        for batch in dataloader if step < max_train_steps else ():
            loss = training_step(accelerator, model, vae, noise_scheduler, optimizer, batch, args)
            step_loss = step_loss + loss / args.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue
            step += 1
            logs = {"loss": accelerator.reduce(step_loss, "mean").item(), "lr": lr_scheduler.get_last_lr()[0]}
            if not math.isfinite(logs["loss"]):  # the same in all processes
                fail(f"step {step}", f"the loss is {logs['loss']}; lower --learning_rate, or take another base model")
            progress.set_postfix(loss=f"{logs['loss']:.4f}", lr=f"{logs['lr']:.2e}", refresh=False)
            progress.update()
            accelerator.log(logs, step=step)
            step_loss = 0.0
            lr_scheduler.step()
            if signals:
                accelerator.set_trigger()
            stopped = accelerator.check_trigger()  # all processes stop after the same step
            # the others wait for the main process where the next step averages the gradients
            if accelerator.is_main_process and (stopped or step % args.checkpointing_steps == 0):
                checkpoints.save(step)
            if stopped:
                break
            if accelerator.is_main_process and step % args.validation_steps == 0 and step < max_train_steps:
                validate(args, accelerator, pipeline, step)

    # Save, prove that the files load, make the final pictures from them
    if stopped:
        accelerator.print(f"Stopped after step {step}; to go on: the same command with --resume_from_checkpoint latest")
    elif accelerator.is_main_process:
        if args.keep_apart:
            keep_apart(args, pipeline, checkpoints.settings)
        save_weights(Path(args.output_dir), args, pipeline, checkpoints.settings)
        finish(args, accelerator, prove_reload(args, pipeline), step, concepts, repository)
    accelerator.wait_for_everyone()
    (model,) = accelerator.free_memory(model)  # first: torch can hang if its end is also the process group's
    accelerator.end_training()
    if stopped:
        return 128 + (signals[0] if signals else signal.SIGTERM)  # the decorator exits with it


def start_reporting(args, accelerator):
    """Makes the hub's repository, whose id it returns, output_dir, and the trackers, which get the run's settings."""
    repository = None
    if accelerator.is_main_process and args.push_to_hub:
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        with failing_as(f"--push_to_hub {name}", "check the network, `hf auth login` and --hub_model_id"):
            repository = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
    settings = {"mixed_precision": accelerator.mixed_precision, "num_processes": accelerator.num_processes}
    flags = vars(args) | {"hub_token": None} | settings
    config = {key: value for key, value in flags.items() if value is not None}
    config |= {f"{m.__name__}_version": str(m.__version__) for m in (accelerate, diffusers, torch, transformers)}
    with failing_as(f"--report_to {args.report_to}", "log in, set WANDB_MODE=offline for wandb, or change the flag"):
        accelerator.init_trackers("custom-diffusion", config, init_kwargs={"wandb": {"dir": args.output_dir}})
    return repository


def print_summary(accelerator, args, concepts, trained, starts, max_train_steps, samples_per_step):
    """Prints what is about to be trained, on what, and how long."""
    count = sum(parameter.numel() for parameter in trained.values())
    words = "".join(f" and {word} (from {row})" for word, row in zip(modifier_tokens(args), starts, strict=True))
    accelerator.print(f"Training {count:,} parameters: {args.freeze_model}{words}")
    for concept in concepts:
        captions = sum(prompt != concept.instance_prompt for _, prompt in concept.instance_images)
        counts = f"{len(concept.instance_images)} pictures" + (f" ({captions} with captions)" if captions else "")
        accelerator.print(f"  {concept.instance_prompt!r}: {counts}, {len(concept.class_images)} class pictures")
    machine = f"{accelerator.num_processes} process(es), {accelerator.device.type}"
    accelerator.print(f"  {max_train_steps} steps of {samples_per_step} instance pictures on {machine}")


@torch.no_grad()
def decode(pipeline, latents):
    """Latents (batch, channels, h, w) to pictures, one at a time as pictures are what takes memory."""
    vae = pipeline.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(1)])
    return pipeline.image_processor.postprocess(decoded)


def validate(args, accelerator, pipeline, step):
    """Draws --validation_prompt, with the same noise each time, for output_dir/validation and the trackers."""
    if not args.validation_prompt:
        return []
    pipeline.vae.to(accelerator.device)
    noise, images = torch.Generator(accelerator.device).manual_seed(args.seed), []
    settings = {"num_inference_steps": 25, "generator": noise, "height": args.resolution, "width": args.resolution}
    settings["output_type"] = "latent"  # the VAE stays in its own precision
    while missing := args.num_validation_images - len(images):
        count = min(args.sample_batch_size, missing)
        with accelerator.autocast():
            latents = pipeline(args.validation_prompt, num_images_per_prompt=count, **settings).images
        images += decode(pipeline, latents)
    if args.cache_latents:
        pipeline.vae.to("cpu")
    columns, line = min(4, len(images)), max(16, args.resolution // 12)  # line: of text, its height in pixels
    blanks = [Image.new("RGB", images[0].size, "white")] * (-len(images) % columns)
    grid = make_image_grid([*images, *blanks], -(-len(images) // columns), columns)
    sheet, font = ImageOps.expand(grid, (0, line, 0, 0), "white"), ImageFont.load_default(0.7 * line)
    ImageDraw.Draw(sheet).text((line // 4, line // 2), f"step {step}" if step else "before", "black", font, anchor="lm")
    write_file(Path(args.output_dir, "validation", f"step-{step:06d}.png"), to_bytes(sheet.save, format="PNG"))
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.stack(images)}, step, **options)
    return images


# ---------- Weights, checkpoints and the result -----------------------------------------------------------------


def write_file(file, content):
    """Writes bytes to a file beside, flushes them to the disk and renames: a file of that name is always complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    with open(unfinished, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)


def to_bytes(save, *args, **kwargs):
    """What `save` writes into a stream. (torch.save, given a file's name, hides why the system refused to write.)"""
    stream = io.BytesIO()
    save(*args, stream, **kwargs)
    return stream.getvalue()


def save_weights(folder, args, pipeline, settings):
    """Writes what is trained, in float32, as diffusers reads it: .bin, and .safetensors with the run's settings."""
    attention = attention_state_dict(pipeline.unet)
    tables = {WEIGHTS_NAME: attention}
    for i, token in enumerate(modifier_tokens(args)):
        rows = [encoder.get_input_embeddings().rows[i].detach().cpu().clone() for _, encoder in text_parts(pipeline)]
        tables[token] = {token: rows[0]}
        if len(rows) > 1:  # SDXL's names and shapes are those that other tools read
            tables[token] = {name: row[None] for name, row in zip(XL_NAMES, rows, strict=True)}
    if not all(values.isfinite().all() for table in tables.values() for values in table.values()):
        fail(folder, "not written, as the weights are not finite; lower --learning_rate, or take another base model")
    untrained = pipeline.unet.attn_processors.keys() - {key.rpartition(".to_")[0] for key in attention}
    for name, table in tables.items():  # the loader wants an entry for every attention layer
        empty = sorted(untrained) if name == WEIGHTS_NAME else []
        write_file(folder / f"{name}.bin", to_bytes(torch.save, table | {layer: {} for layer in empty}))
        if not args.no_safe_serialization:
            metadata = {"settings": json.dumps(settings)}  # of several entries the order, and so the bytes, would vary
            content = serialize(table | {layer: torch.empty(0) for layer in empty}, metadata)
            write_file(folder / f"{name}.safetensors", content)


def keep_apart(args, pipeline, settings):
    """Replaces the trained keys and values by those that scripts/merge.py makes of them; docs/merging.md says how."""
    sys.path.insert(0, str(MERGE.parent))
    import merge

    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        trained, kept = Path(folder, "trained"), Path(folder, "kept")
        save_weights(trained, argparse.Namespace(**vars(args) | {"no_safe_serialization": False}), pipeline, settings)
        options = {name: getattr(args, name) for name in ("pretrained_model_name_or_path", "revision", "variant")}
        words = [f"--{name}={value}" for name, value in options.items() if value]
        merge.merge(merge.parse_args([str(trained), *words, f"--output_dir={kept}"]))
        table = torch.load(kept / f"{WEIGHTS_NAME}.bin", weights_only=True)
    pipeline.unet.load_state_dict({key: value for key, value in table.items() if len(value)}, strict=False)


class Checkpoints:
    """Saves and resumes training: output_dir/checkpoint-<step>, each also loadable like the final result.

    The main process alone saves, as all hold the same state. The step says where in its draws a run is. A folder has
    its name only while everything is in it, so it is complete whenever the run is killed.
    """

    def __init__(self, args, accelerator, pipeline, optimizer, lr_scheduler, concepts, samples_per_step):
        self.args, self.accelerator, self.pipeline = args, accelerator, pipeline
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.output_dir = Path(args.output_dir)
        self.unfinished, self.trash = (self.output_dir / f".{word}-checkpoint" for word in ("unfinished", "deleted"))
        # what decides on weights and draws; any number of processes may share the samples of a step
        names = ("modifier_token", "initializer_token", "freeze_model", "resolution", "center_crop", "hflip", "noaug",
                 "alpha_mask", "with_prior_preservation", "prior_loss_weight", "cache_latents", "seed")  # fmt: skip
        self.settings = {name: getattr(args, name) for name in names} | {"samples_per_step": samples_per_step}
        self.settings["concepts"] = [[c.instance_prompt, len(c.instance_images), len(c.class_images)] for c in concepts]
        self.settings["base_model"] = hashlib.sha256(serialize(attention_state_dict(pipeline.unet))).hexdigest()[:16]

    def claim_folder(self):
        """Locks the output folder, and rehearses the end there: saves, and lets diffusers load the weights.

        A word that is no file name, a full disk or a loader that installs nothing shows before the training this way.
        """
        # one lock for all runs of a process, as a notebook keeps those that failed
        self.lock = filelock.FileLock(self.output_dir / ".lock", is_singleton=True)
        subject = f"--output_dir {self.output_dir}"
        with failing_as(subject, "another run is using it; give each a folder of its own"):
            self.lock.acquire(timeout=0)
        for leftover in (self.unfinished, self.trash):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with torch.device("meta"):  # without weights
            unet = diffusers.UNet2DConditionModel.from_config(self.pipeline.unet.config)
        with tempfile.TemporaryDirectory(dir=self.output_dir) as folder, failing_as(subject, "a trial save failed"):
            save_weights(Path(folder), self.args, self.pipeline, self.settings)
            unet.load_attn_procs(folder, weight_name=result_files(self.args)[0], _pipeline=self.pipeline)
            unet.get_submodule(next(iter(attention_state_dict(self.pipeline.unet))).rpartition(".")[0])

    def list(self):
        """Checkpoints of the output folder in the order in which they were written."""
        folders = [file.parent for file in self.output_dir.glob(f"checkpoint-*/{CHECKPOINT_NAME}")]
        return sorted(folders, key=lambda folder: (folder / CHECKPOINT_NAME).stat().st_mtime)

    def save(self, step):
        """Writes a checkpoint; only then deletes the oldest ones beyond --checkpoints_total_limit."""
        folder, scaler = self.output_dir / f"checkpoint-{step}", self.accelerator.scaler
        state = {"optimizer": self.optimizer.state_dict()["state"], "lr_scheduler": self.lr_scheduler.last_epoch}
        state["scaler"] = scaler.state_dict() if scaler else None
        record = {"step": step, "settings": self.settings}
        try:
            save_weights(self.unfinished, self.args, self.pipeline, self.settings)
            write_file(self.unfinished / TRAINING_STATE_NAME, to_bytes(torch.save, state))
            write_file(self.unfinished / CHECKPOINT_NAME, json.dumps(record, indent=2).encode())
            self.delete(folder)  # if an earlier run made one
            self.unfinished.rename(folder)
        finally:
            shutil.rmtree(self.unfinished, ignore_errors=True)  # it would fill a full disk
        for old in self.list()[: -self.args.checkpoints_total_limit] if self.args.checkpoints_total_limit else ():
            self.delete(old)

    def delete(self, folder):
        """Deletes a checkpoint if it is there."""
        if folder.exists():
            folder.rename(self.trash)
            shutil.rmtree(self.trash)

    def resume(self):
        """Loads the checkpoint asked for in every process; returns its step, 0 for "latest" if there is none."""
        name, known, step = self.args.resume_from_checkpoint, self.list(), 0
        named = [folder for folder in (self.output_dir / name, Path(name)) if folder.is_dir()]
        for folder in (known[-1:] if name == "latest" else named)[:1]:
            with failing_as(f"--resume_from_checkpoint {folder}", "resume from another one, as this one is corrupt"):
                step = self.load(folder)
            self.accelerator.print(f"Resuming from {folder}, step {step}")
        if not step and name != "latest":
            fail(f"--resume_from_checkpoint {name}", f"no such folder; there are {[f.name for f in known] or 'none'}")
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            fail("--resume_from_checkpoint", f"the processes find steps {steps}; let them share --output_dir")
        return step

    def load(self, folder):
        """Loads weights and states, but no settings, of optimizer and schedule; returns the checkpoint's step."""
        record = json.loads((folder / CHECKPOINT_NAME).read_bytes())
        for name, value in self.settings.items():
            made_with = record["settings"].get(name)
            if made_with != value:
                fail(f"--resume_from_checkpoint {folder}", f"made with {name} {made_with}, not {value}; use the same")
        names = (WEIGHTS_NAME, *modifier_tokens(self.args))
        attention, *embeddings = (torch.load(folder / f"{name}.bin", weights_only=True) for name in names)
        state = torch.load(folder / TRAINING_STATE_NAME, map_location="cpu", weights_only=True)
        self.pipeline.unet.load_state_dict({key: value for key, value in attention.items() if len(value)}, strict=False)
        for i, table in enumerate(embeddings):
            for (_, text_encoder), row in zip(text_parts(self.pipeline), table.values(), strict=True):
                text_encoder.get_input_embeddings().rows.data[i] = row
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.lr_scheduler.last_epoch = state["lr_scheduler"] - 1
        self.lr_scheduler.step()
        return record["step"]


def prove_reload(args, pipeline):
    """Loads the saved files as a user does; fails unless that gives the trained networks. Returns the new pipeline.

    diffusers' `load_attn_procs` installs nothing, silently, without `_pipeline`, so nothing is taken on trust. What was
    trained must be equal to the last bit, outputs within rounding, as diffusers installs another attention kernel.
    """
    device, dtype = pipeline.unet.device, pipeline.unet.conv_in.weight.dtype
    torch.backends.cuda.matmul.allow_tf32 = False  # its rounding would pass for a difference
    trained = probe(args, pipeline)
    DenoisingModel(pipeline).to("cpu")  # room for the fresh one
    with failing_as(args.output_dir, "the files are complete, but were not proven to load"):
        fresh = load_pipeline(args, load_tokenizers(args)).to(device, dtype)  # rounded as the trained ones
        DenoisingModel(fresh).float()
        attention, *words = result_files(args)
        fresh.unet.load_attn_procs(args.output_dir, weight_name=attention, _pipeline=fresh)
        for token, word in zip(modifier_tokens(args), words, strict=True):
            load_word(fresh, args.output_dir, word, token)
        reloaded = probe(args, fresh)
    for name, value in trained.items():
        tolerance = 1e-3 * value.abs().max() if name == "prediction" else 0
        if name not in reloaded or not torch.allclose(reloaded[name], value, rtol=0, atol=tolerance):
            fail(args.output_dir, f"its files are kept, but diffusers {diffusers.__version__} loads another {name}")
    fresh.unet.set_attn_processor(attention_processor.AttnProcessor2_0())  # what the loader installs is not fused
    add_attention_processors(fresh.unet, args.freeze_model)
    fresh.unet.to(device).load_state_dict(reloaded, strict=False)
    fresh.to(dtype).vae.to(pipeline.vae.dtype)
    return fresh


def load_word(pipeline, folder, file, token):
    """Loads a word as a user does; SDXL's file has an embedding for each text encoder."""
    parts = text_parts(pipeline)
    if len(parts) == 1:
        return pipeline.load_textual_inversion(folder, weight_name=file)
    table = torch.load(Path(folder, file), weights_only=True) if file.endswith("bin") else load_file(Path(folder, file))
    for (tokenizer, text_encoder), name in zip(parts, XL_NAMES, strict=True):
        pipeline.load_textual_inversion(table[name], token=token, text_encoder=text_encoder, tokenizer=tokenizer)


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
@torch.no_grad()
def probe(args, pipeline):
    """What is trained, and the UNet's prediction for a fixed prompt and noise, by name; in float32 on the CPU."""
    unet, found, ids = pipeline.unet.float(), attention_state_dict(pipeline.unet), []
    prompt = " ".join(["photo of a", *modifier_tokens(args)])
    for tokenizer, text_encoder in text_parts(pipeline):
        words = torch.tensor(tokenizer.convert_tokens_to_ids(modifier_tokens(args)), dtype=torch.long)
        rows = text_encoder.float().get_input_embeddings()(words.to(unet.device))
        found[f"embeddings {len(ids)}"] = rows.cpu()
        ids.append(tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids)
    cells = min(32, args.resolution // pipeline.vae_scale_factor)  # the attention that diffusers loads is not fused
    noise = torch.randn(1, unet.config.in_channels, cells, cells, generator=torch.Generator().manual_seed(0))
    ids += [torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])] if len(ids) > 1 else []
    prediction = DenoisingModel(pipeline)(*(x.to(unet.device) for x in (noise, torch.tensor([500]), *ids)))
    return found | {"prediction": prediction.cpu()}


def result_files(args):
    """Names of the files that the result is to be loaded from: the attention's, then one for each word."""
    ending = "bin" if args.no_safe_serialization else "safetensors"
    return [f"{name}.{ending}" for name in (WEIGHTS_NAME, *modifier_tokens(args))]


def usage_snippet(args, pipeline, concepts, weights):
    """Python lines that load the result (a folder or hub repository) into the base model and make a picture."""
    prompt, base = args.validation_prompt or concepts[0].instance_prompt, repr(args.pretrained_model_name_or_path)
    base += "".join(f", {key}={vars(args)[key]!r}" for key in ("revision", "variant") if vars(args)[key])
    attention, *words = result_files(args)
    imports, folder, lines = [], repr(weights), []
    if len(text_parts(pipeline)) == 1:
        lines += [f"pipeline.load_textual_inversion(weights, weight_name={word!r})" for word in words]
    else:  # a file of SDXL's has an embedding for each text encoder
        reader = "torch.load" if args.no_safe_serialization else "load_file"
        imports += [] if args.no_safe_serialization else ["from safetensors.torch import load_file"]
        if not Path(weights).is_dir():
            imports.append("from huggingface_hub import snapshot_download")
            folder = f"snapshot_download({folder})"
        for token, word in zip(modifier_tokens(args), words, strict=True):
            lines.append(f"word = {reader}(f'{{weights}}/{word}')")
            for name, end in zip(XL_NAMES, ("", "_2"), strict=True):
                part = f"text_encoder=pipeline.text_encoder{end}, tokenizer=pipeline.tokenizer{end}"
                lines.append(f"pipeline.load_textual_inversion(word[{name!r}], token={token!r}, {part})")
    imports, lines = ("".join(f"{line}\n" for line in part) for part in (imports, lines))
    return f"""import torch
from diffusers import DiffusionPipeline
{imports}
# on a GPU: .to('cuda', torch.float16)
pipeline = DiffusionPipeline.from_pretrained({base}).to(torch.float32)
weights = {folder}
pipeline.unet.load_attn_procs(weights, weight_name={attention!r}, _pipeline=pipeline)
{lines}image = pipeline({prompt!r}, num_inference_steps=100, guidance_scale=6.0, eta=1.0).images[0]
image.save('picture.png')"""


def finish(args, accelerator, pipeline, step, concepts, repository):
    """Draws the final pictures with the reloaded pipeline, says where everything is, and uploads it."""
    folder, images = Path(args.output_dir), []
    try:
        images = validate(args, accelerator, pipeline, step)
        for i, image in enumerate(images):
            image.save(folder / f"image_{i}.png")
        steps = [0, *range(args.validation_steps, step, args.validation_steps), step]
        files = [folder / "validation" / f"step-{step:06d}.png" for step in steps]  # an earlier run may have drawn them
        sheets = [Image.open(file) for file in files if file.is_file()]
        if len(sheets) > 1 and images:
            make_image_grid([sheets[0], sheets[-1]], 2, 1).save(folder / "before_after.png")
            first = (0, 0, args.resolution, args.resolution + sheets[0].height % args.resolution)  # and the label above
            shown = np.linspace(0, len(sheets) - 1, min(8, len(sheets))).round().astype(int)
            make_image_grid([sheets[i].crop(first) for i in shown], 1, len(shown)).save(folder / "steps.png")
    except Exception as error:  # the weights are saved and proven: whatever it is, it costs the pictures alone
        print(f"warning: pictures are missing ({textwrap.shorten(str(error), 200)})", file=sys.stderr)
    usage = usage_snippet(args, pipeline, concepts, str(folder))
    print(f"Saved to {folder}; loads as trained (checked). To use it:\n\n{usage}")
    if repository:
        upload(args, pipeline, concepts, [f"image_{i}.png" for i in range(len(images))], repository)


def upload(args, pipeline, concepts, pictures, repository):
    """Writes the model card and uploads the result: exactly the files that make it up, by name."""
    base, prompts = args.pretrained_model_name_or_path, [concept.instance_prompt for concept in concepts]
    is_xl = len(text_parts(pipeline)) > 1
    metadata = ModelCardData(
        license="openrail++" if is_xl else "creativeml-openrail-m",
        base_model=None if Path(base).is_dir() else base,  # the hub refuses what is not on it
        instance_prompt=", ".join(prompts),
        tags=["text-to-image", "diffusers", f"stable-diffusion{'-xl' if is_xl else ''}", "custom-diffusion"],
        widget=[{"text": args.validation_prompt, "output": {"url": picture}} for picture in pictures] or None,
    )
    shown = f"`{args.validation_prompt}`:\n\n" + " ".join(f"![](./{picture})" for picture in pictures)
    card = f"""---
{metadata.to_yaml()}
---

# {repository}

Custom Diffusion weights for `{base}`, trained on pictures of {", ".join(f"`{prompt}`" for prompt in prompts)}.

```python
{usage_snippet(args, pipeline, concepts, repository)}
```

{shown if pictures else ""}
"""
    folder = Path(args.output_dir)
    (folder / "README.md").write_text(card, encoding="utf-8")
    endings = ("bin",) if args.no_safe_serialization else ("bin", "safetensors")
    files = [f"{name}.{ending}" for name in (WEIGHTS_NAME, *modifier_tokens(args)) for ending in endings]
    files += ["README.md", *pictures, *(["before_after.png", "steps.png"] if pictures else [])]
    call = f"upload_folder(repo_id={repository!r}, folder_path={str(folder)!r}, allow_patterns={files})"
    later = shlex.join(["python", "-c", f"from huggingface_hub import upload_folder; {call}"])
    with failing_as(f"--push_to_hub {repository}", f"everything is in {folder}; later: {later}"):
        commit = upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files, token=args.hub_token)
    print(f"\nUploaded to {commit.repo_url}")


if __name__ == "__main__":
    gc.freeze()  # collections need not look at what the imports made: the one at exit alone takes a second
    main(parse_args())
