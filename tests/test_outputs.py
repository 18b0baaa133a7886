"""What a run leaves, opened with diffusers itself: weights in both formats, pictures, logs."""

import importlib.util
import re

import numpy as np
import pytest
import torch
from conftest import (
    EMBEDDED,
    ROOT,
    WEIGHTS,
    base_weights,
    distance,
    fresh_pipeline,
    load_trained,
    load_weights,
    prediction,
    python,
    secrets_in,
    train,
)
from PIL import Image
from safetensors.torch import load_file

RARE = "zebra"  # a word of the vocabulary whose row the tests overwrite


def load_as_a_user(model, folder, words, suffix):
    """The documented way: load_attn_procs with _pipeline, load_textual_inversion for each word."""
    pipeline = fresh_pipeline(model)
    pipeline.unet.load_attn_procs(str(folder), weight_name=f"{WEIGHTS}.{suffix}", _pipeline=pipeline)
    for word in words:
        pipeline.load_textual_inversion(str(folder), weight_name=f"{word}.{suffix}")
    return pipeline


def copy_by_hand(model, folder, word=None):
    """The base model with the trained numbers copied into its own layers, and the new word's row into RARE's."""
    pipeline = fresh_pipeline(model)
    own = pipeline.unet.state_dict()
    for key, value in load_weights(folder).items():
        own[key.replace("processor.", "").replace("_custom_diffusion", "")].copy_(value)
    if word:
        row = pipeline.tokenizer.convert_tokens_to_ids(RARE + "</w>")
        embedding = pipeline.text_encoder.get_input_embeddings().weight.data
        embedding[row] = load_file(folder / f"{word}.safetensors")[word]
    return pipeline


def check_loading(model, folder, word, prompt, suffixes=("safetensors", "bin")):
    """Both formats give the hand-copied model's output, which is not the base model's."""
    expected = prediction(copy_by_hand(model, folder, word), prompt.replace(word, RARE) if word else prompt)
    base = prediction(fresh_pipeline(model), prompt.replace(word, RARE) if word else prompt)
    assert (expected - base).abs().max() > 1e-3
    for suffix in suffixes:
        found = prediction(load_as_a_user(model, folder, [word] if word else [], suffix), prompt)
        assert (found - expected).abs().max() < 1e-5, suffix


def check_weight_files(model, folder, words, projections):
    """Names, shapes and types of section "What a run leaves", for both formats."""
    unet = fresh_pipeline(model).unet
    keys, empty = {}, set()
    for name in unet.attn_processors:
        attention = name.removesuffix(".processor")
        if attention.endswith("attn1"):
            empty.add(name)
            continue
        for projection in projections:
            parameter, _, part = projection.partition(".")
            weight = unet.get_parameter(f"{attention}.{projection}")
            keys[f"{name}.{parameter}_custom_diffusion.{part}"] = weight.shape
    assert keys and empty
    safe = load_file(folder / f"{WEIGHTS}.safetensors")
    pickled = torch.load(folder / f"{WEIGHTS}.bin", weights_only=True)
    assert safe.keys() == pickled.keys() == keys.keys() | empty
    for key, shape in keys.items():
        assert safe[key].shape == pickled[key].shape == shape
        assert safe[key].dtype == pickled[key].dtype == torch.float32
        assert torch.equal(safe[key], pickled[key])
    for key in empty:
        assert safe[key].shape == (0,) and pickled[key] == {}
    for word in words:
        safe = load_file(folder / f"{word}.safetensors")
        pickled = torch.load(folder / f"{word}.bin", weights_only=True)
        assert safe.keys() == pickled.keys() == {word}
        dim = fresh_pipeline(model).text_encoder.config.hidden_size
        assert safe[word].shape == pickled[word].shape == (dim,)
        assert safe[word].dtype == pickled[word].dtype == torch.float32
        assert torch.equal(safe[word], pickled[word])


KV = ("to_k.weight", "to_v.weight")


def test_weight_files(trained, sd1):
    check_weight_files(sd1, trained, ["<new1>"], KV)


def test_weights_load_with_diffusers(trained, sd1):
    assert importlib.util.find_spec("peft"), "with peft installed another loader of diffusers could step in"
    check_loading(sd1, trained, "<new1>", "photo of a <new1> cat")


def test_every_checkpoint_loads_like_the_result(trained, sd1):
    check_loading(sd1, trained / "checkpoint-4", "<new1>", "photo of a <new1> cat")
    check_weight_files(sd1, trained / "checkpoint-4", ["<new1>"], KV)


def test_last_checkpoint_is_the_result(trained):
    assert distance(load_trained(trained), load_trained(trained / "checkpoint-6")) == 0
    assert distance(load_trained(trained), load_trained(trained / "checkpoint-4")) > 0


def test_everything_trained_moves(trained, sd1):
    """Each of the attention weights and the new word's row."""
    weights = load_weights(trained)
    for key, value in base_weights(sd1, weights).items():
        assert not torch.equal(value, weights[key]), key
    rows = fresh_pipeline(sd1).text_encoder.get_input_embeddings().weight
    assert not torch.equal(load_file(trained / "<new1>.safetensors")["<new1>"], rows[42170])


def test_checkpoint_is_small(trained, sd1):
    """It holds what is trained, not the text encoder: less than a third of the embedding table."""
    size = sum(file.stat().st_size for file in (trained / "checkpoint-6").rglob("*") if file.is_file())
    assert size < 49408 * 32 * 4 / 3


LABEL = 16  # pixels of the line of text above pictures of 64 pixels


def validation_grids(folder):
    """The validation's files by step, in order."""
    files = sorted((folder / "validation").iterdir())
    return {int(re.fullmatch(r"step-(\d+)\.png", file.name)[1]): np.asarray(Image.open(file), int) for file in files}


def test_validation_pictures(trained):
    """Before, at step 3 and at the end: a row of two pictures of 64 pixels each, below a line that says which step."""
    grids = validation_grids(trained)
    assert list(grids) == [0, 3, 6]
    assert all(grid.shape == (LABEL + 64, 128, 3) for grid in grids.values())
    labels, pictures = ([grid[part] for grid in grids.values()] for part in (slice(LABEL), slice(LABEL, None)))
    for parts in (labels, pictures):
        assert (parts[0] != parts[1]).any() and (parts[1] != parts[2]).any()
    assert all(label.min() < 50 and np.median(label) == 255 for label in labels)  # dark on white


def test_sheets_that_compare_steps(trained):
    """before_after.png: first and last grid below each other; steps.png: the first picture of each step."""
    before, middle, after = validation_grids(trained).values()
    assert (np.asarray(Image.open(trained / "before_after.png")) == np.concatenate([before, after])).all()
    strip = np.concatenate([grid[:, :64] for grid in (before, middle, after)], 1)
    assert (np.asarray(Image.open(trained / "steps.png")) == strip).all()


def test_first_validation_shows_the_base_model(trained, sd1):
    """Made here with diffusers alone: the word's row is the initializer's, DPM-Solver++ takes 25 steps."""
    from diffusers import DPMSolverMultistepScheduler

    pipeline = fresh_pipeline(sd1)
    row = pipeline.tokenizer.convert_tokens_to_ids(RARE + "</w>")
    table = pipeline.text_encoder.get_input_embeddings().weight.data
    table[row] = table[42170]
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    prompt, generator = f"a {RARE} cat in a bucket", torch.Generator().manual_seed(42)
    pictures = pipeline(
        prompt, num_images_per_prompt=2, num_inference_steps=25, height=64, width=64, generator=generator
    ).images
    expected = np.concatenate([np.asarray(picture, int) for picture in pictures], 1)
    assert np.abs(validation_grids(trained)[0][LABEL:] - expected).max() <= 2


def test_final_pictures(trained):
    """image_0.png, image_1.png: the same as the last validation, here from the files on disk."""
    pictures = [np.asarray(Image.open(trained / f"image_{i}.png"), int) for i in range(2)]
    assert np.abs(np.concatenate(pictures, 1) - validation_grids(trained)[6][LABEL:]).max() <= 2
    assert not (trained / "image_2.png").exists()


def test_secrets_are_in_no_file(trained):
    """Tokens of the hub and of trackers, as a flag and in the environment."""
    assert len(list(trained.rglob("*"))) > 10
    assert secrets_in(trained) == []


@pytest.fixture(scope="session")
def bin_only(cat_flags, tmp_path_factory):
    """No new word, class pictures of a plain folder, only .bin files."""
    flags = cat_flags | {
        "modifier_token": None,
        "instance_prompt": "photo of a cat",
        "class_data_dir": cat_flags["cwd"] / "cats",
        "no_safe_serialization": True,
        "max_train_steps": 2,
        "checkpointing_steps": 2,
    }
    return train(tmp_path_factory.mktemp("runs") / "bin_only", **flags)


def test_bin_only(bin_only, sd1):
    """No .safetensors anywhere, no embedding file; the one weight file loads and differs from the base model."""
    assert not list(bin_only.rglob("*.safetensors"))
    assert {file.name for file in bin_only.glob("*.bin")} == {f"{WEIGHTS}.bin"}
    weights = torch.load(bin_only / f"{WEIGHTS}.bin", weights_only=True)
    pipeline = fresh_pipeline(sd1)
    base = prediction(pipeline, "photo of a cat")
    own = pipeline.unet.state_dict()
    for key, value in weights.items():
        if len(value):
            own[key.replace("processor.", "").replace("_custom_diffusion", "")].copy_(value)
    expected = prediction(pipeline, "photo of a cat")
    assert (expected - base).abs().max() > 1e-3
    for folder in (bin_only, bin_only / "checkpoint-2"):
        found = prediction(load_as_a_user(sd1, folder, [], "bin"), "photo of a cat")
        assert (found - expected).abs().max() < 1e-5


@pytest.fixture(scope="session")
def embedded(world, tmp_path_factory):
    """The embedded model at its own resolution."""
    return train(
        tmp_path_factory.mktemp("runs") / "embedded",
        launcher="accelerate",
        pretrained_model_name_or_path=EMBEDDED,
        instance_data_dir=world / "my_cat",
        instance_prompt="photo of a <new1> cat",
        modifier_token="<new1>",
        initializer_token="cat",
        validation_prompt="photo of a <new1> cat",
        num_validation_images=1,
        resolution=128,
        max_train_steps=3,
        learning_rate=5e-3,
    )


def test_embedded_model(embedded):
    check_weight_files(EMBEDDED, embedded, ["<new1>"], KV)
    check_loading(EMBEDDED, embedded, "<new1>", "photo of a <new1> cat")


def test_embedded_model_changes_the_picture(embedded):
    """The picture before the first step against the final one."""
    before = validation_grids(embedded)[0][-128:]
    after = np.asarray(Image.open(embedded / "image_0.png"), int)
    assert before.shape == after.shape == (128, 128, 3)
    assert np.abs(before - after).mean() > 2


def test_printed_snippet_works(embedded, tmp_path):
    """The last lines of a run say how to use it; they run as printed."""
    printed = (embedded / "stdout.txt").read_text()
    _, _, snippet = printed.partition("To use it:\n")
    assert "load_attn_procs" in snippet
    python(snippet, cwd=tmp_path)
    (picture,) = tmp_path.glob("*.png")
    assert Image.open(picture).size == (128, 128)


def test_readme_snippets_load_the_weights():
    """Every Python line of the README that loads attention weights gives the pipeline too: without it nothing loads."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "load_attn_procs(" in line]
    calls = [line for line in lines if not line.lstrip().startswith(("#", "-", "|", ">"))]
    assert calls
    assert [line for line in calls if "weight_name" in line and "_pipeline=" not in line] == []
