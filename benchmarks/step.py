#!/usr/bin/env python3
"""Measures a training step: time, its parts, memory, and how far it is from what the machine can do.

    python benchmarks/step.py [--size mid] [--tables variants memory growth processes apart data startup] [--rounds 9]
    python benchmarks/step.py --reference train_custom_diffusion_of_diffusers.py

Each row is a process of its own that runs a script's `main` on a model with random weights (made from a config, so
nothing is downloaded) and stops between steps until it is its turn: rows are compared interleaved, a step or a few at a
time, and while one runs the others wait. "exact" is the trainer's default, "cached" has --cache_latents, "reference" is
the example script of diffusers, examples/custom_diffusion/train_custom_diffusion.py, unchanged.

Sizes: tiny, to see that it works; mid, for a CPU, with 8 attention heads as Stable Diffusion 1.x has; mid2, the same
with heads of 32 numbers, so that attention has the share of a step that it has there; sd14 and sdxl, the geometries of
Stable Diffusion 1.4 and XL, for a GPU. A GPU is used if there is one. The memory table's rows run one after the other.
Models are kept in results/models, figures in results/step/<size>.json.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from multiprocessing import get_context, set_start_method
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MODELS, RESULTS = ROOT / "results" / "models", ROOT / "results" / "step"
PARTS = ("data", "VAE", "text encoder", "UNet forward", "backward", "optimizer", "rest")
TRAINER = str(ROOT / "train_custom_diffusion.py")
WORDS = ("cat", "dog", "pot", "tree", "house")  # initializers and classes


@dataclass(frozen=True)
class Size:
    """Geometry of a Stable Diffusion, of an XL if it has two text encoders, each (width, layers, heads)."""

    resolution: int  # in pixels
    unet: tuple  # channels
    text: tuple
    vae: tuple  # channels
    heads: int | tuple = 8
    layers: int = 2
    norm_groups: int = 32
    text_2: tuple = ()
    blocks: int | tuple = 1  # of each of the UNet's transformers


TINY_VAE, MID, MID_VAE, VAE = (8, 8, 16, 16), (64, 128, 256, 256), (32, 64, 128, 128), (128, 256, 512, 512)
SIZES = {
    "tiny": Size(64, (32, 32), (32, 2, 4), TINY_VAE, layers=1, norm_groups=8),
    "tinyxl": Size(64, (32, 32), (32, 2, 4), TINY_VAE, layers=1, norm_groups=8, text_2=(32, 2, 4)),
    "mid": Size(256, MID, (256, 12, 4), MID_VAE),
    "mid2": Size(256, MID, (256, 12, 4), MID_VAE, heads=(2, 4, 8, 8)),
    "sd14": Size(512, (320, 640, 1280, 1280), (768, 12, 12), VAE),
    "sdxl": Size(1024, (320, 640, 1280), (768, 12, 12), VAE, (5, 10, 20), text_2=(1280, 32, 20), blocks=(1, 2, 10)),
}


@dataclass(frozen=True)
class Setup:
    """One row: how a step is taken."""

    name: str
    precision: str = "no"
    flags: tuple = ()
    script: str = TRAINER
    dynamo: str | None = None  # torch.compile's backend
    batch: int = 2  # instance pictures; as many class pictures
    resolution: int | None = None
    concepts: int = 1
    processes: int = 1
    threads: int | None = None


CACHED, CHECKPOINTING = ("--cache_latents=2",), ("--gradient_checkpointing",)


def tables(size, reference=None):
    """Name -> rows of every table, with those of the reference script, if one is given; the first is compared with."""
    variants, memory = [], []
    for precision, name in (("no", "fp32"), ("bf16", "bf16")):
        theirs = [Setup(f"reference {name}", precision, script=reference)] if reference else []
        exact, cached = Setup(f"exact {name}", precision), Setup(f"cached {name}", precision, CACHED)
        variants += [*theirs, exact, cached, replace(cached, name=f"{cached.name}, compiled", dynamo="inductor")]
        memory += [replace(row, batch=1) for row in (*theirs, exact, cached)]
        for row in memory[-2:]:
            memory.append(replace(row, name=f"{row.name}, checkpointing", flags=row.flags + CHECKPOINTING))
    growth = [Setup(f"batch {n} + {n}", batch=n) for n in (1, 2, 4, 8)]
    pixels = (256, 384, 512) if size != "tiny" else (64, 96)
    growth += [Setup(f"{n} pixels", resolution=n, batch=1) for n in pixels]
    growth += [Setup(f"{n} concept{'s' * (n > 1)}", concepts=n) for n in (1, 2, 5)]
    processes = [Setup(f"{n} process{'es' * (n > 1)}", processes=n, threads=1) for n in (1, 2)]
    apart = [Setup("exact"), Setup("kept apart", flags=("--keep_apart",))]
    return {"variants": variants, "memory": memory, "growth": growth, "processes": processes, "apart": apart}


# ---------- Model and pictures ----------------------------------------------------------------------------------


def make_model(name):
    """Folder of a Stable Diffusion of a size with random weights, made when it is first asked for."""
    # what one version of transformers saves another may not read
    folder, size = MODELS / f"{name}-transformers-{metadata.version('transformers')}", SIZES[name]
    if folder.exists():
        return folder
    os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def text_encoder(kind, width, layers, heads):
        config = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        return kind(CLIPTextConfig(**config, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=49408))

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets" / "model" / "tokenizer")
    down = [*["CrossAttnDownBlock2D"] * (len(size.unet) - 1), "DownBlock2D"]
    kind, more, conditions = diffusers.StableDiffusionPipeline, {"safety_checker": None, "feature_extractor": None}, {}
    if size.text_2:
        kind, more, down = diffusers.StableDiffusionXLPipeline, {"tokenizer_2": tokenizer}, down[::-1]
        conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}
        conditions["projection_class_embeddings_input_dim"] = size.text_2[0] + 6 * 256
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # where random numbers take no time
        networks = {
            "unet": diffusers.UNet2DConditionModel(
                sample_size=size.resolution // 8,
                block_out_channels=size.unet,
                layers_per_block=size.layers,
                transformer_layers_per_block=size.blocks,
                cross_attention_dim=size.text[0] + sum(size.text_2[:1]),
                attention_head_dim=size.heads,
                norm_num_groups=size.norm_groups,
                down_block_types=down,
                up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
                **conditions,
            ),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=size.vae,
                down_block_types=["DownEncoderBlock2D"] * len(size.vae),
                up_block_types=["UpDecoderBlock2D"] * len(size.vae),
                layers_per_block=size.layers,
                latent_channels=4,
                norm_num_groups=size.norm_groups if size.layers > 1 else 4,
                sample_size=size.resolution,
            ),
            "text_encoder": text_encoder(CLIPTextModel, *size.text),
        }
        if size.text_2:
            networks["text_encoder_2"] = text_encoder(CLIPTextModelWithProjection, *size.text_2)
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    pipeline = kind(**networks, **more, tokenizer=tokenizer, scheduler=diffusers.PNDMScheduler(**noise))
    unfinished = folder.with_name(f".{name}")
    pipeline.to(torch.float16).save_pretrained(unfinished)
    unfinished.rename(folder)
    del networks, pipeline
    gc.collect()
    torch.cuda.empty_cache()  # the rows need the memory
    return folder


def make_pictures(folder, count, size=(768, 768), cell=16):
    """JPEG files of size (width, height) in pixels: smooth noise of cells so many pixels wide."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (size[1] // cell, size[0] // cell, 3), np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)


def command_line(setup, size, folder):
    """The script's flags for a row; its output is put into `folder`, the rows' pictures beside it."""
    tokens, concepts = [f"<new{i}>" for i in range(setup.concepts)], []
    for token, word in zip(tokens, WORDS, strict=False):
        directories = [folder.parent / "pictures" / word / kind for kind in ("instance", "class")]
        for directory, count in zip(directories, (5, 20), strict=True):
            if not directory.exists():
                make_pictures(directory, count)
        keys = ("instance_prompt", "class_prompt", "instance_data_dir", "class_data_dir")
        concepts.append(dict(zip(keys, (f"photo of a {token} {word}", word, *map(str, directories)), strict=True)))
    (folder / "concepts.json").write_text(json.dumps(concepts))
    values = {
        "pretrained_model_name_or_path": make_model(size),
        "concepts_list": folder / "concepts.json",
        "modifier_token": "+".join(tokens),
        "initializer_token": "+".join(WORDS[: setup.concepts]),
        "num_class_images": 20,
        "resolution": setup.resolution or SIZES[size].resolution,
        "train_batch_size": setup.batch,
        "mixed_precision": setup.precision,
        "max_train_steps": 10**6,
        "checkpointing_steps": 10**6,
        "output_dir": folder / "output",
    }
    if setup.script == TRAINER:
        values["report_to"] = "none"  # which the reference does not know
    return ["--with_prior_preservation", *(f"--{name}={value}" for name, value in values.items()), *setup.flags]


# ---------- One row: a process that takes steps when told ---------------------------------------------------------


class Worker:
    """Runs a script's main and obeys the parent where a step calls DDPMScheduler.add_noise, which it does once.

    It takes (command, number of steps) from the pipe and answers when the steps are done: "time" with the seconds a
    step, from that place in one to that in the next; "parts" with the seconds of each part a step; "flops" with the
    FLOPs of a step. "limit", "memory", "checkpoint", "pictures" and "proof" are answered at once; "end" ends it.
    """

    def __init__(self, pipe, script, setup):
        import torch

        self.pipe, self.script, self.setup, self.torch = pipe, script, setup, torch
        self.command, self.left, self.start, self.load_memory = None, 0, 0.0, None
        self.parts, self.is_cuda = {}, torch.cuda.is_available()

    def synchronize(self):
        if self.is_cuda:
            self.torch.cuda.synchronize()

    def timed(self, part, function):
        """The function, whose time counts as that part's while parts are asked for."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if self.command != "parts":
                return function(*args, **kwargs)
            self.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.synchronize()
            self.parts[part] = self.parts.get(part, 0) + time.perf_counter() - start
            return result

        return wrapper

    def install(self):
        """Puts clocks around what a step calls, whichever script it is, and stops it between two steps."""
        from accelerate import Accelerator
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        optimizer = self.torch.optim.AdamW
        clocks = [("data", self.script.CustomDiffusionDataset, "__getitem__"), ("VAE", AutoencoderKL, "encode")]
        if not self.setup.dynamo:  # compiled, there is one forward
            clocks += [("text encoder", kind, "forward") for kind in (CLIPTextModel, CLIPTextModelWithProjection)]
            clocks.append(("UNet forward", UNet2DConditionModel, "forward"))
        clocks += [("backward", Accelerator, "backward"), ("optimizer", Accelerator, "clip_grad_norm_")]
        clocks += [("optimizer", optimizer, "step"), ("optimizer", optimizer, "zero_grad")]
        for part, kind, name in clocks:
            setattr(kind, name, self.timed(part, getattr(kind, name)))
        add_noise = DDPMScheduler.add_noise

        def obedient(*args):
            if not self.left:
                self.finish()
                self.obey()
            self.left -= 1
            return add_noise(*args)

        DDPMScheduler.add_noise = obedient
        if self.setup.script == TRAINER:
            self.script.check_prediction = lambda *_: None  # It adds noise before the first step.
            init, build_dataset = self.script.Checkpoints.__init__, self.script.build_dataset

            def initialized(checkpoints, *args):
                init(checkpoints, *args)
                self.checkpoints = checkpoints

            def built(*args):
                self.run = args
                return build_dataset(*args)

            self.script.Checkpoints.__init__, self.script.build_dataset = initialized, built

    def count(self):
        """Starts to count FLOPs: uncompiled, and on a CPU with attention written out, which the counter knows there."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        self.counting = contextlib.ExitStack()
        self.counting.enter_context(self.torch.compiler.set_stance("force_eager"))
        if not self.is_cuda:
            self.counting.enter_context(sdpa_kernel(SDPBackend.MATH))
        self.counter = self.counting.enter_context(FlopCounterMode(display=False))

    def finish(self):
        """Answers for the steps that are done."""
        if self.command is None:
            return
        self.synchronize()
        seconds = (time.perf_counter() - self.start) / self.steps
        if self.command == "parts":
            parts = {part: value / self.steps for part, value in self.parts.items()}
            self.pipe.send(parts | {"rest": seconds - sum(parts.values())})
        elif self.command == "flops":
            self.counting.close()
            self.pipe.send(self.counter.get_total_flops() // self.steps)
        else:
            self.pipe.send(seconds)

    def obey(self):
        """Answers until steps are asked for."""
        if self.load_memory is None:  # before the first step
            self.load_memory = self.memory()
        while True:
            self.command, self.steps = self.pipe.recv()
            if self.command == "end":
                raise SystemExit
            if self.command in ("limit", "loading", "memory", "checkpoint", "pictures", "proof"):
                self.pipe.send(getattr(self, self.command)())
                continue
            self.left, self.parts = self.steps, {}
            if self.command == "flops":
                self.count()
            self.synchronize()
            self.start = time.perf_counter()
            return

    def limit(self):
        """FLOPs a second of a matrix product at this row's precision: the best of five."""
        torch, n = self.torch, 8192 if self.is_cuda else 1024
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.setup.precision, torch.float32)
        left, right = torch.randn(2, n, n, dtype=dtype, device="cuda" if self.is_cuda else "cpu")
        times = []
        for _ in range(5):
            self.synchronize()
            start = time.perf_counter()
            left @ right
            self.synchronize()
            times.append(time.perf_counter() - start)
        return 2 * n**3 / min(times)

    def memory(self):
        """Peak in bytes since the last call: allocated on a GPU, resident on a CPU."""
        if self.is_cuda:
            peak = self.torch.cuda.max_memory_allocated()
            self.torch.cuda.reset_peak_memory_stats()
            return peak
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        Path("/proc/self/clear_refs").write_text("5")
        return peak

    def checkpoint(self):
        """Size in bytes of the trainer's checkpoint."""
        if self.setup.script != TRAINER:
            return None
        self.checkpoints.save(0)
        folder = self.checkpoints.result.folder / "checkpoint-0"
        return sum(file.stat().st_size for file in folder.iterdir())

    def loading(self):
        """Peak in bytes until the first step began."""
        return self.load_memory

    def pictures(self):
        """Peak in bytes while the trainer draws validation pictures between two steps."""
        args, accelerator, pipeline, *_ = self.run
        args.validation_prompt = ["photo"]
        self.memory()
        self.script.validate(args, accelerator, pipeline, 1)
        return self.memory()

    def proof(self):
        """Seconds and peak in bytes of the run's end: it is saved, proved to load, and draws. No step can follow."""
        result = self.checkpoints.result
        args, accelerator, pipeline, concepts, base_tokenizers = self.run
        args.validation_prompt = ["photo"]
        self.memory()
        start = time.perf_counter()
        result.save(pipeline, result.folder, result.endings)
        self.checkpoints.free()
        self.script.prove_reload(result, accelerator, pipeline, base_tokenizers, concepts)
        self.script.validate(args, accelerator, pipeline, 1)
        return time.perf_counter() - start, self.memory()


def work(pipe, setup, words, rank, port, log):
    """What the process of a row does; of several processes the first obeys and the others keep in step with it."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    threads = setup.threads or os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if setup.dynamo:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = setup.dynamo.upper()  # as accelerate launch --dynamo_backend does
    if setup.processes > 1:
        os.environ |= {"WORLD_SIZE": str(setup.processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    sys.path.insert(0, str(Path(setup.script).parent))
    script = importlib.import_module(Path(setup.script).stem)
    if not torch.cuda.is_available():
        words.append("--dataloader_num_workers=0")  # idle rows must not prepare pictures meanwhile
    if sys.platform == "linux":  # a spawned process would spawn its data loader's workers, too
        set_start_method("fork", force=True)
    if rank == 0:
        Worker(pipe, script, setup).install()
    script.main(script.parse_args(words))


class Row:
    """The parent's side of a row."""

    def __init__(self, setup, size, folder):
        self.setup, self.times, self.limits = setup, [], []
        self.log = Path(f"{folder}.log")
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        port = random.randrange(20000, 60000)
        words = command_line(setup, size, folder)
        self.children = [
            context.Process(target=work, args=(other, setup, words, rank, port, self.log))
            for rank in range(setup.processes)
        ]
        for child in self.children:
            child.start()
        other.close()

    def ask(self, command, steps=1):
        self.pipe.send((command, steps))
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            raise SystemExit(f"{self.setup.name} ended:\n{self.log.read_text()[-3000:]}") from None

    def end(self):
        with contextlib.suppress(OSError):
            self.pipe.send(("end", 0))
            self.children[0].join(20)
        for child in self.children:
            child.kill()
            child.join()


def last_line(error):
    """The last line of what an exception says, or its name, in at most 200 letters."""
    return (str(error) or type(error).__name__).strip().splitlines()[-1][:200]


def measure(setups, size, rounds, steps, more=()):
    """Runs the rows interleaved; returns a list of dicts with what was measured (seconds, bytes, FLOPs).

    `more` has commands of `Worker` that are given to each row in the end, and in the dicts their answers. A row that
    fails to start is left out, if there is another; an answer that fails is None, and "failure" has the last line.
    """
    scratch, rows, failures = Path(tempfile.mkdtemp()), [], []
    try:
        for i, setup in enumerate(setups):
            folder = scratch / str(i)
            folder.mkdir()
            start = time.perf_counter()
            row = Row(setup, size, folder)
            try:
                row.ask("time", 3)  # one at a time: starting takes memory and processor
                row.start, row.start_memory = time.perf_counter() - start, row.ask("memory")
            except SystemExit as failure:
                failures.append(failure)
                row.end()
                print(f"  {failure}", file=sys.stderr, flush=True)
                continue
            rows.append(row)
            print(f"  {setup.name} is ready", file=sys.stderr, flush=True)
        if not rows:
            raise failures[0]
        for _ in range(rounds):
            for row in rows:
                row.times.append(row.ask("time", steps))
        for row in rows:
            row.memory = row.ask("memory")
            row.limits = [row.ask("limit") for _ in range(3)]
        for row in rows:
            row.parts = row.ask("parts", 3 * steps)
            row.answers = dict.fromkeys((*more, "failure"))
            try:
                for command in more:
                    row.answers[command] = row.ask(command)
            except SystemExit as failure:  # the row has ended, but what it has measured counts
                row.answers["failure"] = last_line(failure)
                print(f"  {failure}", file=sys.stderr, flush=True)
        keys = ("start", "start_memory", "times", "memory", "limits", "parts")
        return [asdict(row.setup) | {key: getattr(row, key) for key in keys} | row.answers for row in rows]
    finally:
        for row in rows:
            row.end()
        shutil.rmtree(scratch)


# ---------- Tables ----------------------------------------------------------------------------------------------


def spread(values, digits=3):
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def share_of_limit(row):
    """FLOPs a second of a row's median step, as a share of those of a matrix product."""
    return row["flops"] / statistics.median(row["times"]) / statistics.median(row["limits"])


def print_table(name, rows):
    """Markdown: times, their parts, memory and the share of the machine's limit of a table's rows."""
    first = rows[0]["times"]
    head = ["", "s a step", "speed-up", "pictures/s", *PARTS, "GiB", "checkpoint MB", "GFLOP", "of the limit"]
    print(f"\n{name}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        median, parts = statistics.median(row["times"]), row["parts"]
        ratio = statistics.median(a / b for a, b in zip(first, row["times"], strict=True))
        pictures = 2 * row["batch"] * row["processes"]
        shown = [f"{parts[part]:.3f}" if part in parts else "" for part in PARTS]
        cells = [row["name"], spread(row["times"]), f"{ratio:.2f}", f"{pictures / median:.2f}", *shown]
        cells += [f"{row['memory'] / 2**30:.2f}", f"{row['checkpoint'] / 1e6:.1f}" if row.get("checkpoint") else ""]
        cells += [f"{row['flops'] / 1e9:.0f}", f"{share_of_limit(row):.0%}"] if row.get("flops") else ["", ""]
        print(f"| {' | '.join(cells)} |")


IMPORTS = """
import accelerate, diffusers, huggingface_hub, numpy, PIL.Image, safetensors.torch, torch, tqdm.auto, transformers
import torch.nn.functional, torch.utils.checkpoint, torch.utils.tensorboard, wandb
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import AttnProcsLayers
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from diffusers.optimization import get_scheduler
from transformers import CLIPTextModel, CLIPTokenizer
"""


def startup(rounds):
    """Markdown table: seconds from a command to what it is for, interleaved."""
    flags = ["--pretrained_model_name_or_path=assets/model", "--instance_data_dir=assets/instance/cat"]
    flags += ["--instance_prompt=photo of a <new1> cat", "--modifier_token=<new1>", "--resolution=128"]
    flags += ["--max_train_steps=1"]
    script = [sys.executable, "train_custom_diffusion.py"]
    commands = {
        "everything imported eagerly (DIFFUSERS_SLOW_IMPORT=1)": [sys.executable, "-c", IMPORTS],
        "the usual imports": [sys.executable, "-c", IMPORTS],
        "the trainer's first step, embedded model": [*script, *flags, "--report_to=none"],
        "--help": [*script, "--help"],
    }
    times = {name: [] for name in commands}
    for _ in range(rounds):
        for name, words in commands.items():
            env = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"DIFFUSERS_SLOW_IMPORT": "1"} if "eager" in name else {})
            with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
                command = [*words, f"--output_dir={folder}/run"] if "first step" in name else words
                start = time.perf_counter()
                process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.PIPE)
                if "first step" in name:
                    while b"steps:" not in process.stderr.read1():  # the progress bar of the training
                        assert process.poll() is None
                else:
                    assert process.wait() == 0
                times[name].append(time.perf_counter() - start)
                process.kill()
                process.communicate()
    print("\nstartup\n\n| until | s | share |\n| --- | --- | --- |")
    first = times[next(iter(times))]
    for name, values in times.items():
        share = statistics.median(b / a for a, b in zip(first, values, strict=True))
        print(f"| {name} | {spread(values)} | {share:.2f} |")
    return times


def data(rounds):
    """Markdown table: draws a second of the trainer's dataset from pictures of 12 megapixels, interleaved."""
    from torch.utils.data import DataLoader
    from transformers import CLIPTokenizer

    import train_custom_diffusion as trainer

    # what is decoded is kept as far as there is room, here for none
    kinds = {"decoded once": 0, "decoded at every draw": trainer.DECODED_BYTES}
    rates = {kind: {workers: [] for workers in (0, 2, 4)} for kind in kinds}
    tokenizer = [CLIPTokenizer.from_pretrained(ROOT / "assets" / "model" / "tokenizer")]
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder, "cat"), 5, (4000, 3000), cell=4)
        prompt = "photo of a <new1> cat"
        concepts = [trainer.Concept(prompt, [(file, prompt) for file in sorted(Path(folder, "cat").iterdir())])]
        for workers, kind in list(itertools.product((0, 2, 4), kinds)) * rounds:
            options = {"center_crop": False, "hflip": True, "alpha_mask": False, "aug": True}
            options |= {"num_train_timesteps": 1000, "seed": 0}
            dataset = trainer.CustomDiffusionDataset(concepts, tokenizer, tokenizer, 512, (4, 64, 64), **options)
            dataset.decoded_bytes = kinds[kind]
            loader = DataLoader(dataset, 4, sampler=range(144), collate_fn=trainer.collate_fn, num_workers=workers)
            for i, _ in enumerate(loader):
                if i == 15:  # by now every worker has met every picture
                    start = time.perf_counter()
            rates[kind][workers].append(80 / (time.perf_counter() - start))
    print("\ndata\n\n| draws a second | 0 workers | 2 workers | 4 workers |\n|" + 4 * " --- |")
    for kind, values in rates.items():
        print(f"| {kind} | {' | '.join(spread(rate, 0) for rate in values.values())} |")
    return rates


def describe_device():
    """Name of the GPU, or the processor's with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def parse_args():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure a training step.")
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--tables", nargs="+", choices=[*tables("mid"), "data", "startup"], default=["variants"])
    parser.add_argument(
        "--reference", type=os.path.abspath, help="the example script of diffusers, for rows of its own"
    )
    parser.add_argument("--only", help="regular expression: rows whose name it matches")
    parser.add_argument("--rounds", type=int, default=9, help="how often each row has its turn")
    parser.add_argument("--steps", type=int, default=1, help="steps a turn; on a GPU some 20")
    return parser.parse_args()


def main():
    args = parse_args()
    import torch

    device, version = describe_device(), torch.__version__
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{args.size}.json"
    report = json.loads(file.read_text()) if file.exists() else {"tables": {}}
    report |= {"size": args.size, "device": device, "torch": version}
    print(f"{args.size}, {device}, torch {version}, {args.rounds} rounds: median (range)")
    if args.reference and not importlib.util.find_spec("torchvision"):
        print("The reference is left out: it needs torchvision.")
        args.reference = None
    for name in args.tables:
        if name in ("data", "startup"):
            report[name] = {"data": data, "startup": startup}[name](args.rounds)
        else:
            setups = [s for s in tables(args.size, args.reference)[name] if re.search(args.only or "", s.name)]
            if not torch.cuda.is_available():  # torch 2.13's inductor is wrong on a CPU, and the trainer refuses it
                setups = [setup for setup in setups if not setup.dynamo]
            groups = [[setup] for setup in setups] if name == "memory" else [setups]
            more = ("checkpoint", "flops") if name == "variants" else ()
            rows = [row for g in groups for row in measure(g, args.size, args.rounds, args.steps, more)]
            print_table(name, rows)
            report["tables"][name] = rows
        file.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
