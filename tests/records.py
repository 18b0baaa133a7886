"""Copies of results with other records, files or formats, as other versions and other scripts leave them."""

import hashlib
import json
import re
import shutil

import torch
from reading import WEIGHTS, load_weights, loaded_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file


def settings_of(folder):
    """The record in the weights of a result."""
    with safe_open(folder / f"{WEIGHTS}.safetensors", "pt") as content:
        return json.loads((content.metadata() or {}).get("settings", "{}"))


def set_record(folder, settings):
    """Writes a record into the weights of a result, or none if `settings` is None; returns the folder."""
    file = folder / f"{WEIGHTS}.safetensors"
    metadata = {"format": "pt"} if settings is None else {"settings": json.dumps(settings)}
    save_file(load_file(file), file, metadata)
    return folder


def copy_result(source, folder, **changes):
    """A copy of a result, without its checkpoints, with other settings in its record; None removes one."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoint-*", "logs", ".*"))
    settings = settings_of(source) | changes
    return set_record(folder, {name: value for name, value in settings.items() if value is not None})


def rename_words(folder, words):
    """Gives the words of a result other names: {old: new}. Files and record follow, prompts included."""
    settings = json.dumps(settings_of(folder))
    for old, new in words.items():
        row = load_file(folder / f"{old}.safetensors")[old]
        for suffix in ("safetensors", "bin"):
            (folder / f"{old}.{suffix}").unlink()
        save_file({new: row}, folder / f"{new}.safetensors")
        settings = settings.replace(old, new)
    return set_record(folder, json.loads(settings))


def only_bin(folder):
    """Leaves .bin alone of a result, or of a checkpoint, which has none before; returns the folder."""
    for file in folder.glob("*.safetensors"):
        if not file.with_suffix(".bin").exists():
            torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    return folder


def base_digest(model, folder, dtype):
    """The digest of a base model's layers that a result has, in this precision, computed from what diffusers loads."""
    own = loaded_pipeline(model).unet.state_dict()
    layers = {key: re.sub(r"processor\.|_custom_diffusion", "", key) for key in load_weights(folder)}
    content = save({key: own[layer].to(dtype).contiguous() for key, layer in layers.items()})
    return hashlib.sha256(content).hexdigest()[:16]


def moved_model(model, folder, dtype=torch.float32, step=0.0):
    """A copy of a model whose UNet has `step` added to its weights, saved in another precision."""
    shutil.copytree(model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: (value + step).to(dtype) for key, value in load_file(file).items()}, file)
    return folder


def make_result(model, folder, parts=("to_k.weight", "to_v.weight"), step=0.1):
    """A result without words and record: these parts of a model's cross-attention, moved by random numbers."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    moved = {}
    for file in (model / "unet").glob("*.safetensors"):
        for name, value in load_file(file).items():
            layer, found, part = name.partition(".attn2.")
            if found and part in parts:
                projection, _, ending = part.partition(".")
                key = f"{layer}.attn2.processor.{projection}_custom_diffusion.{ending}"
                moved[key] = value.float() + step * torch.randn(value.shape)
    save_file(moved, folder / f"{WEIGHTS}.safetensors")
    return folder
