"""Base models as they are on the hub: with other schedulers, tokenizers, blocks and files than the small model's."""

import dataclasses
import functools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import FAMILIES, make_family
from launching import ROOT, finish, fork_code, fork_script, start
from models import SMALL_VOCABULARY
from observers import record_losses, record_losses_and_draw_fast
from original import write_original
from PIL import Image
from reading import WEIGHTS, load_trained, same_bits
from safetensors.torch import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


def log_of(folder, status=0, **values):
    """What a run prints that ends with this status."""
    return finish(start(folder, **values), folder, status)


# The model of diffusers' own test of its script, and what that test asks for


def peer_flags(model, world):
    """One concept whose prompt is the word alone."""
    values = {"instance_prompt": "<new1>", "modifier_token": "<new1>", "instance_data_dir": world / "my_cat"}
    return values | {"pretrained_model_name_or_path": model}


def checkpoints_of(folder):
    return {file.name for file in folder.glob("checkpoint-*")}


def test_vocabulary_without_the_default_initializers(small_vocabulary, world, tmp_path):
    """Starts from a piece that is there and says which; the .bin files load with diffusers."""
    values = {"max_train_steps": 2, "learning_rate": 1e-2, "no_safe_serialization": True}
    said = log_of(tmp_path / "run", **peer_flags(small_vocabulary, world) | values)
    vocabulary = json.loads((small_vocabulary / "tokenizer" / "vocab.json").read_text())
    assert "ktn" not in vocabulary
    piece = re.search(r"Training [\d,]+ parameters: crossattn_kv and <new1> \(from (.+)\)\n", said)[1]
    rows = [row for row in (piece, f"{piece}</w>") if row in vocabulary]
    assert rows and "<|" not in piece

    pipeline = DiffusionPipeline.from_pretrained(small_vocabulary)
    table = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    pipeline.unet.load_attn_procs(tmp_path / "run", weight_name=f"{WEIGHTS}.bin", _pipeline=pipeline)
    pipeline.load_textual_inversion(tmp_path / "run", weight_name="<new1>.bin")
    trained = torch.load(tmp_path / "run" / "<new1>.bin", weights_only=True)["<new1>"]
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[len(vocabulary)], trained)
    # two steps of the learning rate move no number farther
    near = [(table[vocabulary[row]] - trained).abs().max() < 0.03 for row in rows]
    assert any(near) and not torch.equal(table[vocabulary[rows[0]]], trained)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_only_the_newest_checkpoints_stay(small_vocabulary, world, tmp_path):
    values = {"max_train_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    log_of(tmp_path / "run", **peer_flags(small_vocabulary, world) | values)
    assert checkpoints_of(tmp_path / "run") == {"checkpoint-4", "checkpoint-6"}


def test_limit_after_resuming_by_name(small_vocabulary, world, tmp_path):
    values = peer_flags(small_vocabulary, world) | {"checkpointing_steps": 2}
    log_of(tmp_path / "run", **values, max_train_steps=4)
    assert checkpoints_of(tmp_path / "run") == {"checkpoint-2", "checkpoint-4"}
    values |= {"checkpoints_total_limit": 2, "resume_from_checkpoint": "checkpoint-4"}
    assert "step 4" in log_of(tmp_path / "run", **values, max_train_steps=8)
    assert checkpoints_of(tmp_path / "run") == {"checkpoint-6", "checkpoint-8"}


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
        log_of(folder / "run", observer=record_losses_and_draw_fast, **values)
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
        assert batch["input_ids"][0, -1] == (0 if family.pad_token == "!" else SMALL_VOCABULARY - 1)
        assert (batch["input_ids"] == SMALL_VOCABULARY + len(family.words)).sum() == 1

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


# Those that differ from the small models in what a file holds. What it lacks, such as the scheduler, is the folder's.
IN_ONE_FILE = ("SD 2.1", "BK-SDM small", "BK-SDM tiny")


@pytest.mark.parametrize("name", IN_ONE_FILE)
def test_family_in_one_file(name, family_run, one_concept, tmp_path):
    """In half precision it trains to the same bits as the folder whose numbers are in half precision."""
    model, _, _ = family_run(name)
    half = shutil.copytree(model, tmp_path / "half")
    for file in half.rglob("*.safetensors"):
        save_file({key: value.half() for key, value in load_file(file).items()}, file, {"format": "pt"})
    file = write_original(model, tmp_path / "model.safetensors", torch.float16, beside=True)
    values = one_concept | {"max_train_steps": 1, "learning_rate": 1e-2}
    log_of(tmp_path / "of folder", **values | {"pretrained_model_name_or_path": half})
    log_of(tmp_path / "of file", **values | {"pretrained_model_name_or_path": file, "config_name_or_path": model})
    assert same_bits(load_trained(tmp_path / "of file"), load_trained(tmp_path / "of folder"))


def test_xl_of_velocity_to_zero_terminal_snr(sdxl, one_concept, tmp_path):
    """As NoobAI has it: a folder whose scheduler says so, and a file whose keys do, with any XL's configurations."""
    model = shutil.copytree(sdxl, tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    values = one_concept | {"learning_rate": 1e-2, "validation_prompt": "a <new1> cat", "num_validation_images": 1}
    file = write_original(model, tmp_path / "model.safetensors", beside=True, empty=["v_pred", "ztsnr"])
    for name, base in {
        "of folder": {"pretrained_model_name_or_path": model},
        "of file": {"pretrained_model_name_or_path": file, "config_name_or_path": sdxl},
    }.items():
        printed = log_of(tmp_path / name, **values | base, max_train_steps=2)
        assert "The UNet predicts v_prediction, to zero terminal SNR" in printed
    assert same_bits(load_trained(tmp_path / "of file"), load_trained(tmp_path / "of folder"))
    for picture, expected in zip(*(pictures_of(tmp_path / name) for name in ("of file", "of folder")), strict=True):
        assert (picture == expected).all() and picture.std() > 1


# Files and words


@pytest.fixture
def flags_of(one_concept):
    """A function that gives the flags of one step with a model."""
    return lambda model, **values: one_concept | {"pretrained_model_name_or_path": model, "max_train_steps": 1} | values


@pytest.fixture
def tiny(tmp_path):
    """A model that a test may change."""
    return make_family(tmp_path / "model", FAMILIES["SD 1.5"])


def test_parts_that_nothing_needs(tiny, flags_of, tmp_path):
    """They are named by the model's index and not there: what is printed and exported does without them, too.

    So it is in the cache of a machine without a network, which has only what the training asked for.
    """
    index = json.loads((tiny / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (tiny / "model_index.json").write_text(json.dumps(index))
    said = log_of(tmp_path / "run", **flags_of(tiny))
    lines = said.partition("To use it:\n")[2]
    assert "num_inference_steps=100" in lines
    fork_code(lines.replace("steps=100", "steps=2").replace("eta=1.0", "height=64, width=64"), cwd=tmp_path)
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    model = tmp_path / "exported"
    words = [tmp_path / "run", "--pretrained_model_name_or_path", tiny, "--output", model, "--format", "model"]
    process = fork_script(ROOT / "scripts" / "export.py", *words)
    assert process.returncode == 0, process.stderr
    assert type(DiffusionPipeline.from_pretrained(model)).__name__ == "StableDiffusionPipeline"
    code = f"import sys; sys.path.append('{ROOT}/examples'); import before_after; before_after.load_pipeline('{tiny}')"
    fork_code(code)


def test_only_half_precision_files(tiny, flags_of, tmp_path):
    """Without --variant the line says what to give; with it the run trains."""
    for file in tiny.rglob("*.safetensors"):
        half = {key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
        file.unlink()
    said = log_of(tmp_path / "refused", status=1, **flags_of(tiny))
    assert "--variant fp16" in said.strip().splitlines()[-1] and "Traceback" not in said
    log_of(tmp_path / "run", **flags_of(tiny, variant="fp16"))
    trained = load_trained(tmp_path / "run")
    assert {value.dtype for value in trained.values()} == {torch.float32}


@pytest.mark.parametrize("words", ["<new1>+<new1>_1", "<new1>_1+<new1>", "<new1>", "<old>_1"])
def test_second_vector_of_another_word(words, flags_of, tmp_path):
    """diffusers reads X_1 as the second vector of X: not beside each other, nor beside a word that the model has."""
    added = {"<new1>": ("<new1>_1",), "<old>_1": ("<old>",)}.get(words, ())
    model = make_family(tmp_path / "model", dataclasses.replace(FAMILIES["SD 1.5"], words=added))
    prompt = f"photo of a {words.replace('+', ' ')} cat"
    values = flags_of(model, modifier_token=words, instance_prompt=prompt)
    line = log_of(tmp_path / "run", status=1, **values).strip().splitlines()[-1]
    assert line.startswith("error: --modifier_token") and "_1" in line and "vector" in line
    assert not (tmp_path / "run").exists()


def test_words_that_contain_each_other(tiny, world, tmp_path):
    """mycat1 and mycat10, each in a prompt of its own, are both trained; a class caption's mycat1og is neither."""
    concepts = [
        {
            "instance_prompt": f"photo of a {word}",
            "instance_data_dir": str(world / folder),
            "class_prompt": "a mycat1og of mycat10s",
            "class_data_dir": str(world / "cats"),
        }
        for word, folder in (("mycat1", "my_cat"), ("mycat10", "my_pot"))
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    values = {"concepts_list": tmp_path / "concepts.json", "modifier_token": "mycat1+mycat10", "learning_rate": 1e-2}
    values |= {"with_prior_preservation": True, "real_prior": True, "num_class_images": 4, "noaug": True}
    values |= {"pretrained_model_name_or_path": tiny, "train_batch_size": 2, "max_train_steps": 4}
    said = log_of(tmp_path / "run", observer=record_losses, **values)
    first, second = SMALL_VOCABULARY, SMALL_VOCABULARY + 1
    instances, classes = set(), set()
    for batch in torch.load(tmp_path / "run.losses", weights_only=True):
        rows = [frozenset(row.tolist()) & {first, second} for row in batch["input_ids"]]
        instances |= set(rows[:2])
        classes |= set(rows[2:])
    assert instances == {frozenset([first]), frozenset([second])} and classes == {frozenset()}
    starts = re.search(r"mycat1 \(from (.+?)\) and mycat10 \(from (.+?)\)", said).groups()
    vocabulary = json.loads((tiny / "tokenizer" / "vocab.json").read_text())
    table, trained = load_file(tiny / TEXT_ENCODER), load_trained(tmp_path / "run")
    (table,) = (value for key, value in table.items() if key.endswith("token_embedding.weight"))
    for word, piece in zip(("mycat1", "mycat10"), starts, strict=True):
        assert not torch.equal(trained[word], table[vocabulary[piece]])
