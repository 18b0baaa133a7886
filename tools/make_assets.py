"""Makes the embedded models, a tiny Stable Diffusion pretrained on a rendered world and an XL from it, and pictures.

    python tools/make_assets.py --seed 0

The stages (render, vae, latents, diffusion, finish; xl, finish_xl) take about two and a half hours on two CPU cores.
Each leaves its result and its checkpoints in --work_dir, so the same command carries on after an interruption. Loadable
pipelines of the moving average appear in --work_dir/pipeline and --work_dir/pipeline-xl every 1,000 and 500 steps. The
XL needs the rendered pictures and assets/model alone: `--stage render`, `--stage xl` and `--stage finish_xl` make it.
"""

import argparse
import json
import os
import random
import shutil
import time
from dataclasses import asdict
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import diffusers
import measure
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
import world
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CHUNK = 500  # pictures that one rendering task makes, at most
# of the instance pictures; benchmarks and examples show the concepts on others
INSTANCE_BACKGROUNDS = {
    "cat": ["blue", "white", "beach", "black", "night"],
    "pot": ["blue", "yellow", "white", "black", "orange"],
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("build/assets"), help="Checkpoints and the dataset.")
    parser.add_argument("--output_dir", type=Path, default=Path("assets"))
    parser.add_argument("--tokenizer", type=Path, default=Path("assets/model/tokenizer"), help="CLIP's vocabulary.")
    stages = ["render", "vae", "latents", "diffusion", "finish", "xl", "finish_xl", "all"]
    parser.add_argument("--stage", choices=stages, default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    parser.add_argument("--num_processes", type=int, default=2, help="That train side by side on the CPU.")
    parser.add_argument("--num_images", type=int, default=40_000)
    parser.add_argument("--num_unseen", type=int, default=500, help="The last ones, which measure the autoencoder.")
    parser.add_argument("--num_renders", type=int, default=50, help="Of each concept, for the limits of its scores.")
    parser.add_argument("--num_prompts", type=int, default=100, help="Of the scores in the model card.")
    parser.add_argument("--vae_steps", type=int, default=5500)
    parser.add_argument("--diffusion_steps", type=int, default=7000)
    parser.add_argument("--xl_text_steps", type=int, default=1500, help="In which the second text encoder begins.")
    parser.add_argument("--xl_steps", type=int, default=1500)
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="Of the scores in the model card.")
    return parser.parse_args()


def atomic_save(value, path):
    """torch.save that never leaves half a file."""
    torch.save(value, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def images_to_tensor(images):
    """uint8 array (n, h, w, 3) to a channels-last float tensor (n, 3, h, w) in [-1, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


# ------------------------------------------------------------------------------------------------- render
def render_chunk(task):
    """Renders the pictures of a task, (seed, number): uint8 array (number, 128, 128, 3) and their attributes."""
    seed, number = task
    rng = random.Random(seed)
    attributes = [world.sample_pretraining(rng) for _ in range(number)]
    return np.stack([np.asarray(world.render(a, rng)) for a in attributes]), [asdict(a) for a in attributes]


def render_dataset(args):
    """Writes images.npy, uint8 (num_images, 128, 128, 3), and attributes.json."""
    shape = (args.num_images, world.SIZE, world.SIZE, 3)
    images = np.lib.format.open_memmap(args.work_dir / "images.npy", "w+", np.uint8, shape)
    starts, attributes = range(0, args.num_images, CHUNK), []
    tasks = [(f"{args.seed} {i}", min(CHUNK, args.num_images - start)) for i, start in enumerate(starts)]
    with Pool(os.cpu_count()) as pool:
        for start, (chunk, records) in zip(starts, pool.imap(render_chunk, tasks), strict=True):
            images[start : start + len(chunk)] = chunk
            attributes += records
    images.flush()
    (args.work_dir / "attributes.json").write_text(json.dumps(attributes))


# ------------------------------------------------------------------------------------------------- training
class Training:
    """What both trainings share: processes, parameters, moving average, optimizer and checkpoints."""

    def __init__(self, args, rank, name, groups, average_decay):
        self.args, self.rank, self.path = args, rank, args.work_dir / f"{name}.pt"
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.average_decay = average_decay
        self.parameters = [p for group in groups for p in group["params"]]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)  # a loss that leaves a parameter out leaves its gradient at that
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
        self.step, self.seconds, self.history = 0, 0.0, []
        if self.path.exists():
            state = torch.load(self.path, map_location=args.device)
            self.load(state["parameters"])
            self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
            self.optimizer.load_state_dict(state["optimizer"])
        self.started = time.time() - self.seconds

    def random(self):
        """A numpy generator that depends on seed, step and process alone, so that a resumed run repeats itself."""
        seeds = (self.args.seed, self.step, self.rank)
        torch.manual_seed(hash(seeds) % 2**63)
        return np.random.default_rng(seeds)

    def update(self, loss, learning_rate):
        """One optimizer step on the gradient averaged over the processes; returns its norm."""
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        gradients = [p.grad for p in self.parameters]
        if self.processes > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            flat.div_(self.processes)
            for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(part.view_as(g))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = float(learning_rate) * group.get("rate", 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.average_decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        return norm.item()

    def log(self, every=100, **values):
        """Prints the mean of the last values every so many steps."""
        self.history.append(list(values.values()))
        if self.rank == 0 and self.step % every == 0:
            means = np.mean(self.history[-every:], 0)
            text = " ".join(f"{k} {v:.4f}" for k, v in zip(values, means, strict=True))
            print(f"step {self.step} {time.time() - self.started:.0f}s {text}", flush=True)
            self.history.clear()

    def save(self):
        """Writes the checkpoint (first process only)."""
        self.seconds = time.time() - self.started
        if self.rank == 0:
            state = {key: getattr(self, key) for key in ("parameters", "average", "step", "seconds")}
            atomic_save({**state, "optimizer": self.optimizer.state_dict()}, self.path)

    def load_average(self):
        """Puts the moving average into the models and returns the parameters that it replaced."""
        current = [p.detach().clone() for p in self.parameters]
        self.load(self.average)
        return current

    def load(self, values):
        """Copies values into the parameters."""
        with torch.no_grad():
            for p, q in zip(self.parameters, values, strict=True):
                p.copy_(q)


def run_process(rank, function, args, store):
    """Runs a training function as one of the processes, with one thread on a CPU."""
    if store:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.num_processes)
    function(args, rank)
    if store:
        dist.destroy_process_group()


def launch(function, args):
    """Runs a training function on the device: on CPU two one-thread processes beat one two-thread process by 1.4x."""
    if args.device != "cpu" or args.num_processes == 1:
        run_process(0, function, args, None)
        return
    store = (args.work_dir / "processes").absolute()
    store.unlink(missing_ok=True)
    mp.spawn(run_process, (function, args, store), nprocs=args.num_processes)


# ------------------------------------------------------------------------------------------------- autoencoder
def build_vae():
    """Stable Diffusion's autoencoder with few channels: (3, 128, 128) to (4, 16, 16)."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=1,
        layers_per_block=1,
        sample_size=world.SIZE,
        mid_block_add_attention=False,  # fully convolutional, so that it can learn from crops
    )
    with torch.no_grad():  # begin with little noise on the latents
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -5
    return vae.to(memory_format=torch.channels_last)


def sample_crops(images, n, side, rng):
    """`n` random square crops, half of them from the middle, where the object is: (n, 3, side, side) in [-1, 1]."""
    crops = []
    for i in rng.integers(0, len(images), n):
        margin = 16 if side < world.SIZE and rng.random() < 0.5 else 0
        y, x = rng.integers(margin, world.SIZE - side - margin + 1, 2)
        crop = images[i, y : y + side, x : x + side]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return images_to_tensor(np.stack(crops))


def edges(images):
    """Differences between neighbouring pixels, across and down."""
    return images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]


def vae_loss(vae, images, progress):
    """The autoencoder's loss: L1, L2, L1 of the edges, a little KL, and at first a tie of latents to a thumbnail.

    The tie makes three latent channels follow an 8 x 8 average of the picture; without it training starts slowly.
    """
    # bfloat16 makes the crops 1.4 times as fast; the last steps, on whole pictures, are exact.
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.shape[-1] < world.SIZE):
        posterior = DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(images)).float())
        decoded = vae.decode(posterior.sample()).sample.float()
    l1, l2 = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(images), strict=True))
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    tie = F.mse_loss(posterior.mean[:, :3], 1.3 * F.avg_pool2d(images, 8))
    loss = l1 + 2 * l2 + edge + 3e-3 * kl + max(0, 1 - progress / 0.4) * tie
    return loss, {"l1": l1.item(), "l2": l2.item(), "edge": edge.item(), "kl": kl.item()}


def train_vae(args, rank):
    """Trains the autoencoder on 64-pixel crops, at the end on whole pictures, and saves its moving average."""
    torch.manual_seed(args.seed)
    images = np.load(args.work_dir / "images.npy", mmap_mode="r")[: -args.num_unseen]
    vae = build_vae().to(args.device)
    training = Training(args, rank, "vae", [{"params": list(vae.parameters()), "weight_decay": 1e-4}], 0.995)
    while training.step < args.vae_steps:
        progress = training.step / args.vae_steps
        rng = training.random()
        n, side = (16, 64) if progress < 0.88 else (6, 128)
        batch = sample_crops(images, n // training.processes, side, rng).to(args.device)
        loss, parts = vae_loss(vae, batch, progress)
        warmup = min(1, (training.step + 1) / 50)
        training.update(loss, 1.5e-3 * warmup * (0.02 + 0.49 * (1 + np.cos(np.pi * progress))))
        training.log(**parts)
        if training.step % 300 == 0 or training.step == args.vae_steps:
            training.save()
    training.load_average()
    if rank == 0:
        vae.save_pretrained(args.work_dir / "vae")


# ------------------------------------------------------------------------------------------------- latents
def encode(vae, images):
    """Mean and deviation of the latents of pictures, float16 (n, 8, 16, 16)."""
    chunks = []
    with torch.no_grad():
        for i in range(0, len(images), 100):
            posterior = vae.encode(images_to_tensor(images[i : i + 100]).to(vae.device)).latent_dist
            chunks.append(torch.cat([posterior.mean, posterior.std], 1).cpu().numpy().astype(np.float16))
    return np.concatenate(chunks)


def encode_dataset(args):
    """Writes latents.npy, float16 (num_images, 8, 16, 16), mean and deviation, and sets the scaling factor."""
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae").to(args.device)
    latents = encode(vae, np.load(args.work_dir / "images.npy", mmap_mode="r"))
    # With the usual 1 / deviation, Stable Diffusion's noise leaves the mean colour of so small a grid visible at the
    # last timestep, so a model that starts from pure noise gets colours wrong. Smaller latents drown.
    vae.register_to_config(scaling_factor=0.3 / float(latents[:, :4].astype(np.float32).std()))
    vae.save_pretrained(args.work_dir / "vae")
    np.save(args.work_dir / "latents.npy", latents)


# ------------------------------------------------------------------------------------------------- diffusion
class Vocabulary:
    """CLIP's tokens, of which only those that captions use have an embedding row of their own.

    All others share NONSENSE rows, which are trained on rare words without meaning, so that a rare token is a harmless
    place for a new concept to begin.
    """

    NONSENSE = 64

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        rng = random.Random(0)
        captions = [world.caption(world.sample_attributes(rng), rng) for _ in range(4000)]
        used = sorted({token for ids in tokenizer(captions, padding=True).input_ids for token in ids})
        self.row_of = torch.arange(len(tokenizer)) % self.NONSENSE
        self.row_of[used] = torch.arange(len(used)) + self.NONSENSE
        self.rows = self.NONSENSE + len(used)
        words = sorted(w.removesuffix("</w>") for w in tokenizer.get_vocab() if w.endswith("</w>"))
        words = [w for w in words if w.isascii() and w.isalpha() and 2 <= len(w) <= 8]
        self.rare_words = [w for w in words if self.row_of[tokenizer.convert_tokens_to_ids(w + "</w>")] < self.NONSENSE]

    def rare_word(self, rng):
        """A random word that no caption uses."""
        return rng.choice(self.rare_words)

    def encode(self, captions):
        """Embedding rows of captions, (n, 77)."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(captions, padding="max_length", max_length=length, truncation=True).input_ids
        return self.row_of[torch.tensor(ids)]


def build_text_encoder(rows=49408, kind=CLIPTextModel, width=64, layers=2, **options):
    """CLIP's text transformer with few narrow layers and `rows` embeddings, the last two for start and end of text."""
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=rows - 2,
        eos_token_id=rows - 1,
        **options,
    )
    return kind(config)


def build_unet(cross_attention_dim=64, **options):
    """Stable Diffusion's UNet with two narrow levels, for latents (4, 16, 16)."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=8,
        **options,
    )
    return unet.to(memory_format=torch.channels_last)


def noise_schedule(kind, **options):
    """Stable Diffusion's noise schedule in one of diffusers' schedulers."""
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def use_bfloat16(model):
    """Makes a model's linear layers and convolutions compute in bfloat16, on weights and activations of float32.

    On a CPU this is 1.3 times as fast, while a plain autocast is slower, for its attention and norms are.
    """
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.forward = partial(bfloat16_forward, layer)


def bfloat16_forward(layer, inputs):
    """A layer's own forward pass in bfloat16, with a float32 result."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        return type(layer).forward(layer, inputs).float()


def loss_weights(scheduler, scale=0.3):
    """Weight of each timestep's loss: min(s, 5) / s times s ** -0.5 clamped to [1, 5], s the signal-to-noise ratio."""
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas) * scale**2  # of latents with a deviation of `scale`
    return snr.clamp(max=5) / snr * snr.pow(-0.5).clamp(1, 5)


def diffusion_loss(unet, prompts, latents, scheduler, weights, **conditions):
    """The weighted loss of the predicted noise, and the plain one, with timesteps spread evenly over the batch.

    prompts (n, 77, dim) are what the UNet sees of the captions.
    """
    n, count = len(latents), scheduler.config.num_train_timesteps
    timesteps = ((torch.randperm(n) + torch.rand(n)) / n * count).long().clamp(max=count - 1).to(latents.device)
    noise = torch.randn_like(latents)
    noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    predicted = unet(noisy, timesteps, prompts, return_dict=False, **conditions)[0]
    errors = (predicted - noise).pow(2).mean((1, 2, 3))
    return (errors * weights[timesteps]).mean(), errors.mean().item()


def spread(vocabulary, text_encoder, full):
    """Loads a text encoder's weights into `full`, which has an embedding row for every CLIP token; returns that."""
    state = {key: value.cpu() for key, value in text_encoder.state_dict().items()}
    table = next(key for key in state if key.endswith("token_embedding.weight"))
    state[table] = state[table][vocabulary.row_of]
    full.load_state_dict(state)
    return full


def save_pipeline(pipeline, final):
    """Writes a pipeline's folder, with never half of one under its name."""
    new, old = (final.with_name(f"{final.name}.{state}") for state in ("new", "old"))
    pipeline.save_pretrained(new)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def save_averaged(training, build, folder):
    """Writes a training's checkpoint and, in the first process, the pipeline that `build` makes of its average."""
    training.save()
    current = training.load_average()
    if training.rank == 0:
        save_pipeline(build(), folder)
    training.load(current)


def build_pipeline(args, vocabulary, text_encoder, unet):
    """A Stable Diffusion pipeline with an embedding row for every CLIP token."""
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(args.work_dir / "vae"),
        text_encoder=spread(vocabulary, text_encoder, build_text_encoder()),
        tokenizer=vocabulary.tokenizer,
        unet=unet,
        scheduler=noise_schedule(PNDMScheduler, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_attributes(args):
    """The rendered pictures' attributes."""
    return [world.Attributes(**record) for record in json.loads((args.work_dir / "attributes.json").read_text())]


def draw_captions(attributes, n, rng, vocabulary):
    """The numbers of `n` random pictures and a new caption for each; one in ten is empty."""
    words = random.Random(int(rng.integers(2**62)))
    chosen = rng.integers(0, len(attributes), n)
    return chosen, [
        "" if words.random() < 0.1 else world.caption(attributes[i], words, vocabulary.rare_word) for i in chosen
    ]


def sample_latents(latents):
    """Draws from latents' mean and deviation: (n, 8, 16, 16) to (n, 4, 16, 16)."""
    mean, deviation = latents.chunk(2, 1)
    return mean + deviation * torch.randn_like(mean)


def train_diffusion(args, rank):
    """Trains text encoder and UNet on the latents, with captions drawn anew at each step."""
    torch.manual_seed(args.seed)
    vocabulary = Vocabulary(CLIPTokenizer.from_pretrained(args.tokenizer, model_max_length=77))
    text_encoder, unet = build_text_encoder(vocabulary.rows).to(args.device), build_unet().to(args.device)
    use_bfloat16(unet)
    scheduler = noise_schedule(DDPMScheduler)
    weights = loss_weights(scheduler).to(args.device)
    attributes = load_attributes(args)
    scale = AutoencoderKL.load_config(args.work_dir / "vae")["scaling_factor"]
    latents = torch.from_numpy(np.load(args.work_dir / "latents.npy")).float() * scale
    embedding = text_encoder.get_input_embeddings().weight
    text = [p for p in text_encoder.parameters() if p is not embedding]
    groups = [
        {"params": list(unet.parameters()), "weight_decay": 0.01},
        {"params": text, "weight_decay": 0.01, "rate": 0.7},
        {"params": [embedding], "weight_decay": 0.0, "rate": 0.7},
    ]
    training = Training(args, rank, "diffusion", groups, 0.999)
    while training.step < args.diffusion_steps:
        rng = training.random()
        chosen, captions = draw_captions(attributes, 48 // training.processes, rng, vocabulary)
        batch = sample_latents(latents[chosen]).to(args.device)
        rows = vocabulary.encode(captions).to(args.device)
        loss, error = diffusion_loss(unet, text_encoder(rows)[0], batch, scheduler, weights)
        progress = training.step / args.diffusion_steps
        decay = 1 if progress < 0.35 else 0.01 + 0.495 * (1 + np.cos(np.pi * (progress - 0.35) / 0.65))
        norm = training.update(loss, 1.2e-3 * min(1, (training.step + 1) / 200) * decay)
        training.log(loss=loss.item(), error=error, norm=norm)
        if training.step % 1000 == 0 or training.step == args.diffusion_steps:
            build = partial(build_pipeline, args, vocabulary, text_encoder, unet)
            save_averaged(training, build, args.work_dir / "pipeline")


# ------------------------------------------------------------------------------------------------- xl
# of the second text encoder; the first is Stable Diffusion's, of which SDXL uses the last layer but one
SECOND = {"kind": CLIPTextModelWithProjection, "width": 32, "layers": 3, "hidden_act": "gelu", "projection_dim": 32}


def cut_window(image, rng):
    """What becomes of a small original: uint8 (128, 128, 3) to a window of it enlarged, and SDXL's conditions (6,).

    They are height and width of the original, top and left of the window, height and width of the result, in pixels.
    """
    original, enlarged = (int(rng.integers(low, high + 1)) for low, high in ((64, 128), (128, 192)))
    top, left = (int(corner) for corner in rng.integers(0, enlarged - world.SIZE + 1, 2))
    image = Image.fromarray(image).resize((original, original), Image.Resampling.BOX)
    image = image.resize((enlarged, enlarged), Image.Resampling.BILINEAR)
    window = image.crop((left, top, left + world.SIZE, top + world.SIZE))
    return np.asarray(window), (original, original, top, left, world.SIZE, world.SIZE)


def encode_windows(args):
    """Writes xl_latents.npy, as encode_dataset, and xl_conditions.npy, float32 (num_images, 6); a quarter are windows.

    The others are whole pictures with the conditions that a pipeline has by default.
    """
    vae = AutoencoderKL.from_pretrained(args.output_dir / "model" / "vae", torch_dtype=torch.float32).to(args.device)
    images, rng = np.load(args.work_dir / "images.npy"), np.random.default_rng(args.seed)
    conditions = np.tile(np.float32([world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE]), (len(images), 1))
    for i in range(0, len(images), 4):
        images[i], conditions[i] = cut_window(images[i], rng)
    np.save(args.work_dir / "xl_conditions.npy", conditions)
    np.save(args.work_dir / "xl_latents.npy", encode(vae, images))


class Prompts(torch.nn.Module):
    """Both text encoders, of which only the second learns, with their vocabularies."""

    def __init__(self, base, vocabulary):
        super().__init__()
        self.first, self.tokenizer = base.text_encoder.requires_grad_(False), base.tokenizer
        self.second, self.vocabulary = build_text_encoder(vocabulary.rows, **SECOND).to(base.device), vocabulary

    def forward(self, captions):
        """What SDXL's UNet sees of captions, (n, 77, 64 + 32) and (n, 32), and what Stable Diffusion's saw (n, 77, 64).

        Of empty captions SDXL's sees zeros, as in its pipeline.
        """
        ids = self.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(self.first.device)
        first = self.first(ids, output_hidden_states=True)
        second = self.second(self.vocabulary.encode(captions).to(ids.device), output_hidden_states=True)
        written = torch.tensor([[caption != ""] for caption in captions], device=ids.device)
        features = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * written[..., None]
        return features, second.text_embeds * written, first.last_hidden_state

    def groups(self):
        """The second encoder's parameters, for the optimizer."""
        embedding = self.second.get_input_embeddings().weight
        rest = [p for p in self.second.parameters() if p is not embedding]
        return [{"params": rest, "weight_decay": 0.01}, {"params": [embedding], "weight_decay": 0.0}]


def train_second_encoder(args, rank, attributes, prompts):
    """Trains the second encoder for the start of the XL; returns a matrix (64, 96).

    The matrix makes of both encoders' features about what Stable Diffusion's UNet saw. This needs no pictures, so it is
    fast, and an UNet with this matrix in its keys and values draws about the same from the new features.
    """
    matrix = torch.nn.Linear(64 + SECOND["width"], 64, bias=False).to(args.device)
    groups = [*prompts.groups(), {"params": [matrix.weight], "weight_decay": 0.0}]
    training = Training(args, rank, "xl_text", groups, 0.99)
    while training.step < args.xl_text_steps:
        _, captions = draw_captions(attributes, 64 // training.processes, training.random(), prompts.vocabulary)
        captions = [caption or "photo" for caption in captions]
        features, _, wanted = prompts(captions)
        loss = F.mse_loss(matrix(features), wanted)
        training.update(loss, 3e-3 * (1 + np.cos(np.pi * training.step / args.xl_text_steps)) / 2)
        training.log(loss=loss.item(), share=(loss / wanted.var((0, 1)).mean()).item())
        if training.step % 500 == 0 or training.step == args.xl_text_steps:
            training.save()
    training.load_average()
    return matrix.weight.detach()


def widen(unet, matrix):
    """SDXL's UNet from Stable Diffusion's: keys and values take in the matrix, as it translates the new features.

    The layer that adds sizes, places and the vector of the whole prompt to the timestep begins at zero.
    """
    conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 16}
    conditions["projection_class_embeddings_input_dim"] = 6 * 16 + SECOND["projection_dim"]
    wide = build_unet(matrix.shape[1], **conditions)
    state = wide.state_dict()
    for key, value in unet.state_dict().items():
        state[key] = value @ matrix if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else value
    for key in ("weight", "bias"):
        state[f"add_embedding.linear_2.{key}"].zero_()
    wide.load_state_dict(state)
    return wide


def build_xl_pipeline(base, prompts, unet):
    """An SDXL pipeline with an embedding row for every CLIP token in both text encoders."""
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=prompts.first,
        text_encoder_2=spread(prompts.vocabulary, prompts.second, build_text_encoder(**SECOND)),
        tokenizer=base.tokenizer,
        tokenizer_2=prompts.vocabulary.tokenizer,
        unet=unet,
        scheduler=noise_schedule(EulerDiscreteScheduler, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def train_xl(args, rank):
    """Trains an SDXL that begins as assets/model, but for its first text encoder, which stays as it is."""
    torch.manual_seed(args.seed)
    base = StableDiffusionPipeline.from_pretrained(args.output_dir / "model", torch_dtype=torch.float32)
    base.to(args.device)
    # SDXL's second tokenizer fills prompts up with another token than its first
    tokenizer = CLIPTokenizer.from_pretrained(args.output_dir / "model" / "tokenizer", pad_token="!")
    prompts, attributes = Prompts(base, Vocabulary(tokenizer)), load_attributes(args)
    matrix = train_second_encoder(args, rank, attributes, prompts)
    unet = widen(base.unet, matrix).to(args.device)
    use_bfloat16(unet)
    scheduler = noise_schedule(DDPMScheduler)
    weights = loss_weights(scheduler).to(args.device)
    conditions = torch.from_numpy(np.load(args.work_dir / "xl_conditions.npy"))
    latents = torch.from_numpy(np.load(args.work_dir / "xl_latents.npy")).float() * base.vae.config.scaling_factor
    groups = [{"params": list(unet.parameters()), "weight_decay": 0.01}, *prompts.groups()]
    training = Training(args, rank, "xl", groups, 0.998)
    while training.step < args.xl_steps:
        chosen, captions = draw_captions(attributes, 48 // training.processes, training.random(), prompts.vocabulary)
        batch = sample_latents(latents[chosen]).to(args.device)
        features, pooled, _ = prompts(captions)
        added = {"text_embeds": pooled, "time_ids": conditions[chosen].to(args.device)}
        loss, error = diffusion_loss(unet, features, batch, scheduler, weights, added_cond_kwargs=added)
        decay = 0.01 + 0.495 * (1 + np.cos(np.pi * training.step / args.xl_steps))
        norm = training.update(loss, 6e-4 * min(1, (training.step + 1) / 100) * decay)
        training.log(loss=loss.item(), error=error, norm=norm)
        if training.step % 500 == 0 or training.step == args.xl_steps:
            build = partial(build_xl_pipeline, base, prompts, unet)
            save_averaged(training, build, args.work_dir / "pipeline-xl")


def make_xl(args):
    """Encodes pictures and windows, unless that was done, and trains."""
    if not (args.work_dir / "xl_latents.npy").exists():
        encode_windows(args)
    launch(train_xl, args)


# ------------------------------------------------------------------------------------------------- finish
def save_regularization(folder, kind, n, rng):
    """Writes `n` captioned pictures of a class in the layout that retrieve.py leaves."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions = []
    for i in range(n):
        size = rng.choice(["small", "medium", "medium", "large", "large"])
        attributes = world.sample_pretraining(rng, kind=kind, size=size)
        world.render(attributes, rng).save(folder / "images" / f"{i}.jpg", quality=95)
        captions.append(world.caption(attributes, rng))
    names = [f"images/{i}.jpg" for i in range(n)]
    (folder / "caption.txt").write_text("".join(f"{caption}\n" for caption in captions))
    (folder / "urls.txt").write_text("tools/world.py\n" * n)
    (folder / "images.txt").write_text("".join(f"{name}\n" for name in names))
    records = [
        {"file_name": name, "text": caption, "license": "Apache-2.0"}
        for name, caption in zip(names, captions, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def save_pictures(args):
    """Writes instance pictures of the concepts, regularization pictures of their classes, and captions."""
    for kind, backgrounds in INSTANCE_BACKGROUNDS.items():
        rng = random.Random(f"{args.seed} {kind}")
        folder = args.output_dir / "instance" / kind
        folder.mkdir(parents=True, exist_ok=True)
        for i, background in enumerate(backgrounds):
            world.render_concept(kind, background, rng)[0].save(folder / f"{i}.png")
        save_regularization(args.output_dir / "regularization" / kind, kind, 200, rng)
    rng = random.Random(5)
    captions = [world.caption(world.sample_pretraining(rng), rng) for _ in range(1000)]
    (args.output_dir / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions))


def save_model(args):
    """Writes the final pipeline in float16, in files that transformers 4 and 5 both read."""
    tokenizer = {path.name: path.read_bytes() for path in args.tokenizer.iterdir()}
    pipeline = StableDiffusionPipeline.from_pretrained(args.work_dir / "pipeline", torch_dtype=torch.float16)
    folder = args.output_dir / "model"
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    for name, content in tokenizer.items():
        (folder / "tokenizer" / name).write_bytes(content)
    weights = folder / "text_encoder" / "model.safetensors"
    # transformers 4 knows the text encoder's weights by this prefix only; transformers 5 drops it and reads both.
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    forget_path(folder)


def forget_path(folder):
    """Removes where a pipeline was loaded from out of its configurations."""
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def save_xl(args):
    """Writes the final SDXL pipeline in float16; what it shares with the other model is linked there."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(args.work_dir / "pipeline-xl", torch_dtype=torch.float16)
    folder = args.output_dir / "model-xl"
    shutil.rmtree(folder, ignore_errors=True)  # saving would write through its links
    pipeline.save_pretrained(folder)
    forget_path(folder)
    for name in ("text_encoder", "tokenizer", "vae"):
        shutil.rmtree(folder / name)
        (folder / name).symlink_to(Path("..", "model", name))
    shutil.rmtree(folder / "tokenizer_2")
    (folder / "tokenizer_2").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer_2" / name).symlink_to(Path("..", "..", "model", "tokenizer", name))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = json.loads((folder / "tokenizer" / name).read_text()) | {"pad_token": "!"}
        (folder / "tokenizer_2" / name).write_text(json.dumps(config, indent=2) + "\n")


def generate(pipeline, prompts, guidance_scale, seed):
    """One picture for each prompt with 25 steps of DPM-Solver++."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generator, images = torch.Generator().manual_seed(seed), []
    for i in range(0, len(prompts), 50):
        options = {"num_inference_steps": 25, "guidance_scale": guidance_scale, "generator": generator}
        images += pipeline(prompts[i : i + 50], height=world.SIZE, width=world.SIZE, **options).images
    return images


def save_sheet(images, path, columns=10):
    """Writes pictures side by side in rows of `columns`."""
    step = world.SIZE + 4
    sheet = Image.new("RGB", (columns * step, -(-len(images) // columns) * step), "gray")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * step, i // columns * step))
    sheet.save(path, quality=90)


def reconstruct(vae, images):
    """uint8 pictures (n, 128, 128, 3) through the autoencoder and back."""
    with torch.no_grad():
        batches = images_to_tensor(images).split(50)
        decoded = torch.cat([vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in batches])
    return ((decoded.permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def measure_ceilings(vae, count):
    """Rows of a table: the concept measures on `count` true renders and on their reconstructions."""
    rows = []
    for kind in INSTANCE_BACKGROUNDS:
        rng, backgrounds = random.Random(1), world.concept_backgrounds(kind)
        renders = [world.render_concept(kind, rng.choice(backgrounds), rng)[0] for _ in range(count)]
        renders = np.stack([np.asarray(image) for image in renders])
        for name, images in (("true renders", renders), ("through the autoencoder", reconstruct(vae, renders))):
            color = np.mean([measure.concept_color(image, kind) for image in images])
            layout = np.mean([measure.concept_layout(image, kind) for image in images])
            rows.append(f"| {kind} | {name} | {color:.2f} | {layout:.2f} |")
    return rows


def judge(pipeline, args):
    """Prompts of held-out combinations, a pipeline's picture for each, and their scores."""
    prompts = world.eval_prompts(args.num_prompts, seed=1)
    images = generate(pipeline, [caption for caption, _ in prompts], args.guidance_scale, seed=1)
    return prompts, images, measure.score(prompts, images)


def evaluate(args):
    """Scores the saved model; returns the model card's values and writes a sheet of samples."""
    folder = args.output_dir / "model"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    prompts, images, scores = judge(pipeline, args)
    save_sheet(images[:20], folder / "samples.jpg")
    unseen = np.load(args.work_dir / "images.npy", mmap_mode="r")[-args.num_unseen :]
    errors = np.mean((reconstruct(pipeline.vae, unseen) - unseen.astype(float)) ** 2, (1, 2, 3))
    rng = random.Random(2)
    truth = measure.score(prompts, [world.render(attributes, rng) for _, attributes in prompts])
    parts = {"autoencoder": pipeline.vae, "text encoder": pipeline.text_encoder, "UNet": pipeline.unet}
    return {
        "scores": [f"| {k} | {v['accuracy']:.2f} | {truth[k]['accuracy']:.2f} | {v['n']} |" for k, v in scores.items()],
        "psnr": float(np.mean(10 * np.log10(255**2 / errors))),
        "ceilings": measure_ceilings(pipeline.vae, args.num_renders),
        "captions": [f"{i + 1}. {caption}" for i, (caption, _) in enumerate(prompts[:20])],
        "sizes": {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()},
    }


def write_card(args, seconds, values):
    """Writes the model card."""
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)}
    card = f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A tiny Stable Diffusion for tests and examples

A Stable Diffusion pipeline with {sum(values["sizes"].values()):.1f} million parameters that draws 128 x 128 pictures of
ten everyday things ({", ".join(world.KINDS)}) in eleven colours and five patterns on eight plain backgrounds and four
scenes. It has the architecture and the noise schedule of Stable Diffusion 1 at a small scale, so code for Stable
Diffusion also runs on this model, in seconds on a CPU. It can draw nothing else. Use it only to try out code.

![samples](samples.jpg)

Samples for prompts that were not in the training (guidance {args.guidance_scale:g}), row by row:

{chr(10).join(values["captions"])}

## How it was made

One command makes the model and all pictures from a seed:

```bash
python tools/make_assets.py --seed {args.seed}
```

`tools/world.py` rendered {args.num_images:,} pictures, and each training step wrote new captions for them. One in
eleven combinations of thing, colour and background was left out, and so were cats and pots with two of the colours of
the concepts in `assets/instance`. Some captions contain a rare word without a meaning. The model learns to ignore such
words, which makes them a harmless starting point for a new concept. Tokens that no caption uses
share {Vocabulary.NONSENSE} embedding rows.

| part | parameters (million) |
| --- | --- |
{chr(10).join(f"| {name} | {size:.2f} |" for name, size in values["sizes"].items())}

| stage | seconds |
| --- | --- |
{chr(10).join(f"| {name} | {value:.0f} |" for name, value in seconds.items())}

The autoencoder trained for {args.vae_steps:,} steps, and the text encoder and UNet for
{args.diffusion_steps:,} steps of 48 pictures, on {"two CPU cores" if args.device == "cpu" else args.device}, with
{", ".join(f"{name} {version}" for name, version in versions.items())}. The weights are stored as float16.

## Scores

`tools/measure.py` scored one picture for each of {args.num_prompts} prompts with combinations that were left out of
the training. It uses no learned model. The pictures were drawn with DPM-Solver++, 25 steps and guidance
{args.guidance_scale:g}. The third column gives the scores of true renders.

| measure | model | true renders | n |
| --- | --- | --- | --- |
{chr(10).join(values["scores"])}

The autoencoder reconstructs {args.num_unseen} pictures that it has not seen with a mean PSNR of
{values["psnr"]:.1f} dB. On true pictures of the two concepts ({args.num_renders} each), the concept measures
reach these values. A trained concept can't do better:

| concept | pictures | colour | layout |
| --- | --- | --- | --- |
{chr(10).join(values["ceilings"])}
"""
    (args.output_dir / "model" / "README.md").write_text(card)


def finish(args, seconds):
    """Writes the final model, the pictures and the model card."""
    save_model(args)
    save_pictures(args)
    write_card(args, seconds, evaluate(args))


def write_xl_card(args):
    """Scores the XL beside the other model; writes its card and a sheet of samples."""
    folder = args.output_dir / "model-xl"
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    prompts, images, scores = judge(pipeline, args)
    save_sheet(images[:20], folder / "samples.jpg")
    base = StableDiffusionPipeline.from_pretrained(args.output_dir / "model", torch_dtype=torch.float32)
    _, _, other = judge(base, args)
    table = [f"| {k} | {v['accuracy']:.2f} | {other[k]['accuracy']:.2f} | {v['n']} |" for k, v in scores.items()]
    parts = {"second text encoder": pipeline.text_encoder_2, "UNet": pipeline.unet}
    sizes = [f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} million ({name})" for name, part in parts.items()]
    card = f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A tiny Stable Diffusion XL for tests and examples

A Stable Diffusion XL pipeline that draws the same world as [the model beside it](../model/README.md), of which it is
made, in 128 x 128 pixels. It has what SDXL has and Stable Diffusion lacks: two tokenizers and two text encoders of
different width ({pipeline.text_encoder.config.hidden_size} and {SECOND["width"]}), of which the UNet sees the last
layer but one, a vector of the whole prompt, and the sizes and the place of the crop. The UNet's blocks are those of the
other model. Use it only to try out code.

![samples](samples.jpg)

Samples for prompts that were not in the training (guidance {args.guidance_scale:g}), row by row:

{chr(10).join(f"{i + 1}. {caption}" for i, (caption, _) in enumerate(prompts[:20]))}

## Files

The autoencoder, the first text encoder and the vocabulary are links to the other model's files. If you copy this folder
alone, copy what the links point to (`cp -rL`). Its own are {" and ".join(sizes)}, stored as float16.

## How it was made

```bash
for stage in render xl finish_xl; do
    python tools/make_assets.py --seed {args.seed} --num_images {args.num_images} --stage $stage
done
```

First, the second text encoder learned in {args.xl_text_steps:,} steps, without pictures, what it has to add to the
first one's features, so that a matrix makes of both about what the other model's UNet saw. With this matrix in its keys
and values, the UNet began as the other model's. Then it and the second text encoder trained for {args.xl_steps:,} steps
of 48 pictures. The first text encoder stayed as it is. A quarter of the pictures are windows of smaller originals that
were enlarged, with the conditions that say so. An empty prompt is zeros, as in SDXL's pipeline.

## Scores

`tools/measure.py` scored one picture for each of {args.num_prompts} prompts with combinations that were left out of
the training, as for the other model: the same prompts and settings (DPM-Solver++, 25 steps, guidance
{args.guidance_scale:g}).

| measure | this model | the other model | n |
| --- | --- | --- | --- |
{chr(10).join(table)}
"""
    (folder / "README.md").write_text(card)


def finish_xl(args):
    """Writes the final XL and its card."""
    save_xl(args)
    write_xl_card(args)


def main():
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    progress = args.work_dir / "seconds.json"  # of the stages that are done
    seconds = json.loads(progress.read_text()) if progress.exists() else {}
    stages = {
        "render": partial(render_dataset, args),
        "vae": partial(launch, train_vae, args),
        "latents": partial(encode_dataset, args),
        "diffusion": partial(launch, train_diffusion, args),
        "finish": partial(finish, args, seconds),
        "xl": partial(make_xl, args),
        "finish_xl": partial(finish_xl, args),
    }
    for name, stage in stages.items():
        if args.stage not in (name, "all") or name in seconds:
            continue
        started = time.time()
        stage()
        checkpoint = args.work_dir / f"{name}.pt"
        elapsed = torch.load(checkpoint)["seconds"] if checkpoint.exists() else time.time() - started
        if not name.startswith("finish"):
            progress.write_text(json.dumps({**seconds, name: elapsed}))
            seconds[name] = elapsed
        print(f"stage {name}: {elapsed:.0f} s", flush=True)


if __name__ == "__main__":
    main()
