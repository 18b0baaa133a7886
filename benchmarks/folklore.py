#!/usr/bin/env python3
"""Measures what other trainers' usual additions bring in a short training; docs/measurements.md has the table.

    python benchmarks/folklore.py [--seeds 0 1 2] [--quick] [--rows "min-SNR" "noise offset"]

Each row trains the small model's cat with the settings of the quickstart, but with cached latents and neither
--keep_apart nor class pictures, and changes one thing. The trainer has none of these changes: here they replace its
functions, in a process of their own. Pictures are judged as benchmarks/concept_learning.py does, on its final prompts.
Values are those that the sources recommend; none was chosen here. Everything lies in results/concept_learning; an
interrupted run goes on where it stopped.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import concept_learning
from concept_learning import (
    ENVIRONMENT,
    MODEL,
    PLAIN,
    ROOT,
    folder_of,
    measures,
    set_up,
    share_as_before,
    span,
    table,
)

sys.path.append(str(ROOT))
FLAGS = [*PLAIN, "--cache_latents", "2", "--dataloader_num_workers", "0"]


# ---------- What is changed: functions that replace parts of the trainer ----------------------------------------


def change_loss(trainer, loss_of):
    """Makes the loss the mean of `loss_of(prediction, noise, signal-to-noise ratio)`, one number per example."""
    from diffusers.training_utils import compute_snr

    def diffusion_loss(model, vae, noise_scheduler, batch, prior_loss_weight):
        prediction, _ = trainer.denoise(model, vae, noise_scheduler, batch)
        return loss_of(prediction, batch["noise"], compute_snr(noise_scheduler, batch["timesteps"])).mean()

    trainer.diffusion_loss = diffusion_loss


def change_batch(trainer, name, change):
    """Replaces the tensor `name` of every batch by what `change` makes of it."""
    plain_loss = trainer.diffusion_loss

    def diffusion_loss(model, vae, noise_scheduler, batch, prior_loss_weight):
        batch = batch | {name: change(batch[name])}
        return plain_loss(model, vae, noise_scheduler, batch, prior_loss_weight)

    trainer.diffusion_loss = diffusion_loss


def change_model(trainer, change):
    """Calls `change(model, pipeline)` before the training."""
    plain_build = trainer.build_models

    def build_models(args, accelerator, pipeline, *ids):
        model = plain_build(args, accelerator, pipeline, *ids)
        change(model, pipeline)
        return model

    trainer.build_models = build_models


def min_snr(trainer):
    """Hang et al. 2023: the weight of an example is min(SNR, 5) / SNR for a model that predicts noise."""

    def loss_of(prediction, noise, snr):
        return snr.clamp(max=5) / snr * (prediction - noise).square().mean((1, 2, 3))

    change_loss(trainer, loss_of)


def huber(trainer):
    """Pseudo-Huber loss with c = 0.1: 2 c (sqrt(e^2 + c^2) - c)."""

    def loss_of(prediction, noise, snr):
        c = 0.1
        return (2 * c * (((prediction - noise).square() + c**2).sqrt() - c)).mean((1, 2, 3))

    change_loss(trainer, loss_of)


def noise_offset(trainer):
    """Guttenberg 2023: noise and target have an offset of 0.1 for each picture and channel."""
    import torch

    change_batch(trainer, "noise", lambda noise: noise + 0.1 * torch.randn(*noise.shape[:2], 1, 1))


def pyramid_noise(trainer):
    """Whitaker 2023: noise of lower resolutions is added with a discount of 0.3 a level; unit variance."""
    import torch

    def change(noise):
        size = noise.shape[-1]
        for level in range(1, 10):
            size = int(size / (2 + 2 * torch.rand(1).item()))
            if size < 1:
                break
            coarse = torch.randn(*noise.shape[:2], size, size)
            noise = noise + 0.3**level * torch.nn.functional.interpolate(coarse, noise.shape[-2:], mode="bilinear")
        return noise / noise.std()

    change_batch(trainer, "noise", change)


def input_perturbation(trainer):
    """Ning et al. 2023: the noise that is added is disturbed by 0.1, the target isn't."""
    import torch

    plain_add = trainer.DDPMScheduler.add_noise

    def add_noise(self, latents, noise, timesteps):
        return plain_add(self, latents, noise + 0.1 * torch.randn_like(noise), timesteps)

    trainer.DDPMScheduler.add_noise = add_noise


def early_timesteps(trainer):
    """Timesteps 0 to 799 of 1,000 only, as trainers' `max_timestep`."""
    change_batch(trainer, "timesteps", lambda timesteps: timesteps * 4 // 5)


def middle_timesteps(trainer):
    """Esser et al. 2024: timesteps have the distribution of sigmoid(N(0, 1)), so most lie in the middle."""
    import torch

    change_batch(trainer, "timesteps", lambda timesteps: (torch.randn(len(timesteps)).sigmoid() * 1000).long())


def caption_dropout(trainer):
    """One prompt in ten is empty, as for guidance."""
    import torch

    def change(input_ids):
        is_start = torch.arange(input_ids.shape[1]) == 0
        empty = torch.where(is_start, input_ids, input_ids[:, -1:])  # what follows the prompts' ends
        return torch.where(torch.rand(len(input_ids), 1) < 0.1, empty, input_ids)

    change_batch(trainer, "input_ids", change)


def average_weights(trainer):
    """The result is the moving average of the weights, by diffusers' EMAModel with its defaults."""
    from diffusers.training_utils import EMAModel

    plain_build = trainer.build_optimizer

    def build_optimizer(args, parameters, samples_per_step, max_train_steps):
        optimizer, lr_scheduler = plain_build(args, parameters, samples_per_step, max_train_steps)
        average = EMAModel(parameters)

        def after_step(*_):
            average.step(parameters)
            if average.optimization_step == max_train_steps:
                average.copy_to(parameters)

        optimizer.register_step_post_hook(after_step)
        return optimizer, lr_scheduler

    trainer.build_optimizer = build_optimizer


def values_only(trainer):
    """Keys stay as they are, as in Perfusion and in SPEED's edits."""

    def change(model, pipeline):
        for name, parameter in model.named_parameters():
            if "to_k" in name:
                parameter.requires_grad_(False)

    change_model(trainer, change)


def encode_phrase(model, pipeline, phrase, token):
    """Feature (dim,) of the first `token` of a phrase."""
    ids = pipeline.tokenizer(phrase, return_tensors="pt").input_ids
    return model.encode_text(ids)[0][0, ids[0].tolist().index(token)]


def semantic_loss(trainer):
    """ClassDiffusion 2024: plus 1 - cosine of the end tokens of "<new1> cat" and "cat", with weight 1."""
    import torch

    parts = []
    change_model(trainer, lambda model, pipeline: parts.append(pipeline))
    plain_loss = trainer.diffusion_loss

    def diffusion_loss(model, *rest):
        (pipeline,) = parts
        end = pipeline.tokenizer.eos_token_id
        concept, plain = (encode_phrase(model, pipeline, phrase, end) for phrase in ("<new1> cat", "cat"))
        return plain_loss(model, *rest) + 1 - torch.cosine_similarity(concept, plain.detach(), dim=0)

    trainer.diffusion_loss = diffusion_loss


def cross_initialization(trainer):
    """Pang et al. 2024: the word starts as the text encoder's output for its initializer token."""
    import torch

    @torch.no_grad()
    def change(model, pipeline):
        token = pipeline.tokenizer.convert_tokens_to_ids("yellow</w>")
        feature = encode_phrase(model, pipeline, "photo of a yellow cat", token)
        model.text_encoder.get_input_embeddings().rows.copy_(feature[None])

    change_model(trainer, change)


ROWS = {  # name: (flags, change)
    "nothing changed": ([], None),
    "min-SNR": ([], min_snr),
    "noise offset": ([], noise_offset),
    "timesteps below 800": ([], early_timesteps),
    "values only": ([], values_only),
    "pseudo-Huber loss": ([], huber),
    "moving average": ([], average_weights),
    "caption dropout": ([], caption_dropout),
    "timesteps from the middle": ([], middle_timesteps),
    "input perturbation": ([], input_perturbation),
    "pyramid noise": ([], pyramid_noise),
    "semantic preservation": ([], semantic_loss),
    "cross initialization": ([], cross_initialization),
    "constant learning rate": (["--lr_scheduler", "constant_with_warmup"], None),
}


# ---------- Runs ------------------------------------------------------------------------------------------------


def train_changed(name, flags):
    """Trains with the change of a row, in this process."""
    import torch

    import train_custom_diffusion as trainer

    args = trainer.parse_args(flags)
    torch.manual_seed(args.seed)  # of what a change draws; the trainer's own draws don't depend on it
    change = ROWS[name][1]
    if change:
        change(trainer)
    trainer.main(args)


def train_and_measure(name, seed, flags):
    """Measures of a row's run, which trains in a process of its own."""
    script = ("benchmarks/folklore.py", "--train", name, "--")
    return measures(concept_learning.train(f"folklore {name}", seed, flags, script), "final", ["cat"])


def row_of(name, found, before):
    """A row of the table: what was learned, and what was spoilt."""
    concepts, plain = zip(*((f["concepts"]["cat"]["cat"], f["leakage"]["cat"][0]) for f in found), strict=True)
    same = [share_as_before(p["main colours"], before) for p in plain]
    cells = [span([c[measure] for c in concepts]) for measure in ("colour", "layout", "background")]
    cells += [span([p["colour"] for p in plain]), span(same)]
    controls = ("plain color", "pattern colors", "shape")
    return [name, *cells, *(span([f["control"][control]["accuracy"] for f in found]) for control in controls)]


def parse_args():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure what other trainers' usual additions bring.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--quick", action="store_true", help="a step, a seed, few rough pictures: to see that it works")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME", help="only these")
    parser.add_argument("--train", choices=list(ROWS), metavar="NAME", help="train this row, with the flags after --")
    parser.add_argument("flags", nargs="*", help="flags for the trainer, after --")
    return parser.parse_args()


def main():
    """Trains and measures all rows, and prints the table."""
    args = parse_args()
    if args.train:
        train_changed(args.train, args.flags)
        return
    os.environ.update(ENVIRONMENT)
    few = ["--max_train_steps", "1"] if args.quick else []
    seeds = args.seeds[:1] if args.quick else args.seeds
    settings = (MODEL[1], args.quick)
    with ProcessPoolExecutor(min(4, os.cpu_count()), initializer=set_up, initargs=settings) as pool:
        base = pool.submit(measures, folder_of("base", 0), "final", list(concept_learning.TOKENS), limits=True)
        jobs = [
            (name, pool.submit(train_and_measure, name, seed, [*FLAGS, *ROWS[name][0], *few, *args.flags]))
            for seed in seeds
            for name in args.rows
        ]
        base = base.result()
        found = {name: [job.result() for other, job in jobs if other == name] for name in args.rows}
    before = base["leakage"]["cat"][0]["main colours"]
    header = ["changed", "colour", "layout", "background", '"cat": overlap', "main colour as before"]
    header += ["plain color", "pattern colors", "shape"]
    rows = [row_of("before the training", [base], before)]
    rows += [row_of(name, results, before) for name, results in found.items()]
    concept_learning.report(table(header, rows), "folklore")


if __name__ == "__main__":
    main()
