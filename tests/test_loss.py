"""The loss against its formula in NumPy, with networks that return given numbers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
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
