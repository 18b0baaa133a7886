"""The trained weights with other parts of diffusers: merged into the UNet, image to image, inpainting, offloading."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import EMBEDDED, ROOT, WEIGHTS, fork, fresh_pipeline, prediction
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file

PROMPT = "photo of a <new1> cat on the beach"
PICTURE = ROOT / "assets" / "instance" / "pot" / "0.png"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MERGING = re.search(r"^for name, value in load_file.*?(?=^pipeline\.)", README, re.DOTALL | re.MULTILINE)[0]


@pytest.fixture(scope="module", params=["crossattn_kv", "crossattn"])
def weights(request, tmp_path_factory):
    """A run of the embedded model that moved the weights far."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    values = {"freeze_model": request.param, "resolution": 128, "learning_rate": 1e-2, "max_train_steps": 3}
    values |= {"instance_prompt": "photo of a <new1> cat", "modifier_token": "<new1>", "initializer_token": "yellow"}
    pictures = ROOT / "assets" / "instance" / "cat"
    return fork(folder, pretrained_model_name_or_path=EMBEDDED, instance_data_dir=pictures, **values)


@pytest.fixture(scope="module")
def loaded(weights):
    """As the README loads them."""
    pipeline = fresh_pipeline(EMBEDDED)
    pipeline.unet.load_attn_procs(weights, weight_name=f"{WEIGHTS}.safetensors", _pipeline=pipeline)
    pipeline.load_textual_inversion(weights, weight_name="<new1>.safetensors")
    return with_quick_sampler(pipeline)


@pytest.fixture(scope="module")
def merged(weights):
    """As the README's lines merge them."""
    pipeline = fresh_pipeline(EMBEDDED)
    exec(MERGING, {"pipeline": pipeline, "weights": str(weights), "load_file": load_file})
    pipeline.load_textual_inversion(weights, weight_name="<new1>.safetensors")
    return with_quick_sampler(pipeline)


def with_quick_sampler(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def draw(pipeline, **options):
    """One picture of the prompt in a few steps, as an array."""
    options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)} | options
    return np.asarray(pipeline(PROMPT, **options).images[0], int)


def test_merged_is_exact(weights, loaded, merged):
    """Every number is in its place, none other has changed, and the prediction is the same."""
    base, found = fresh_pipeline(EMBEDDED).unet.state_dict(), merged.unet.state_dict()
    trained = {key: value for key, value in load_file(weights / f"{WEIGHTS}.safetensors").items() if value.numel()}
    changed = {key for key in base if not torch.equal(base[key], found[key])}
    expected = {re.sub(r"\.processor\.(to_\w+)_custom_diffusion", r".\1", key): key for key in trained}
    assert changed == expected.keys() and len(changed) == len(trained)
    assert all(torch.equal(found[own], trained[key]) for own, key in expected.items())
    of_merged, of_loaded, of_base = (prediction(p, PROMPT) for p in (merged, loaded, fresh_pipeline(EMBEDDED)))
    assert (of_merged - of_loaded).abs().max() < 1e-5 < (of_merged - of_base).abs().max()


def test_merged_is_a_plain_model(merged, tmp_path):
    """It has diffusers' own attention, and saved it loads as a model that knows the word."""
    assert {type(processor).__name__ for processor in merged.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    merged.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert (draw(again) == draw(merged)).all()


def test_other_pipelines(loaded, merged):
    """Image to image and inpainting from the same components: the trained networks draw, in the places they should."""
    picture, mask = Image.open(PICTURE).convert("RGB"), Image.new("L", (128, 128), 0)
    mask.paste(255, (0, 0, 128, 64))
    base = with_quick_sampler(fresh_pipeline(EMBEDDED))
    for other, options in (
        (AutoPipelineForImage2Image, {"image": picture, "strength": 0.8}),
        (AutoPipelineForInpainting, {"image": picture, "mask_image": mask}),
    ):
        pipelines = [other.from_pipe(pipeline) for pipeline in (loaded, merged, base)]
        assert pipelines[0].unet is loaded.unet
        for pipeline in pipelines:
            pipeline.set_progress_bar_config(disable=True)
        found, same, before = (draw(pipeline, **options) for pipeline in pipelines)
        assert np.abs(found - same).max() <= 2  # the attention kernels round differently
        assert np.abs(found - before).mean() > 2
    assert np.abs(found - np.asarray(picture))[72:].mean() < 10 < np.abs(found - np.asarray(picture))[:56].mean()


def test_model_offload(loaded):
    """Its hooks, here with a CPU in the GPU's place, take the trained weights along; without a GPU it is refused."""
    pipeline = copy.deepcopy(loaded)
    with pytest.raises(RuntimeError, match="requires accelerator"):
        pipeline.enable_model_cpu_offload()
    pipeline.enable_model_cpu_offload(device="cpu")
    assert (draw(pipeline) == draw(loaded)).all()


def test_merged_compiles(merged):
    """torch.compile takes the merged UNet in one graph, and it predicts the same; without the generation of code."""
    expected = prediction(merged, PROMPT)
    compiled = copy.copy(merged)
    compiled.unet = torch.compile(merged.unet, fullgraph=True, backend="aot_eager")
    assert (prediction(compiled, PROMPT) - expected).abs().max() < 1e-4
