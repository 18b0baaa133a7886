"""The loss against its formula in NumPy, with networks that return given numbers and with real ones."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import flags, loaded_pipeline, python
from diffusers import DDPMScheduler

from train_custom_diffusion import diffusion_loss

RNG = np.random.default_rng(0)


class FakeVAE:
    """Encodes to a posterior with given mean and deviation."""

    dtype, config = torch.float32, SimpleNamespace(scaling_factor=0.3)

    def __init__(self, mean, std):
        self.posterior = SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.tensor(mean), std=torch.tensor(std)))

    def encode(self, pixel_values):
        return self.posterior


@pytest.mark.parametrize("cells", [8, 12, 64])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss(prediction_type, prior, cells):
    """Instance part: sum over masked elements / sum of the mask, mean over samples. Prior part: plain mean."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    n = 4
    mean, std, eps, noise, predicted = (RNG.standard_normal((n, 4, cells, cells)).astype(np.float32) for _ in range(5))
    timesteps, mask = np.array([3, 250, 600, 999]), np.zeros((n, 1, cells, cells), np.float32)
    mask[0, 0, 2:5, 1:7], mask[1, 0, -1, 0], mask[2, 0, 3:], mask[3] = 1, 1, 1, 1  # each sample has another sum

    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[timesteps][:, None, None, None]
    latents = (mean + std * eps) * 0.3
    noisy = alphas**0.5 * latents + (1 - alphas) ** 0.5 * noise
    target = noise if prediction_type == "epsilon" else alphas**0.5 * noise - (1 - alphas) ** 0.5 * latents
    error = (predicted - target) ** 2
    instances = 2 if prior else n
    expected = np.mean([(error[i] * mask[i]).sum() / mask[i].sum() for i in range(instances)])
    if prior:
        expected += 0.3 * error[instances:].mean()

    seen = {}

    def model(noisy_latents, timesteps, input_ids):
        seen.update(noisy=noisy_latents, timesteps=timesteps, ids=input_ids)
        return torch.tensor(predicted)

    batch = {
        "pixel_values": torch.zeros(n, 3, 8 * cells, 8 * cells),
        "mask": torch.tensor(mask),
        "input_ids": torch.arange(n)[:, None],
        "posterior_noise": torch.tensor(eps),
        "noise": torch.tensor(noise),
        "timesteps": torch.tensor(timesteps),
    }
    args = SimpleNamespace(with_prior_preservation=prior, prior_loss_weight=0.3)
    found = diffusion_loss(model, FakeVAE(mean, std), scheduler, batch, args)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert np.allclose(seen["noisy"], noisy, atol=1e-4)
    assert seen["timesteps"].tolist() == timesteps.tolist() and seen["ids"].flatten().tolist() == [0, 1, 2, 3]


# Real networks: the trainer's batches and losses in full and in bf16 precision, with a learning rate of 0, which leaves
# the networks as they were.

RECORDER = """
import json, sys
import torch
from accelerate.state import AcceleratorState
import train_custom_diffusion as trainer

loss_of, record = trainer.diffusion_loss, {}
for name, call in json.loads(sys.argv[2]).items():
    steps = record[name] = []
    def recorded(model, vae, noise_scheduler, batch, args):
        loss = loss_of(model, vae, noise_scheduler, batch, args)
        steps.append(dict(batch) | {"loss": loss.detach().clone()})
        return loss
    trainer.diffusion_loss = recorded
    trainer.main(trainer.parse_args(call))
    AcceleratorState._reset_state(True)  # else all would have the precision of the first
torch.save(record, sys.argv[1])
"""
RUNS = {
    "sd1": {"resolution": 64},
    "sd1, bf16": {"resolution": 64, "mixed_precision": "bf16"},
    "sd2": {"resolution": 96},
    "sd2, bf16": {"resolution": 96, "mixed_precision": "bf16"},
    "sd1, large": {"resolution": 512, "train_batch_size": 1, "max_train_steps": 1},
}


@pytest.fixture(scope="module")
def recorded(sd1, sd2, cat_flags, tmp_path_factory):
    folder, calls = tmp_path_factory.mktemp("loss"), {}
    for name, values in RUNS.items():
        model = {"pretrained_model_name_or_path": sd2 if "sd2" in name else sd1}
        more = {"learning_rate": 0, "max_train_steps": 3, "prior_loss_weight": 0.3, "report_to": "none"}
        more |= {"dataloader_num_workers": 0, "output_dir": folder / name}
        calls[name] = flags(**cat_flags | model | more | values | {"cwd": None})
    python(RECORDER, folder / "record.pt", json.dumps(calls), cwd=cat_flags["cwd"])
    return torch.load(folder / "record.pt", weights_only=True)


@torch.no_grad()
def loss_by_formula(model, batch, v_prediction):
    """The contract's formulas in NumPy around diffusers' networks; <new1> has the embedding of ktn."""
    pipeline, number = loaded_pipeline(model), {key: value.double().numpy() for key, value in batch.items()}
    posterior = pipeline.vae.encode(batch["pixel_values"]).latent_dist
    latents = posterior.mean.double().numpy() + posterior.std.double().numpy() * number["posterior_noise"]
    latents *= 0.18215
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[batch["timesteps"].numpy()]
    signal, noise = np.sqrt(alphas)[:, None, None, None], np.sqrt(1 - alphas)[:, None, None, None]
    noisy = torch.from_numpy(signal * latents + noise * number["noise"]).float()
    hidden = pipeline.text_encoder(batch["input_ids"].where(batch["input_ids"] != 49408, torch.tensor(42170)))[0]
    predicted = pipeline.unet(noisy, batch["timesteps"], hidden).sample.double().numpy()
    error = (predicted - (signal * number["noise"] - noise * latents if v_prediction else number["noise"])) ** 2
    half, mask = len(error) // 2, number["mask"]
    instance = [(error[i] * mask[i]).sum() / mask[i].sum() for i in range(half)]
    return np.mean(instance) + 0.3 * error[half:].mean()


@pytest.mark.parametrize("name", RUNS)
def test_loss_of_real_networks(name, recorded, sd1, sd2):
    """Equal in full precision; in bf16 equal within its 8 bits, and not computed in more."""
    sizes = set()
    for batch in recorded[name]:
        loss = batch.pop("loss").item()
        expected = loss_by_formula(sd2 if "sd2" in name else sd1, batch, "sd2" in name)
        sizes.add(float(batch["mask"].mean()))
        assert loss == pytest.approx(expected, rel=0.02 if "bf16" in name else 1e-4)
        if "bf16" in name:
            assert abs(loss - expected) > 1e-5 * expected
    assert min(sizes) < 1, "some masks leave something out"
