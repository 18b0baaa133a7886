#!/usr/bin/env python3
"""Measures a training step: time, its parts, memory, and how far it is from what the machine can do.

    python benchmarks/step.py [--size mid] [--tables variants memory growth processes startup] [--rounds 9]
    python benchmarks/step.py --plot results/step/mid.json assets/step.png

Each row is a process of its own that runs the trainer's `main` on a model with random weights (made from a config,
so nothing is downloaded) and stops between steps until it is its turn: rows are compared interleaved, a step or a
few at a time, and while one runs the others wait. "usual" is the same step as scripts usually do it: the whole
embedding table in AdamW, its gradient's mask made anew at each step, the VAE called with autograd on and in NCHW, the
loss read back after each step. "exact" is the trainer's default, "cached" has --cache_latents.

Sizes: tiny, to see that it works; mid, for a CPU, with 8 attention heads as Stable Diffusion 1.x has; mid2, the same
with heads of 32 numbers, so that attention has the share of a step that it has there; sd14, the geometry of Stable
Diffusion 1.4, for a GPU. A GPU is used if there is one. The memory table's rows run one after the other.
Models are kept in results/models, figures in results/step/<size>.json.
"""

import argparse
import contextlib
import functools
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
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MODELS, RESULTS = ROOT / "results" / "models", ROOT / "results" / "step"
PARTS = ("data", "VAE", "text encoder", "UNet forward", "backward", "optimizer", "rest")
WORDS = ("cat", "dog", "pot", "tree", "house")  # initializers and classes


@dataclass(frozen=True)
class Size:
    """Geometry of a Stable Diffusion: pixels a side, channels of UNet and VAE, width and layers of the text encoder."""

    resolution: int
    unet: tuple
    text: int
    text_layers: int
    text_heads: int
    vae: tuple
    attention_heads: int | tuple = 8
    layers: int = 2
    norm_groups: int = 32


SIZES = {
    "tiny": Size(64, (32, 32), 32, 2, 4, (8, 8, 16, 16), layers=1, norm_groups=8),
    "mid": Size(256, (64, 128, 256, 256), 256, 12, 4, (32, 64, 128, 128)),
    "mid2": Size(256, (64, 128, 256, 256), 256, 12, 4, (32, 64, 128, 128), attention_heads=(2, 4, 8, 8)),
    "sd14": Size(512, (320, 640, 1280, 1280), 768, 12, 12, (128, 256, 512, 512)),
}


@dataclass(frozen=True)
class Setup:
    """One row: how a step is taken."""

    name: str
    precision: str = "no"
    flags: tuple = ()
    usual: bool = False
    compiled: bool = False
    batch: int = 2  # instance pictures; as many class pictures
    resolution: int | None = None
    concepts: int = 1
    processes: int = 1
    threads: int | None = None


CACHED, CHECKPOINTING = ("--cache_latents=2",), ("--gradient_checkpointing",)


def tables(size):
    """Name -> rows of every table; the first row of a table is what the others are compared with."""
    bf16 = {"precision": "bf16"}
    variants = [
        Setup("usual fp32", usual=True),
        Setup("exact fp32"),
        Setup("cached fp32", flags=CACHED),
        Setup("cached fp32, compiled", flags=CACHED, compiled=True),
        Setup("usual bf16", usual=True, **bf16),
        Setup("exact bf16", **bf16),
        Setup("cached bf16", flags=CACHED, **bf16),
        Setup("cached bf16, compiled", flags=CACHED, compiled=True, **bf16),
    ]
    memory = [Setup("usual fp32", usual=True, batch=1)]
    for precision in ("no", "bf16"):
        for recompute in ((), CHECKPOINTING):
            for cached in ((), CACHED):
                name = f"{'cached' if cached else 'exact'} {'fp32' if precision == 'no' else precision}"
                name += ", checkpointing" if recompute else ""
                memory.append(Setup(name, precision, cached + recompute, batch=1))
    growth = [Setup(f"batch {n} + {n}", batch=n) for n in (1, 2, 4, 8)]
    pixels = (256, 384, 512) if size != "tiny" else (64, 96)
    growth += [Setup(f"{n} pixels", resolution=n, batch=1) for n in pixels]
    growth += [Setup(f"{n} concept{'s' * (n > 1)}", concepts=n) for n in (1, 2, 5)]
    processes = [Setup(f"{n} process{'es' * (n > 1)}", processes=n, threads=1) for n in (1, 2)]
    return {"variants": variants, "memory": memory, "growth": growth, "processes": processes}


# ---------- Model and pictures ----------------------------------------------------------------------------------


def make_model(name):
    """Folder of a Stable Diffusion of a size with random weights, made when it is first asked for."""
    # what one version of transformers saves another may not read
    folder, size = MODELS / f"{name}-transformers-{metadata.version('transformers')}", SIZES[name]
    if folder.exists():
        return folder
    os.environ["DIFFUSERS_VERBOSITY"] = "error"
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    down = ["CrossAttnDownBlock2D"] * (len(size.unet) - 1) + ["DownBlock2D"]
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=size.resolution // 8,
            block_out_channels=size.unet,
            layers_per_block=size.layers,
            cross_attention_dim=size.text,
            attention_head_dim=size.attention_heads,
            norm_num_groups=size.norm_groups,
            down_block_types=down,
            up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        ),
        vae=AutoencoderKL(
            block_out_channels=size.vae,
            down_block_types=["DownEncoderBlock2D"] * len(size.vae),
            up_block_types=["UpDecoderBlock2D"] * len(size.vae),
            layers_per_block=size.layers,
            latent_channels=4,
            norm_num_groups=size.norm_groups if size.layers > 1 else 4,
            sample_size=size.resolution,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=size.text,
                intermediate_size=4 * size.text,
                num_hidden_layers=size.text_layers,
                num_attention_heads=size.text_heads,
                vocab_size=49408,
            )
        ),
        tokenizer=CLIPTokenizer.from_pretrained(ROOT / "assets" / "model" / "tokenizer"),
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    unfinished = folder.with_name(f".{name}")
    pipeline.to(torch.float16).save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def make_pictures(folder, count):
    """JPEG files of 768 x 768 pixels, smooth noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8))
        noise.resize((768, 768), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)


def command_line(setup, size, folder):
    """The trainer's flags for a row; its output is put into `folder`, the rows' pictures beside it."""
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
        "with_prior_preservation": True,
        "num_class_images": 20,
        "resolution": setup.resolution or SIZES[size].resolution,
        "train_batch_size": setup.batch,
        "mixed_precision": setup.precision,
        "max_train_steps": 10**6,
        "checkpointing_steps": 10**6,
        "report_to": "none",
        "output_dir": folder / "output",
    }
    return [f"--{name}={value}" for name, value in values.items()] + list(setup.flags)


# ---------- One row: a process that takes steps when told ---------------------------------------------------------


class Worker:
    """Runs the trainer's main and obeys the parent between two steps.

    It takes (command, number of steps) from the pipe and answers when the steps are done: "time" with the seconds a
    step, from the beginning of one to that of the next; "parts" with the seconds of each part a step; "count" with
    the FLOPs of a step. "limit", "memory" and "checkpoint" are answered at once; "end" ends it.
    """

    def __init__(self, pipe, trainer):
        import torch

        self.pipe, self.trainer, self.torch = pipe, trainer, torch
        self.command, self.left, self.start = None, 0, 0.0
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

    def install(self, compiled):
        """Puts clocks around the trainer's functions."""
        trainer, build_models = self.trainer, self.trainer.build_models
        start_accelerator, init = trainer.start_accelerator, trainer.Checkpoints.__init__

        def built(args, accelerator, pipeline, tokens):
            model = build_models(args, accelerator, pipeline, tokens)
            pipeline.vae.encode = self.timed("VAE", pipeline.vae.encode)
            if not compiled:  # compiled, there is one forward
                model.text_encoder.forward = self.timed("text encoder", model.text_encoder.forward)
                model.unet.forward = self.timed("UNet forward", model.unet.forward)
            return model

        def started(args):
            accelerator = start_accelerator(args)
            accelerator.backward = self.timed("backward", accelerator.backward)
            accelerator.clip_grad_norm_ = self.timed("optimizer", accelerator.clip_grad_norm_)
            return accelerator

        def initialized(checkpoints, *args):
            init(checkpoints, *args)
            self.checkpoints = checkpoints

        trainer.build_models, trainer.start_accelerator = built, started
        trainer.Checkpoints.__init__ = initialized
        trainer.Checkpoints.claim_folder = lambda checkpoints: None  # it saves the rows, which not every setup has
        dataset_class = trainer.CustomDiffusionDataset
        dataset_class.__getitem__ = self.timed("data", dataset_class.__getitem__)
        optimizer_class = trainer.torch.optim.AdamW
        optimizer_class.step = self.timed("optimizer", optimizer_class.step)
        optimizer_class.zero_grad = self.timed("optimizer", optimizer_class.zero_grad)
        training_step = trainer.training_step

        def obedient(*args):
            if not self.left:
                self.finish()
                self.obey()
            self.left -= 1
            if self.command != "count":
                return training_step(*args)
            return self.count(lambda: training_step(*args))

        trainer.training_step = obedient

    def count(self, step):
        """A step whose FLOPs are counted: uncompiled, with attention written out, which the counter knows."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        with self.torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                result = step()
        self.flops = counter.get_total_flops()
        return result

    def finish(self):
        """Answers for the steps that are done."""
        if self.command is None:
            return
        self.synchronize()
        seconds = (time.perf_counter() - self.start) / self.steps
        if self.command == "parts":
            parts = {part: value / self.steps for part, value in self.parts.items()}
            self.pipe.send(parts | {"rest": seconds - sum(parts.values())})
        else:
            self.pipe.send(self.flops if self.command == "count" else seconds)

    def obey(self):
        """Answers until steps are asked for."""
        while True:
            self.command, self.steps = self.pipe.recv()
            if self.command == "end":
                raise SystemExit
            if self.command in ("limit", "memory", "checkpoint"):
                self.pipe.send(getattr(self, self.command)())
                continue
            self.left, self.parts = self.steps, {}
            self.synchronize()
            self.start = time.perf_counter()
            return

    def limit(self):
        """FLOPs a second of a matrix product at this row's precision: the best of five."""
        torch, n = self.torch, 8192 if self.is_cuda else 2048
        dtype = torch.bfloat16 if self.checkpoints.args.mixed_precision == "bf16" else torch.float32
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
        """Size in bytes of a checkpoint."""
        self.checkpoints.save(0)
        folder = self.checkpoints.output_dir / "checkpoint-0"
        return sum(file.stat().st_size for file in folder.iterdir())


def use_the_usual(trainer):
    """Replaces what the trainer does otherwise than scripts usually do."""
    import torch
    import torch.nn.functional as F

    build_models = trainer.build_models

    def usual_models(args, accelerator, pipeline, tokens):
        model, ((token_ids, initializer_ids),) = build_models(args, accelerator, pipeline, [([], [])]), tokens
        encoder = model.text_encoder.float()  # its whole table is trained
        encoder.resize_token_embeddings(token_ids[-1] + 1, mean_resizing=False)
        table = encoder.get_input_embeddings().requires_grad_(True).weight
        table.data[token_ids] = table.data[initializer_ids]
        pipeline.vae.to(memory_format=torch.contiguous_format).disable_slicing()
        return model

    def usual_optimizer(args, parameters, samples_per_step):
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(parameters, args.learning_rate, betas, args.adam_epsilon, args.adam_weight_decay)

    def usual_step(accelerator, model, vae, noise_scheduler, optimizer, batch, args):
        with accelerator.accumulate(model):
            pixels = batch["pixels"]
            pixel_values = torch.where(pixels[:, 3:] > 0, pixels[:, :3] / 127.5 - 1, 0)
            latents = vae.encode(pixel_values.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
            timesteps = timesteps.to(latents.device)
            prediction = model(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, batch["input_ids"])
            (instance, prior), (target, prior_target) = prediction.chunk(2), noise.chunk(2)
            mask = batch["mask"]
            loss = F.mse_loss(instance.float(), target.float(), reduction="none")
            loss = ((loss * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()
            loss = loss + args.prior_loss_weight * F.mse_loss(prior.float(), prior_target.float())
            accelerator.backward(loss)
            table = accelerator.unwrap_model(model).text_encoder.get_input_embeddings().weight
            frozen = torch.arange(len(table)) < len(table) - len(trainer.modifier_tokens(args))
            table.grad.data[frozen] = table.grad.data[frozen].fill_(0)
            accelerator.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=args.set_grads_to_none)
        loss.detach().item()
        return loss.detach()

    trainer.build_models, trainer.build_optimizer = usual_models, usual_optimizer
    trainer.training_step = usual_step


def work(pipe, setup, words, rank, port, log):
    """What the process of a row does; of several processes the first obeys and the others keep in step with it."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    threads = setup.threads or os.cpu_count()
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if setup.compiled:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"  # as accelerate launch --dynamo_backend does
    if setup.processes > 1:
        os.environ |= {"WORLD_SIZE": str(setup.processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    import train_custom_diffusion as trainer

    if not torch.cuda.is_available():
        words.append("--dataloader_num_workers=0")  # idle rows must not prepare pictures meanwhile
    if setup.usual:
        use_the_usual(trainer)
    if rank == 0:
        Worker(pipe, trainer).install(setup.compiled)
    trainer.main(trainer.parse_args(words))


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


def measure(setups, size, rounds, steps, count=True):
    """Runs the rows interleaved; returns a list of dicts with what was measured (seconds, bytes, FLOPs)."""
    scratch, rows = Path(tempfile.mkdtemp()), []
    try:
        for i, setup in enumerate(setups):
            folder = scratch / str(i)
            folder.mkdir()
            rows.append(Row(setup, size, folder))
            rows[-1].ask("time", 1)  # one at a time: starting takes memory and processor
            rows[-1].ask("time", 2)
            print(f"  {setup.name} is ready", file=sys.stderr, flush=True)
        for row in rows:
            row.ask("memory")
        for _ in range(rounds):
            for row in rows:
                row.times.append(row.ask("time", steps))
        for row in rows:
            row.memory = row.ask("memory")
            row.limits = [row.ask("limit") for _ in range(3)]
        for row in rows:
            row.parts = row.ask("parts", 3 * steps)
            row.checkpoint = None if row.setup.usual else row.ask("checkpoint")
            row.flops = row.ask("count") if count else None
        keys = ("times", "memory", "limits", "parts", "flops", "checkpoint")
        return [asdict(row.setup) | {key: getattr(row, key) for key in keys} for row in rows]
    finally:
        for row in rows:
            row.end()
        shutil.rmtree(scratch)


# ---------- Tables ----------------------------------------------------------------------------------------------


def spread(values):
    """Median and range, of seconds."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


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
        checkpoint = f"{row['checkpoint'] / 1e6:.1f}" if row["checkpoint"] else ""
        flops = row["flops"] and (f"{row['flops'] / 1e9:.0f}", row["flops"] / median / statistics.median(row["limits"]))
        cells = [row["name"], spread(row["times"]), f"{ratio:.2f}", f"{pictures / median:.2f}", *shown]
        cells += [f"{row['memory'] / 2**30:.2f}", checkpoint, *((flops[0], f"{flops[1]:.0%}") if flops else ("", ""))]
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
    words = ["--pretrained_model_name_or_path=assets/model", "--instance_data_dir=assets/instance/cat"]
    words += ["--instance_prompt=photo of a <new1> cat", "--modifier_token=<new1>", "--resolution=128"]
    words += ["--max_train_steps=1"]
    script = [sys.executable, "train_custom_diffusion.py"]
    commands = {
        "everything imported eagerly (DIFFUSERS_SLOW_IMPORT=1)": [sys.executable, "-c", IMPORTS],
        "the usual imports": [sys.executable, "-c", IMPORTS],
        "the trainer's first step, embedded model": [*script, *words, "--report_to=none"],
        "--help": [*script, "--help"],
    }
    times = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            env = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"DIFFUSERS_SLOW_IMPORT": "1"} if "eager" in name else {})
            with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
                command = [*command, f"--output_dir={folder}/run"] if "first step" in name else command
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


def plot(source, target):
    """Draws the parts of the variants' steps as stacked bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    report = json.loads(Path(source).read_text())
    rows = report["tables"]["variants"]
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    names, left = [row["name"] for row in rows], np.zeros(len(rows))
    # parts are measured apart from the whole; they are shown as shares of the median step
    scale = [statistics.median(row["times"]) / sum(row["parts"].values()) for row in rows]
    for part in PARTS:
        widths = np.array([row["parts"].get(part, 0) for row in rows]) * scale
        axes.barh(names, widths, left=left, label=part)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds a step, {report['size']}, batch 2 + 2, {report['device']}")
    axes.legend(ncols=4, fontsize="small", frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)


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
    parser.add_argument("--tables", nargs="+", choices=[*tables("mid"), "startup"], default=["variants"])
    parser.add_argument("--only", help="regular expression: rows whose name it matches")
    parser.add_argument("--rounds", type=int, default=9, help="how often each row has its turn")
    parser.add_argument("--steps", type=int, default=1, help="steps a turn; on a GPU some 20")
    parser.add_argument("--plot", nargs=2, metavar=("JSON", "PNG"), help="draw an earlier run's variants, no more")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.plot:
        return plot(*args.plot)
    import torch

    device, version = describe_device(), torch.__version__
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{args.size}.json"
    report = json.loads(file.read_text()) if file.exists() else {"tables": {}}
    report |= {"size": args.size, "device": device, "torch": version}
    print(f"{args.size}, {device}, torch {version}, {args.rounds} rounds: median (range)")
    for name in args.tables:
        if name == "startup":
            report["startup"] = startup(args.rounds)
        else:
            setups = [s for s in tables(args.size)[name] if re.search(args.only or "", s.name)]
            if not torch.cuda.is_available():  # torch 2.13's inductor is wrong on a CPU, and the trainer refuses it
                setups = [setup for setup in setups if not setup.compiled]
            groups = [[setup] for setup in setups] if name == "memory" else [setups]
            rows = [row for g in groups for row in measure(g, args.size, args.rounds, args.steps, name == "variants")]
            print_table(name, rows)
            report["tables"][name] = rows
        file.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
