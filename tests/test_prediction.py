"""What the UNet predicts and which layer of the text it sees: as model, file or flags say it, and checked."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from launching import ROOT, finish, fork, fork_script, start
from models import EMBEDDED
from observers import predict_velocity, record_losses
from original import write_original
from PIL import Image
from reading import load_trained, same_bits

from train_custom_diffusion import DenoisingModel, diffusion_loss

SMALL_XL = ROOT / "assets" / "model-xl"


@pytest.fixture
def flags_of(one_concept):
    """A function that gives the flags of one step with a model."""
    return lambda model, **values: one_concept | {"pretrained_model_name_or_path": model, "max_train_steps": 1} | values


def log_of(folder, status=0, **values):
    """What a run prints that ends with this status."""
    return finish(start(folder, **values), folder, status)


def record_of(folder):
    """What the result's files say of its settings."""
    from safetensors import safe_open

    with safe_open(folder / "pytorch_custom_diffusion_weights.safetensors", "pt") as file:
        return json.loads(file.metadata()["settings"])


def last_line(said):
    return said.strip().splitlines()[-1]


# Noise or velocity


@pytest.mark.parametrize("model", [EMBEDDED, SMALL_XL], ids=["model", "model-xl"])
def test_wrong_prediction_type_is_refused(model, flags_of, tmp_path):
    """Of a trained model, by its error on the first pictures; whoever has no trained model is not asked."""
    values = {"resolution": 128, "initializer_token": "yellow"}
    said = log_of(tmp_path / "wrong", 1, **flags_of(model, prediction_type="v_prediction", **values))
    line = last_line(said)
    assert line.startswith("error: --prediction_type: v_prediction") and "give --prediction_type epsilon" in line
    assert "predicts epsilon, as its scheduler says" in log_of(tmp_path / "right", **flags_of(model, **values))


def test_velocity_of_a_model_that_says_noise(flags_of, tmp_path):
    """The model is named, and with the flag it is trained and drawn by its velocity."""
    values = flags_of(EMBEDDED, resolution=128, initializer_token="yellow", observer=predict_velocity)
    line = last_line(log_of(tmp_path / "wrong", 1, **values))
    assert line.startswith("error: --pretrained_model_name_or_path") and "give --prediction_type v_prediction" in line
    said = log_of(tmp_path / "right", **values, prediction_type="v_prediction")
    assert "predicts v_prediction, as --prediction_type says" in said
    lines = said.partition("To use it:\n")[2]
    assert "DDIMScheduler.from_config(pipeline.scheduler.config, **{'prediction_type': 'v_prediction'})" in lines
    assert record_of(tmp_path / "right")["prediction_type"] == "v_prediction"


def test_keys_of_a_file(sd1, flags_of, tmp_path):
    """v_pred and ztsnr are as good as flags, and lose against them; the printed lines draw with them."""
    file = write_original(sd1, tmp_path / "model.safetensors", empty=["v_pred", "ztsnr"])
    given = flags_of(file, config_name_or_path=sd1, learning_rate=1e-2)
    said = log_of(tmp_path / "keys", **given, observer=record_losses)
    source = "the file's key v_pred"
    assert f"predicts v_prediction, to zero terminal SNR, as {source} says" in said
    stated = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert stated.items() <= record_of(tmp_path / "keys").items()
    fork(tmp_path / "flags", **flags_of(sd1, learning_rate=1e-2, **stated))
    assert same_bits(load_trained(tmp_path / "keys"), load_trained(tmp_path / "flags"))
    said_of_flag = log_of(tmp_path / "other", **given, prediction_type="epsilon")
    assert "predicts epsilon, to zero terminal SNR, as --prediction_type says" in said_of_flag

    lines = said.partition("To use it:\n")[2]
    assert f"**{stated | {'timestep_spacing': 'trailing'}}" in lines
    use = tmp_path / "use.py"
    use.write_text(lines.replace("steps=100", "steps=2").replace("eta=1.0", "height=64, width=64"))
    process = fork_script(use, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert np.asarray(Image.open(tmp_path / "picture.png")).std() > 1


def test_loss_at_zero_terminal_snr():
    """At the last step nothing is left of the picture: the velocity is minus the picture, and the loss is finite."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", rescale_betas_zero_snr=True,
    )  # fmt: skip
    latents, noise, predicted = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    batch = {"mean": latents, "std": torch.zeros_like(latents), "posterior_noise": noise, "noise": noise}
    batch |= {"timesteps": torch.tensor([999, 999]), "mask": torch.ones(2, 1, 8, 8), "input_ids": torch.zeros(2, 77)}

    def model(noisy_latents, *_):
        seen.append(noisy_latents)
        return predicted

    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.5))
    loss = diffusion_loss(model, vae, scheduler, batch, 1)
    assert torch.allclose(seen[0], noise) and not torch.allclose(noise, latents)
    # the mask's one channel stands for four
    assert loss.isfinite() and torch.allclose(loss, 4 * (predicted + 0.5 * latents).square().mean())


# Clip skip


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_skip_is_that_of_the_pipelines(clip_skip, kind, request):
    """The features are those that diffusers' pipeline gives its UNet."""
    model = request.getfixturevalue(kind)
    pipeline_class = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipeline = pipeline_class.from_pretrained(model).to(torch.float32)
    if not hasattr(pipeline.text_encoder, "text_model"):
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    expected = pipeline.encode_prompt("a red cat", clip_skip=clip_skip or None, **options)
    tokenizers = [pipeline.tokenizer, *([pipeline.tokenizer_2] if kind == "sdxl" else [])]
    ids = [each("a red cat", padding="max_length", return_tensors="pt").input_ids for each in tokenizers]
    with torch.no_grad():
        features, pooled = DenoisingModel(pipeline, clip_skip).encode_text(*ids)
        assert torch.equal(features, expected[0])
        assert pooled is None or torch.equal(pooled, expected[2])
        other, _ = DenoisingModel(pipeline, 1 - clip_skip).encode_text(*ids)
    assert not torch.allclose(features, other, atol=1e-2)


def test_clip_skip_everywhere(sd1, flags_of, tmp_path):
    """Training, class pictures and validation see that layer; record and printed lines name it."""
    values = {"validation_prompt": "a <new1> cat", "num_validation_images": 1, "learning_rate": 1e-2}
    values |= {"with_prior_preservation": True, "class_prompt": "cat", "num_class_images": 1, "keep_apart": True}
    drawn, said = {}, {}
    for skip in (0, 1):
        classes = tmp_path / f"classes {skip}"
        folder = tmp_path / f"run {skip}"
        said[skip] = log_of(folder, **flags_of(sd1, clip_skip=skip, class_data_dir=classes, **values))
        files = [classes / "generated-00000.png", folder / "validation" / "step-000000.png", folder / "image_0.png"]
        drawn[skip] = [np.asarray(Image.open(file), int) for file in files]
        assert record_of(folder)["clip_skip"] == skip
    assert all((left != right).any() for left, right in zip(drawn[0], drawn[1], strict=True))
    assert "clip_skip=" not in said[0]
    use = tmp_path / "use.py"
    lines = said[1].partition("To use it:\n")[2]
    assert "clip_skip=1, num" in lines
    use.write_text(lines.replace("steps=100", "steps=2").replace("eta=1.0", "height=64, width=64"))
    process = fork_script(use, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
