"""The embedded models, and the pictures that the first command of the README works with."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from launching import ROOT
from models import EMBEDDED
from PIL import Image
from reading import fresh_pipeline

ASSETS = ROOT / "assets"
XL = ASSETS / "model-xl"


def test_model_is_a_small_stable_diffusion():
    """float16 weights, CLIP's vocabulary, a VAE of factor 8, 128 pixels."""
    files = [file for file in EMBEDDED.rglob("*.safetensors")]
    assert {file.parent.name for file in files} == {"unet", "vae", "text_encoder"}
    assert sum(file.stat().st_size for file in files) <= 15e6
    pipeline = fresh_pipeline(EMBEDDED)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.text_encoder.config.vocab_size == len(pipeline.tokenizer) == 49408
    assert pipeline.vae_scale_factor == 8 and pipeline.unet.config.sample_size == 16
    assert all(torch.isfinite(parameter).all() for parameter in pipeline.unet.parameters())


def test_captions(monkeypatch):
    """They are of the world that the model knows, as tools/make_assets.py makes them, without a new word."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import world

    rng = random.Random(5)
    expected = [world.caption(world.sample_pretraining(rng), rng) for _ in range(1000)]
    assert (ASSETS / "captions.txt").read_text().splitlines() == expected


def test_xl_adds_little():
    """At most 10 MB of its own; the rest are relative links to the other model's files."""
    files = [Path(folder, name) for folder, _, names in os.walk(XL) for name in names]
    assert sum(file.stat().st_size for file in files if not file.is_symlink()) <= 10e6
    links = {str(path.relative_to(XL)): os.readlink(path) for path in XL.rglob("*") if path.is_symlink()}
    linked = {name: f"../model/{name}" for name in ("text_encoder", "tokenizer", "vae")}
    linked |= {f"tokenizer_2/{name}": f"../../model/tokenizer/{name}" for name in ("merges.txt", "vocab.json")}
    assert links == linked


@pytest.mark.parametrize("loader", [StableDiffusionXLPipeline, DiffusionPipeline])
def test_xl_is_a_small_stable_diffusion_xl(loader):
    pipeline = loader.from_pretrained(XL)
    assert type(pipeline) is StableDiffusionXLPipeline
    assert len(pipeline.tokenizer) == len(pipeline.tokenizer_2) == 49408
    assert (pipeline.tokenizer.pad_token_id, pipeline.tokenizer_2.pad_token_id) == (49407, 0)
    widths = [encoder.config.hidden_size for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    assert widths[0] != widths[1] and sum(widths) == pipeline.unet.config.cross_attention_dim
    assert pipeline.unet.config.addition_embed_type == "text_time" and pipeline.unet.config.sample_size == 16
    for part in (pipeline.unet, pipeline.text_encoder_2):
        assert all(torch.isfinite(parameter).all() for parameter in part.parameters())


def test_xl_draws_what_the_prompt_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import measure

    pipeline = StableDiffusionXLPipeline.from_pretrained(XL).to(torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    wanted = [("red", "gray"), ("blue", "yellow"), ("white", "green")]
    prompts = [f"photo of a {color} cat on a {background} background" for color, background in wanted]
    images = pipeline(prompts, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images
    for image, (color, background) in zip(images, wanted, strict=True):
        found = measure.measure(image)
        assert found["kind"] == "cat" and found["background"] == background
        assert measure.top_colors(found["histogram"], 1) == {color}


def test_tokenizer_splits_as_clip():
    ids = fresh_pipeline(EMBEDDED).tokenizer("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("name", ["cat", "pot"])
def test_instance_pictures(name):
    pictures = [Image.open(file) for file in sorted((ASSETS / "instance" / name).glob("*.png"))]
    assert len(pictures) == 5
    assert all(picture.size == (128, 128) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 5


@pytest.mark.parametrize("name", ["cat", "pot"])
def test_class_pictures(name):
    """200 pictures with captions in the layout that retrieve.py writes; images/ holds pictures only."""
    folder = ASSETS / "regularization" / name
    lists = {kind: (folder / kind).read_text().splitlines() for kind in ("images.txt", "caption.txt", "urls.txt")}
    assert {len(lines) for lines in lists.values()} == {200}
    metadata = {}
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        metadata[row["file_name"]] = row
    assert list(metadata) == lists["images.txt"]
    assert {f"images/{file.name}" for file in (folder / "images").iterdir()} == metadata.keys()
    for path, caption in zip(lists["images.txt"], lists["caption.txt"], strict=True):
        file = next(file for file in (ROOT / path, folder / path) if file.is_file())
        assert Image.open(file).size == (128, 128)
        assert name in caption.split() and caption in metadata[path].values()


def test_concept_list():
    """The guide's form, pointing at the embedded pictures."""
    concepts = json.loads((ROOT / "concept_list.json").read_text())
    assert len(concepts) == 2
    for concept in concepts:
        assert concept.keys() == {"instance_prompt", "class_prompt", "instance_data_dir", "class_data_dir"}
        assert (ROOT / concept["instance_data_dir"]).is_dir() and (ROOT / concept["class_data_dir"]).is_dir()
