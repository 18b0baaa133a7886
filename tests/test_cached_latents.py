"""--cache_latents: what is encoded once, what is trained on, and what must not change it."""

import pytest
import torch
from conftest import (
    LAUNCHERS,
    SCRIPT,
    distance,
    finish,
    flags,
    fork,
    fresh_pipeline,
    load_trained,
    movement,
    run,
    same_bits,
    start,
)
from PIL import Image

K = 3
INSTANCES, CLASSES = 5, 4

# Keeps the pixels that are encoded before the training, every batch that is trained on and its latents.
RECORDER = """
import torch
from diffusers import AutoencoderKL, DDPMScheduler
record = {"pixels": [], "batches": [], "latents": [], "encoded_in_training": 0}
encode, add_noise, step = AutoencoderKL.encode, DDPMScheduler.add_noise, trainer.training_step
def recorded_encode(self, pixels, *args, **kwargs):
    if record["batches"]:
        record["encoded_in_training"] += 1
    record["pixels"].append(pixels.clone())
    return encode(self, pixels, *args, **kwargs)
def recorded_add_noise(self, latents, *args):
    record["latents"].append(latents.clone())
    return add_noise(self, latents, *args)
def recorded_step(*args):
    batch = next(value for value in args if isinstance(value, dict))
    record["batches"].append({key: value.clone() for key, value in batch.items()})
    loss = step(*args)
    torch.save(record, str(folder) + f".record{rank}")
    return loss
AutoencoderKL.encode, DDPMScheduler.add_noise = recorded_encode, recorded_add_noise
trainer.training_step = recorded_step
"""


@pytest.fixture(scope="module")
def cached(one_real_concept):
    """Flags: augmentation, a learning rate that moves."""
    return one_real_concept | {
        "num_class_images": CLASSES,
        "train_batch_size": 2,
        "max_train_steps": 8,
        "checkpointing_steps": 4,
        "sample_batch_size": 5,  # does not divide the 27 augmentations
        "cache_latents": K,
        # a step is nearly the gradient itself, not its sign
        "learning_rate": 1,
        "adam_epsilon": 1,
    }


@pytest.fixture(scope="module")
def recorded(cached, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "run"
    finish(start(folder, prelude=RECORDER, **cached), folder)
    return folder, torch.load(f"{folder}.record0", weights_only=True)


def test_each_augmentation_is_encoded_once(recorded):
    _, record = recorded
    pixels = torch.cat(record["pixels"])
    assert len(pixels) == K * (INSTANCES + CLASSES) and record["encoded_in_training"] == 0
    assert len({image.numpy().tobytes() for image in pixels}) > K * INSTANCES  # augmented, each in its own way


def test_trains_on_samples_of_the_vaes_posterior(recorded, sd1):
    """Mean and deviation are those that diffusers' VAE gives; the sample is another at each draw."""
    _, record = recorded
    vae = fresh_pipeline(sd1).vae
    with torch.no_grad():
        posterior = vae.encode(torch.cat(record["pixels"])).latent_dist
    drawn, noises = set(), []
    for batch, latents in zip(record["batches"], record["latents"], strict=True):
        for i, (mean, std) in enumerate(zip(batch["mean"], batch["std"], strict=True)):
            row = int((posterior.mean - mean).abs().amax((1, 2, 3)).argmin())
            assert torch.allclose(mean, posterior.mean[row], rtol=0, atol=1e-5 * float(posterior.mean.abs().max()))
            assert torch.allclose(std, posterior.std[row], rtol=1e-5)
            assert (row < K * INSTANCES) == (i < 2)  # instances first, then classes
            expected = (mean + std * batch["posterior_noise"][i]) * vae.config.scaling_factor
            assert torch.allclose(latents[i], expected, rtol=1e-5, atol=1e-6)
            drawn.add(row)
            noises.append(batch["posterior_noise"][i])
    assert len(drawn) > INSTANCES + CLASSES  # more than one augmentation of a picture is used
    noises = torch.stack(noises)
    assert len({noise.numpy().tobytes() for noise in noises}) == len(noises) == 32
    assert abs(noises.mean()) < 0.1 and abs(noises.std() - 1) < 0.1


def test_mask_and_words_are_the_augmentations(recorded, sd1):
    """Where the canvas around an instance picture is empty, the loss is masked; far ones say so."""
    _, record = recorded
    pixels, tokenizer = torch.cat(record["pixels"]), fresh_pipeline(sd1).tokenizer
    with torch.no_grad():
        means = fresh_pipeline(sd1).vae.encode(pixels).latent_dist.mean
    prefixes = [tokenizer(prefix, add_special_tokens=False).input_ids for prefix in ("a far away", "very small")]
    prefixed = 0
    for batch in record["batches"]:
        for mean, mask, ids in list(zip(batch["mean"], batch["mask"], batch["input_ids"], strict=True))[:2]:
            image = pixels[int((means - mean).abs().amax((1, 2, 3)).argmin())]
            filled = (image != 0).any(0)
            assert filled.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).all(2)[mask[0] == 1].all()
            far = max(filled.any(0).sum(), filled.any(1).sum()) < 0.6 * 64  # its longer side
            assert far == any(ids[1 : len(prefix) + 1].tolist() == prefix for prefix in prefixes)
            prefixed += far
    assert prefixed


def test_same_bits_with_workers_validation_and_resuming(recorded, cached, tmp_path):
    around = {"dataloader_num_workers": 2, "validation_prompt": "a <new1> cat", "validation_steps": 3}
    folder = fork(tmp_path / "run", **cached | around | {"max_train_steps": 4})
    fork(folder, **cached | around, resume_from_checkpoint="latest")
    assert same_bits(load_trained(folder), load_trained(recorded[0]))
    steps = sorted(int(file.stem.removeprefix("step-")) for file in (folder / "validation").iterdir())
    assert steps == [0, 3, 4, 6, 8]
    assert Image.open(folder / "steps.png").size == (4 * 64, 64 + 16)  # 0, 3, 6, 8: from before the resuming, too


def test_processes_share_the_work(recorded, cached, sd1, tmp_path):
    """Each encodes half, and trains as one process with all: the difference is the order of sums."""
    folder = tmp_path / "run"
    values = cached | {"train_batch_size": 1}
    finish(start(folder, processes=2, prelude=RECORDER, **values), folder)
    records = [torch.load(f"{folder}.record{rank}", weights_only=True) for rank in (0, 1)]
    shares = [len(torch.cat(record["pixels"])) for record in records]
    assert abs(shares[0] - shares[1]) <= 5 and 27 <= sum(shares) < 27 + 2 * 5
    expected = load_trained(recorded[0])
    assert distance(load_trained(folder), expected) < 0.01 * movement(sd1, expected)


def test_other_number_on_resuming_is_refused(recorded, cached, tmp_path):
    values = cached | {"cache_latents": 2, "resume_from_checkpoint": recorded[0] / "checkpoint-4"}
    process = run(*LAUNCHERS["python"], SCRIPT, *flags(output_dir=tmp_path / "run", resolution=64, **values))
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].endswith("made with cache_latents 3, this run has 2; use the same")
