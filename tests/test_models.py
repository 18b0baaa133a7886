"""Base models as they are on the hub: with other schedulers, tokenizers, blocks and files than the small model's."""

import functools
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import FAMILIES, make_family
from launching import finish, start
from observers import record_losses
from PIL import Image
from reading import WEIGHTS, load_trained, same_bits
from safetensors.torch import load_file

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


def log_of(folder, status=0, **values):
    """What a run prints that ends with this status."""
    return finish(start(folder, **values), folder, status)


# Families


@pytest.fixture(scope="session")
def family_run(one_concept, tmp_path_factory):
    """A function that makes a family's model and trains it for two steps: (model, output_dir, batches)."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("family")
        model = make_family(folder / "model", FAMILIES[name])
        values = one_concept | {
            "pretrained_model_name_or_path": model,
            "max_train_steps": 2,
            "learning_rate": 1e-2,
            "validation_prompt": "a <new1> cat",
            "num_validation_images": 1,
        }
        log_of(folder / "run", observer=record_losses, **values)
        return model, folder / "run", torch.load(folder / "run.losses", weights_only=True)

    return run


def pictures_of(folder):
    """The validation's picture before and after, without the line of text."""
    files = [folder / "validation" / f"step-{step:06d}.png" for step in (0, 2)]
    return [np.asarray(Image.open(file), int)[16:] for file in files]


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, family_run):
    """Trains, draws, and is loaded by diffusers into the model; what must not matter changes no bit."""
    family = FAMILIES[name]
    model, folder, batches = family_run(name)
    trained, base = load_trained(folder), load_file(model / UNET)
    for key in trained.keys() - {"<new1>"}:
        assert not torch.equal(trained[key], base[key.replace("processor.", "").replace("_custom_diffusion", "")]), key
    assert sum(key.endswith("attn2.to_k.weight") for key in base) == sum(".to_k_" in key for key in trained)
    rows = load_file(model / TEXT_ENCODER)
    table = next(rows[key] for key in rows if key.endswith("token_embedding.weight"))
    assert not (table == trained["<new1>"]).all(1).any()
    assert all(picture.std() > 1 for picture in pictures_of(folder))
    assert (pictures_of(folder)[0] != pictures_of(folder)[1]).any()
    for batch in batches:
        assert batch["input_ids"].shape == (1, 77)
        assert batch["input_ids"][0, -1] == (0 if family.pad_token == "!" else 49407)
        assert (batch["input_ids"] == 49408 + len(family.words)).sum() == 1

    if family.trains_as_1_5:
        assert same_bits(trained, load_trained(family_run("SD 1.5")[1]))
        # of the scheduler's settings only this one differs among these that a picture depends on
        other = "Realistic Vision 5.1" if "timestep_spacing" in family.scheduler else "SD 1.5"
        same_offset = family.scheduler.get("steps_offset") == FAMILIES[other].scheduler["steps_offset"]
        for picture, expected in zip(pictures_of(folder), pictures_of(family_run(other)[1]), strict=True):
            assert not same_offset or (picture == expected).all()
    elif name != "SD 1.5":
        assert not same_bits(trained, load_trained(family_run("SD 1.5")[1]))

    if family.loads:
        check_in_its_own_pipeline(model, folder, trained, family.pipeline)


def check_in_its_own_pipeline(model, folder, trained, kind):
    """diffusers loads the result into the pipeline that model_index.json names, which draws with its own scheduler."""
    pipeline = DiffusionPipeline.from_pretrained(model, safety_checker=None, feature_extractor=None)
    assert type(pipeline).__name__ == kind
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.load_attn_procs(folder, weight_name=f"{WEIGHTS}.safetensors", _pipeline=pipeline)
    pipeline.load_textual_inversion(folder, weight_name="<new1>.safetensors")
    state = pipeline.unet.state_dict()
    row = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids("<new1>")]
    assert torch.equal(row, trained["<new1>"])
    assert all(torch.equal(state[key], trained[key]) for key in trained.keys() - {"<new1>"})
    picture = pipeline("a <new1> cat", num_inference_steps=2, height=64, width=64).images[0]
    assert np.asarray(picture).std() > 1
