"""scripts/export.py: what other tools get, loaded with diffusers and lycoris-lora and compared with what was trained.

Two results are exported. sd1: keys and values of a Stable Diffusion 1.x. sd2: queries, outputs and their biases too
(crossattn), of a Stable Diffusion 2.x, with two words. The models differ in their layers and in how they are described.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hub import Hub
from launching import ROOT, SECRET, flags, fork, fork_script, run
from models import EMBEDDED
from reading import WEIGHTS, fresh_pipeline, load_as_a_user, load_weights, loaded_pipeline, prediction, same_bits
from records import base_digest, copy_result, moved_model, only_bin, rename_words, set_record, settings_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "scripts"))
import export as script  # noqa: E402

EXPORT = ROOT / "scripts" / "export.py"
WORDS = {"sd1": ["<new1>"], "sd2": ["<New1>", "<new2>"]}
PROMPTS = {"sd1": "photo of a <new1> cat", "sd2": "photo of a <New1> cat and a <new2> pot"}
LOST = re.compile(r"Lost of the trained change: (\S+) % overall, (\S+) % in (\S+)")
DIM = 32  # of the words of the small models, and the full rank of their layers
HF = Path(sys.executable).with_name("hf")


@pytest.fixture(scope="module")
def results(sd1, sd2, trained, two_real_concepts, tmp_path_factory):
    """Models and trained folders by name."""
    values = two_real_concepts | {"pretrained_model_name_or_path": sd2, "freeze_model": "crossattn"}
    folder = fork(tmp_path_factory.mktemp("export") / "run", max_train_steps=4, learning_rate=1e-2, **values)
    return {"sd1": (sd1, trained), "sd2": (sd2, folder)}


def export(result, model, output, status=0, env=None, **values):
    """Runs the script as a user does; returns what it printed."""
    words = flags(pretrained_model_name_or_path=model, output=output, **values)
    process = run(sys.executable, EXPORT, result, *words, env=env) if env else fork_script(EXPORT, result, *words)
    assert process.returncode == status, process.stdout + process.stderr
    return process.stdout if status == 0 else process.stderr


def export_here(result, model, output, warnings=False, **values):
    """Calls the script's main in this process, which has torch already; returns what it printed."""
    words = flags(pretrained_model_name_or_path=model, output=output, **values)
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if warnings:
            stack.enter_context(contextlib.redirect_stderr(said))
        script.main(script.parse_args([str(result), *words]))
    return said.getvalue()


def layer(key):
    """Our key of a trained tensor as the UNet's name of it."""
    return key.replace("processor.", "").replace("_custom_diffusion", "")


def changes_of(model, folder):
    """{UNet's name: what training added}, in NumPy's float64."""
    base = loaded_pipeline(model).unet.state_dict()
    return {layer(k): (v.double() - base[layer(k)].double()).numpy() for k, v in load_weights(folder).items()}


def kohya(name):
    return "lora_unet_" + name.rpartition(".")[0].replace(".", "_")


def products(file, names):
    """{UNet's name: up @ down * alpha / rank} of a LoRA, in float64."""
    table = {key: value.double().numpy() for key, value in load_file(file).items()}
    found = {}
    for name in names:
        down, up, alpha = (table[f"{kohya(name)}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        found[name] = up @ down * alpha / len(down)
    return found


def use_words(pipeline, folder, words):
    """Loads the exported embeddings under the words' own names."""
    for word in words:
        pipeline.load_textual_inversion(folder, weight_name=f"{word.strip('<>')}.safetensors", token=word)
    return pipeline


def add_to_layers(model, changes):
    """The base model with changes added to its own layers."""
    pipeline = fresh_pipeline(model)
    own = pipeline.unet.state_dict()
    for name, change in changes.items():
        own[name] += torch.from_numpy(change).to(own[name])
    return pipeline


def printed_loss(said):
    """The two shares, overall and of the worst layer, and that layer."""
    overall, worst, name = LOST.search(said).groups()
    return float(overall) / 100, float(worst) / 100, name


def norm(arrays):
    return sum(float(np.square(array).sum()) for array in arrays) ** 0.5


# LoRA


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_lora_of_full_rank_predicts_as_trained(name, results, tmp_path):
    """diffusers loads it through PEFT. What a LoRA cannot hold, the biases of crossattn, is told and added here."""
    model, folder = results[name]
    said = export(folder, model, tmp_path / "cat.safetensors", rank=1000, dtype="fp32")
    assert f"rank {DIM}," in said  # no layer has more
    assert max(printed_loss(said)[:2]) < 2e-6
    changes = changes_of(model, folder)
    biases = {key: change for key, change in changes.items() if change.ndim == 1}
    told = re.search(r"the change of (\d+) biases \((\S+) % of all\)", said)
    assert bool(told) == bool(biases) == (name == "sd2")
    if told:
        assert int(told[1]) == len(biases)
        assert float(told[2]) == pytest.approx(100 * norm(biases.values()) / norm(changes.values()), rel=1e-2)
    pipeline = add_to_layers(model, biases)
    pipeline.load_lora_weights(tmp_path, weight_name="cat.safetensors")
    use_words(pipeline, tmp_path, WORDS[name])
    expected = prediction(load_as_a_user(model, folder, WORDS[name], "safetensors"), PROMPTS[name])
    base = prediction(use_words(fresh_pipeline(model), tmp_path, WORDS[name]), PROMPTS[name])
    assert (expected - base).abs().max() > 1e-3
    assert (prediction(pipeline, PROMPTS[name]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 6}, {"energy": 0.9}, {}], ids=str)
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_printed_loss_is_the_files(name, options, results, tmp_path):
    """The file is as close as its rank allows, loses what is printed, and diffusers predicts with what it holds."""
    model, folder = results[name]
    file = tmp_path / "cat.safetensors"
    said = export_here(folder, model, file, **options)
    changes = {key: change for key, change in changes_of(model, folder).items() if change.ndim == 2}
    held = products(file, changes)
    lost = {key: norm([changes[key] - held[key]]) for key in changes}
    shares = {key: lost[key] / norm([changes[key]]) for key in changes}
    overall, worst, worst_name = printed_loss(said)
    assert overall == pytest.approx(norm(map(np.array, lost.values())) / norm(changes.values()), rel=6e-3)
    assert worst == pytest.approx(max(shares.values()), rel=6e-3)
    assert shares[worst_name] == pytest.approx(worst, rel=6e-3)
    rank = int(re.search(r"a LoRA of rank (\d+)", said)[1])
    values = {key: np.square(np.linalg.svd(change, compute_uv=False)) for key, change in changes.items()}
    for key in changes:  # the rest of the singular values is the least that a matrix of that rank loses
        assert lost[key] == pytest.approx(values[key][rank:].sum() ** 0.5, rel=1e-3, abs=2e-3 * norm([changes[key]]))
    kept = [[squares[:r].sum() / squares.sum() for squares in values.values()] for r in (rank - 1, rank)]
    if "energy" in options:
        assert min(kept[0]) < options["energy"] <= min(kept[1])
    else:
        assert rank == min(DIM, options.get("rank", 64))
    pipeline = fresh_pipeline(model)
    pipeline.load_lora_weights(tmp_path, weight_name="cat.safetensors")
    expected = prediction(add_to_layers(model, held), "photo of a cat")
    assert (prediction(pipeline, "photo of a cat") - expected).abs().max() < 1e-5


def test_lora_holds_one_rank(results, tmp_path):
    """Keys, shapes and types; alpha equals the rank, and layers of a lower full rank are filled up with zeros."""
    model, folder = results["sd2"]
    file = tmp_path / "cat.safetensors"
    export_here(folder, model, file, rank=5)
    table = load_file(file)
    expected = {}
    for name, change in changes_of(model, folder).items():
        if change.ndim == 2:
            rows, columns = change.shape
            expected |= {f"{kohya(name)}.lora_down.weight": (5, columns), f"{kohya(name)}.lora_up.weight": (rows, 5)}
            expected[f"{kohya(name)}.alpha"] = ()
    assert {key: tuple(value.shape) for key, value in table.items()} == expected
    assert {re.sub(".*attn2_(.*?)[.].*", r"\1", key) for key in table} == {"to_q", "to_k", "to_v", "to_out_0"}
    assert {value.dtype for value in table.values()} == {torch.float16}
    assert {float(value) for key, value in table.items() if key.endswith("alpha")} == {5.0}


def test_layers_of_several_sizes(tmp_path):
    """The largest layer decides how high a rank can be; the rows and columns that a smaller one lacks are zeros."""
    model, result = tmp_path / "model", tmp_path / "result"
    shutil.copytree(EMBEDDED, model)
    base = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    names = [name for name in base if re.search(r"attn2\.to_[kv]\.weight", name)]
    torch.manual_seed(0)
    small, large = names[0], names[-1]
    base[small], base[large] = torch.randn(16, 64), torch.randn(96, 64)
    save_file(base, model / "unet" / "diffusion_pytorch_model.safetensors")
    result.mkdir()
    moved = {name: base[name] + torch.randn(base[name].shape) for name in names}
    ours = {re.sub(r"attn2\.(to_.)", r"attn2.processor.\1_custom_diffusion", name): v for name, v in moved.items()}
    save_file(ours, result / f"{WEIGHTS}.safetensors")
    said = export_here(result, model, tmp_path / "cat.safetensors", rank=1000, dtype="fp32")
    assert "rank 64," in said and max(printed_loss(said)[:2]) < 2e-6
    table = load_file(tmp_path / "cat.safetensors")
    assert {len(value) for key, value in table.items() if key.endswith("lora_down.weight")} == {64}
    assert not table[f"{kohya(small)}.lora_down.weight"][16:].any()
    assert not table[f"{kohya(small)}.lora_up.weight"][:, 16:].any()


METADATA = {
    "sd1": {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "new1",
    },
    "sd2": {
        "ss_base_model_version": "sd_v2_v",
        "ss_v2": "True",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.prediction_type": "v",
        "modelspec.trigger_phrase": "New1, new2",
    },
}


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_metadata(name, results, tmp_path):
    """Names and values as kohya's trainer writes them; A1111 shows a LoRA only with models of its version."""
    model, folder = results[name]
    expected = METADATA[name] | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "cat",
        "modelspec.resolution": "64x64",
        "modelspec.implementation": "diffusers",
        "ss_output_name": "cat",
    }
    own = {
        "lora": {"ss_network_module": "networks.lora", "ss_network_dim": "8", "ss_network_alpha": "8.0"},
        "full": {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "full"}'},
    }
    for kind, more in own.items():
        file = tmp_path / kind / "cat.safetensors"
        export_here(folder, model, file, format=kind, rank=8 if kind == "lora" else None)
        with safe_open(file, "pt") as content:
            found = content.metadata()
        assert (expected | more).items() <= found.items()
        tags = json.loads(found["ss_tag_frequency"])
        assert [sorted(words) for words in tags.values()] == [sorted(word.strip("<>") for word in WORDS[name])]


@pytest.mark.parametrize("size", ["absent", None, [16, 24]])
def test_configuration_without_a_size(size, results, tmp_path):
    """Files of other trainers lack what a picture's size would come from; nothing else needs it."""
    model, folder = results["sd1"]
    other = shutil.copytree(model, tmp_path / "model")
    config = json.loads((other / "unet" / "config.json").read_text()) | {"sample_size": size}
    left_out = ("sample_size", "cross_attention_dim") if size == "absent" else ()
    (other / "unet" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in left_out}))
    export_here(folder, other, tmp_path / "cat.safetensors")
    with safe_open(tmp_path / "cat.safetensors", "pt") as content:
        found = content.metadata()
    assert "modelspec.resolution" not in found and METADATA["sd1"].items() <= found.items()


# Exact differences


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_full_holds_the_exact_differences(name, results, tmp_path):
    model, folder = results[name]
    changes = changes_of(model, folder)
    for dtype, tolerance in (("fp32", 1e-7), ("fp16", 1e-3)):
        file = tmp_path / f"{dtype}.safetensors"
        said = export_here(folder, model, file, format="full", dtype=dtype)
        assert max(printed_loss(said)[:2]) < tolerance and "Lost besides" not in said
        table = load_file(file)
        endings = {"weight": "diff", "bias": "diff_b"}
        assert table.keys() == {f"{kohya(key)}.{endings[key.rpartition('.')[2]]}" for key in changes}
        for key, change in changes.items():
            value = table[f"{kohya(key)}.{endings[key.rpartition('.')[2]]}"].double().numpy()
            assert norm([value - change]) <= tolerance * norm([change])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_lycoris_merges_what_was_trained(kind, results, tmp_path):
    """The package that defines "full" merges either file into the UNet; biases are in "full" alone."""
    lycoris = pytest.importorskip("lycoris.utils")
    model, folder = results["sd2"]
    file = tmp_path / "cat.safetensors"
    export_here(folder, model, file, format=kind, dtype="fp32")
    unet = fresh_pipeline(model).unet
    lycoris.merge((), unet, load_file(file))
    merged = unet.state_dict()
    trained = {layer(key): value for key, value in load_weights(folder).items()}
    base = loaded_pipeline(model).unet.state_dict()
    for key, value in merged.items():
        expected = base[key] if kind == "lora" and key.endswith("bias") else trained.get(key, base[key])
        assert (value - expected).abs().max() < 1e-6, key


# Words


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_words(name, results, tmp_path):
    """Named without < and >, and exactly the trained numbers whatever the LoRA's precision.

    One row under the name emb_params: SD.Next takes a word of one dimension for as many words as it has numbers, and
    ComfyUI, A1111, Forge, InvokeAI and diffusers read this form as well (tried with the loaders of all six).
    """
    model, folder = results[name]
    export_here(folder, model, tmp_path / "loras" / "cat.safetensors", dtype="fp16")
    plain = [word.strip("<>") for word in WORDS[name]]
    assert {file.stem for file in (tmp_path / "loras").glob("*.safetensors")} == {"cat", *plain}
    pipeline = use_words(fresh_pipeline(model), tmp_path / "loras", WORDS[name])
    for word in WORDS[name]:
        table = load_file(tmp_path / "loras" / f"{word.strip('<>')}.safetensors")
        expected = load_file(folder / f"{word}.safetensors")[word]
        assert list(table) == ["emb_params"]
        (value,) = table.values()
        assert value.shape == (1, DIM) and value.dtype == torch.float32 and torch.equal(value[0], expected)
        row = pipeline.tokenizer.convert_tokens_to_ids(word)
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[row], expected)


def test_words_that_a_tool_cannot_type(results, tmp_path):
    """ComfyUI ends an embedding's name at a space (sd1_clip.py), and InvokeAI finds few signs (ti_utils.py)."""
    model, folder = results["sd2"]
    result = rename_words(copy_result(folder, tmp_path / "result"), {"<New1>": "<my cat>", "<new2>": "<кот>"})
    said = export_here(result, model, tmp_path / "cat.safetensors", warnings=True)
    lines = [line for line in said.splitlines() if line.startswith("warning: word")]
    assert [re.findall(r"word (.+?): (\w+) ", line)[0] for line in lines] == [
        ("<my cat>", "ComfyUI"),
        ("<кот>", "InvokeAI"),
    ]
    assert "warning" not in export_here(folder, model, tmp_path / "plain" / "cat.safetensors", warnings=True)


@pytest.mark.parametrize("kind", ["lora", "full", "checkpoint"])
def test_what_a_tool_shows(kind, results, tmp_path):
    """A1111 and Forge read the words and a picture beside a LoRA (ui_extra_networks.py), and so does InvokeAI
    (lora_metadata_extractor.py): its words are what stands between commas under "activation text"."""
    model, folder = results["sd2"]
    result = copy_result(folder, tmp_path / "result")
    shutil.copy(ROOT / "assets" / "instance" / "cat" / "0.png", result / "image_0.png")
    output = tmp_path / "out" / "cat.safetensors"
    said = export_here(result, model, output, format=kind)
    card, picture = output.with_suffix(".json"), output.with_suffix(".png")
    assert card.exists() == picture.exists() == (kind != "checkpoint")
    if kind == "checkpoint":
        return
    assert json.loads(card.read_text())["activation text"] == "New1, new2"
    assert picture.read_bytes() == (result / "image_0.png").read_bytes()
    assert f"Wrote {card}" in said and f"Wrote {picture}" in said
    # Again: what is the same is not mentioned, and what a user has changed is left.
    said = export_here(result, model, output, format=kind)
    assert str(card) not in said and str(picture) not in said
    card.write_text('{"activation text": "New1 cat"}')
    (result / "image_0.png").unlink()
    said = export_here(result, model, output, format=kind)
    assert f"Left {card} as it was" in said and card.read_text() == '{"activation text": "New1 cat"}'
    assert picture.exists()


@pytest.mark.parametrize("word, name", [("<new1>", "new1"), ("[V]", "V"), ("S*", "S"), ("(a){b}", "ab")])
def test_names_of_words(word, name):
    """Neither Windows nor the weights of a prompt's syntax stand in the way of the name."""
    assert script.plain_name(word) == name


def test_export_into_the_results_own_folder(results, tmp_path):
    """Files of an earlier export are no part of the result, and the result's own files stay as they are."""
    model, folder = results["sd1"]
    result = shutil.copytree(folder, tmp_path / "result")
    table = load_file(result / "<new1>.safetensors")
    save_file({"sks": table["<new1>"]}, result / "sks.safetensors")  # a word that is its own file's name
    set_record(result, settings_of(result) | {"modifier_token": "<new1>+sks"})
    before = {file: file.read_bytes() for file in result.glob("*.safetensors")}
    for _ in range(2):
        said = export_here(result, model, result / "cat.safetensors")
        assert f"{result}: <new1>, sks;" in said
    assert {file: file.read_bytes() for file in before} == before
    assert {file.name for file in result.glob("*.safetensors")} - {file.name for file in before} == {
        "cat.safetensors",
        "new1.safetensors",
    }


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_words_of_the_record(kind, results, tmp_path):
    """A word that an earlier run left in the folder is none of the result's; those of the record keep their order."""
    model, folder = results["sd2"]
    result = rename_words(copy_result(folder, tmp_path / "result"), {"<New1>": "zebra1", "<new2>": "apple1"})
    shutil.copy(folder / "<new2>.safetensors", result)
    said = export_here(result, model, tmp_path / "out" / "cat.safetensors", format=kind)
    assert f"{result}: zebra1, apple1;" in said
    names = {file.stem for file in (tmp_path / "out").glob("*.safetensors")}
    assert names == {"cat", "zebra1", "apple1"}


def test_order_of_words_in_a_model(results, tmp_path):
    """That of the record, not of the files: transformers pools an XL's prompt at the word with the largest number."""
    model, folder = results["sd2"]
    result = rename_words(copy_result(folder, tmp_path / "result"), {"<New1>": "zebra1", "<new2>": "apple1"})
    export_here(result, model, tmp_path / "merged", format="model")
    tokenizer = StableDiffusionPipeline.from_pretrained(tmp_path / "merged").tokenizer
    assert tokenizer.convert_tokens_to_ids(["zebra1", "apple1"]) == [49408, 49409]


def test_words_without_a_record(results, tmp_path):
    """Without the settings that the trainer records, every embedding of the folder is a word."""
    model, folder = results["sd2"]
    result = set_record(copy_result(folder, tmp_path / "result"), None)
    row = load_file(folder / "<new2>.safetensors")["<new2>"]
    save_file({"apple1": row}, result / "apple1.safetensors")
    save_file({"conv_in.weight": row}, result / "other.safetensors")
    torch.save({"state": {}}, result / "optimizer.bin")
    torch.save(argparse.Namespace(seed=42), result / "training_args.bin")
    torch.save([row], result / "list.bin")
    (result / "folder.bin").mkdir()
    os.mkfifo(result / "pipe.bin")
    said = export_here(result, model, tmp_path / "cat.safetensors")
    assert f"{result}: <New1>, <new2>, apple1;" in said
    left_out = re.findall("^Leaving out (\\S+),", said, re.MULTILINE)
    assert left_out == ["list.bin", "optimizer.bin", "other.safetensors", "training_args.bin"]


def test_result_in_bin_alone(results, tmp_path):
    """The same file comes of .bin, empty entries and all; where a .safetensors lies beside, it is taken."""
    model, folder = results["sd2"]
    both = copy_result(folder, tmp_path / "both")
    bare = only_bin(copy_result(folder, tmp_path / "bare"))
    assert {} in torch.load(bare / f"{WEIGHTS}.bin").values()
    torch.save({"<new2>": torch.zeros(DIM)}, both / "<new2>.bin")
    for result in (both, bare):
        export_here(result, model, tmp_path / f"of {result.name}" / "cat.safetensors")
    files = sorted((tmp_path / "of both").glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert same_bits(load_file(tmp_path / "of bare" / file.name), load_file(file)), file


def test_words_of_a_checkpoint_in_bin_alone(results, tmp_path):
    """Its record lies beside the weights."""
    model, folder = results["sd1"]
    checkpoint = only_bin(shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4"))
    row = torch.load(checkpoint / "<new1>.bin")["<new1>"]
    torch.save({"<new2>": row}, checkpoint / "<new2>.bin")
    assert f"{checkpoint}: <new1>;" in export_here(checkpoint, model, tmp_path / "cat.safetensors")


BASES = {  # what is added to the model's weights, the type of its files: words of the one line, if there is one
    "the same": (0, torch.float32, None),
    "in fp16": (0, torch.float16, None),
    "another": (1e-3, torch.float32, "another model"),
    "in bf16": (0, torch.bfloat16, "another precision"),
}


@pytest.mark.parametrize("name", BASES)
def test_model_of_the_record(name, results, tmp_path, capfd):
    """Another model of the same shapes is told in one line; the same in half precision is the same."""
    step, dtype, words = BASES[name]
    model, folder = results["sd2"]
    digest = base_digest(model, folder, torch.float16)
    result = copy_result(folder, tmp_path / "result", base_model=None, base_model_fp16=digest)
    other = moved_model(model, tmp_path / "model", dtype, step)
    capfd.readouterr()  # what loading the model for the digest said
    export_here(result, other, tmp_path / "cat.safetensors")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bool(words)
    assert not words or all(text in lines[0] for text in ("warning: ", words, str(result), str(other)))


# The merged model


@pytest.mark.parametrize("name, keep", [("sd1", True), ("sd2", False)])
def test_model_is_the_trained_one(name, keep, results, tmp_path):
    """It loads as any model, predicts as trained, and all that was not trained keeps its bits."""
    model, folder = results[name]
    output = tmp_path / "merged"
    export(folder, model, output, format="model", keep_vocabulary=keep or None)
    assert not list(tmp_path.glob(".*"))
    pipeline, base = StableDiffusionPipeline.from_pretrained(output), loaded_pipeline(model)
    assert (len(pipeline.tokenizer) == 49408) == keep
    own = pipeline.text_encoder.state_dict()
    for key, value in base.text_encoder.state_dict().items():
        assert torch.equal(own[key][: len(value)], value) and (own[key].shape == value.shape or not keep)
    for key, value in base.vae.state_dict().items():
        assert torch.equal(pipeline.vae.state_dict()[key], value)
    trained = {layer(key): value for key, value in load_weights(folder).items()}
    for key, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, trained.get(key, base.unet.state_dict()[key])), key
    if keep:
        use_words(pipeline, output, WORDS[name])
    expected = prediction(load_as_a_user(model, folder, WORDS[name], "safetensors"), PROMPTS[name])
    assert (prediction(pipeline, PROMPTS[name]) - expected).abs().max() < 1e-5
    assert type(pipeline.scheduler) is type(base.scheduler) and pipeline.scheduler.config == base.scheduler.config


# Where a result may lie


def test_result_and_model_from_a_hub(results, tmp_path):
    """Only what is needed is downloaded: no pickle of either, and of the model neither VAE nor text encoder."""
    model, folder = results["sd1"]
    repository = shutil.copytree(
        folder, tmp_path / "upload", ignore=shutil.ignore_patterns("checkpoint-*", "logs", ".*")
    )
    with Hub() as hub:
        bare = only_bin(copy_result(folder, tmp_path / "bare"))
        (bare / "checkpoint-4").mkdir()
        (bare / "checkpoint-4" / "pytorch_model.bin").write_bytes(b"the whole network")
        for name, files in (("tester/my-cat", repository), ("tester/bare", bare), ("tester/sd", model)):
            process = run(HF, "upload", name, files, env=hub.environment(HF_TOKEN=SECRET))
            assert process.returncode == 0, process.stderr
        env = hub.environment(HF_HOME=str(tmp_path / "home"))
        export("tester/my-cat", "tester/sd", tmp_path / "hub.safetensors", env=env)
        files = {file.name for file in (tmp_path / "home").rglob("*") if file.is_symlink()}
        assert f"{WEIGHTS}.safetensors" in files and "diffusion_pytorch_model.safetensors" in files
        assert not any(name.endswith(".bin") for name in files) and "model.safetensors" not in files
        export("tester/bare", "tester/sd", tmp_path / "bare.safetensors", env=env)
        files = {file.name for file in (tmp_path / "home").rglob("*") if file.is_symlink()}
        assert f"{WEIGHTS}.bin" in files and "<new1>.bin" in files and "pytorch_model.bin" not in files
        export("tester/my-cat", "tester/sd", tmp_path / "one" / "hub.safetensors", format="checkpoint", env=env)
        remedy = export("tester/nothing", "tester/sd", tmp_path / "no.safetensors", status=1, env=env)
        assert remedy.startswith("error: tester/nothing: ") and len(remedy.splitlines()) == 1
    export_here(folder, model, tmp_path / "one" / "local.safetensors", format="checkpoint")
    left, right = (load_file(tmp_path / "one" / f"{name}.safetensors") for name in ("hub", "local"))
    assert same_bits(left, right)
    export_here(folder, model, tmp_path / "local.safetensors")
    assert (tmp_path / "hub.safetensors").stat().st_size == (tmp_path / "local.safetensors").stat().st_size
    left, *others = (load_file(tmp_path / f"{name}.safetensors") for name in ("hub", "local", "bare"))
    for right in others:
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_checkpoint(results, tmp_path):
    model, folder = results["sd1"]
    export_here(folder / "checkpoint-4", model, tmp_path / "cat.safetensors", format="full", dtype="fp32")
    table = load_file(tmp_path / "cat.safetensors")
    for key, change in changes_of(model, folder / "checkpoint-4").items():
        assert norm([table[f"{kohya(key)}.diff"].double().numpy() - change]) <= 1e-7 * norm([change])


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("parts", ["one file", "several", "several, older names"])
def test_files_of_the_base_model(variant, parts, results, tmp_path):
    """Weight files in parts, and the variant that is asked for and no other."""
    model, folder = results["sd1"]
    other = shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(other / "unet")
    unet = loaded_pipeline(model).unet
    unet.save_pretrained(other / "unet", variant=variant, max_shard_size="1GB" if parts == "one file" else "50KB")
    for file in (other / "unet").glob("*-of-*") if parts == "several, older names" else ():
        name, part = re.fullmatch(r"(diffusion_pytorch_model).*(-\d+-of-\d+).*", file.name).groups()
        file.rename(file.with_name(f"{name}{part}{'.fp16' if variant else ''}.safetensors"))
    wrong = {key: value + 1 for key, value in unet.state_dict().items()}
    decoy = "diffusion_pytorch_model.safetensors" if variant else "diffusion_pytorch_model.fp16.safetensors"
    save_file(wrong, other / "unet" / decoy)
    assert (len(list((other / "unet").glob("*-of-*"))) > 1) == (parts != "one file")
    export_here(folder, other, tmp_path / "cat.safetensors", format="full", dtype="fp32", variant=variant)
    export_here(folder, model, tmp_path / "same.safetensors", format="full", dtype="fp32")
    left, right = (load_file(tmp_path / f"{name}.safetensors") for name in ("cat", "same"))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# Bad input

CALLS = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
import export
answers = {}
for name, words in json.load(sys.stdin).items():
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            export.main(export.parse_args(words))
        answers[name] = "went on"
    except SystemExit as error:
        answers[name] = error.code if isinstance(error.code, str) else [error.code, said.getvalue()]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def refusals(results, tmp_path_factory):
    """Calls with bad input, all in one process: {name: message, or [status, what it said]}, and the working folder."""
    here = tmp_path_factory.mktemp("bad")
    (model, folder), (other_model, _) = results["sd1"], results["sd2"]
    weights = f"{WEIGHTS}.safetensors"

    def copy(name, *files):
        (here / name).mkdir()
        for file in files:
            shutil.copy(folder / file, here / name)
        return here / name

    torch.save(torch.nn.Linear(2, 2), copy("pickled") / f"{WEIGHTS}.bin")  # opening it could run code
    torch.save([torch.ones(2)], copy("list") / f"{WEIGHTS}.bin")
    torch.save({"state_dict": {"a": torch.ones(2)}}, copy("nested") / f"{WEIGHTS}.bin")
    (copy("pointer") / f"{WEIGHTS}.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    copy("word gone", weights)
    set_record(copy("broken record", weights), "no table")
    (here / "empty").mkdir()
    (copy("truncated", weights) / weights).write_bytes((folder / weights).read_bytes()[:-1000])
    (copy("truncated word", weights) / "<new1>.safetensors").write_bytes(b"\x10")
    shutil.copytree(folder / "checkpoint-4", here / "unfinished" / "checkpoint-4")
    table = load_file(folder / weights)
    save_file({"unet.conv_in.weight": torch.ones(3)}, copy("foreign") / weights)
    save_file({key: value * float("nan") for key, value in table.items()}, copy("not finite") / weights)
    save_file({key: torch.empty(0) for key in table}, copy("hollow") / weights)
    save_file({"<new1>": torch.ones(DIM + 1)}, copy("long word", weights) / "<new1>.safetensors")
    save_file({"<new1>": torch.ones(1, DIM)}, copy("no vector", weights) / "<new1>.safetensors")
    save_file({"<>": torch.ones(DIM)}, copy("nameless word", weights) / "<>.safetensors")
    save_file({"NEW1": torch.ones(DIM)}, copy("alike", weights, "<new1>.safetensors") / "NEW1.safetensors")
    for name in ("nameless word", "alike"):
        set_record(here / name, None)
    index = json.loads((model / "model_index.json").read_text())
    for name, change in (
        ("not XL", {"text_encoder_2": ["transformers", "CLIPTextModel"]}),
        ("no unet files", {}),
    ):
        shutil.copytree(model, here / name)
        (here / name / "model_index.json").write_text(json.dumps(index | change))
    unet = here / "no unet files" / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_suffix(".bin"))
    shutil.copytree(model, here / "broken model")
    (here / "broken model" / "unet" / unet.name).write_bytes(b"\xff" * 100)
    (here / "a file.safetensors").write_bytes(b"")
    (here / "taken").mkdir()
    save_file({"new1": torch.zeros(DIM)}, here / "taken" / "new1.safetensors")
    (here / "a folder.safetensors").mkdir()
    results_of = {name: (here / name, model, "out.safetensors") for name in BAD_RESULTS}
    models_of = {
        "not XL": here / "not XL",
        "no unet files": here / "no unet files",
        "broken model": here / "broken model",
        "no model": here / "empty",
        "no such model": here / "nowhere",
        "other model": other_model,
        "other sizes": EMBEDDED,
    }
    calls = results_of | {name: (folder, path, "out.safetensors") for name, path in models_of.items()}
    outputs = {"own file": folder / "<new1>.safetensors", "word of another": here / "taken" / "cat.safetensors"}
    outputs |= {"word and file": here / "out" / "NEW1.safetensors", "a folder": here / "a folder.safetensors"}
    calls |= {name: (folder, model, path) for name, path in outputs.items()}
    calls = {n: [str(r), *flags(pretrained_model_name_or_path=m, output=here / o)] for n, (r, m, o) in calls.items()}
    good = [str(folder), *flags(pretrained_model_name_or_path=model)]
    calls["existing folder"] = [*good, f"--output={here / 'taken'}", "--format=model"]
    more = {
        "rank 0": ["--rank=0"],
        "energy 2": ["--energy=2"],
        "both": ["--rank=4", "--energy=0.9"],
        "rank of full": ["--format=full", "--rank=4"],
        "keep": ["--keep_vocabulary"],
        "file for a folder": ["--format=model"],
    }
    calls |= {name: [*good, f"--output={here / 'out.safetensors'}", *words] for name, words in more.items()}
    calls["no ending"] = [*good, f"--output={here / 'out'}"]
    process = run(sys.executable, "-c", CALLS, EXPORT.parent, input=json.dumps(calls))
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), here


BAD_RESULTS = {
    "nowhere": ["nowhere: no such folder", "check the name"],
    "a file.safetensors": ["a file; give a folder"],
    "empty": ["no pytorch_custom_diffusion_weights.safetensors", "output_dir"],
    "pickled": [f"{WEIGHTS}.bin", "no tensors", "give a Custom Diffusion result"],
    "list": [f"{WEIGHTS}.bin", "a list"],
    "nested": [f"{WEIGHTS}.bin", "state_dict"],
    "pointer": [f"{WEIGHTS}.bin", "git lfs pull"],
    "word gone": ["<new1>.safetensors", "missing"],
    "broken record": ["record", "corrupt"],
    "no vector": ["<new1>.safetensors", "no embedding"],
    "unfinished": ["give one of the results in it: checkpoint-4"],
    "truncated": ["truncated", WEIGHTS, "corrupt"],
    "truncated word": ["<new1>.safetensors", "corrupt"],
    "foreign": ["unet.conv_in.weight", "give a Custom Diffusion result"],
    "not finite": ["to_k.weight is not finite", "checkpoint"],
    "hollow": ["no trained weights"],
    "long word": ["<new1> has 33 numbers", "takes 32", "model that the result was trained on"],
    "nameless word": ["word <>", "another word"],
    "alike": ["word", "NEW1", "<new1>"],
}
BAD = BAD_RESULTS | {
    "not XL": ["--pretrained_model_name_or_path", "StableDiffusionPipeline", "2.x or XL"],
    "no unet files": ["no diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "--variant"],
    "broken model": ["diffusion_pytorch_model.safetensors", "corrupt"],
    "no model": ["model_index.json", "2.x or XL"],
    "no such model": ["--pretrained_model_name_or_path", "nowhere: no such folder"],
    "other model": ["is missing in the result and (32, 32) in this model", "give the model that the result was"],
    "other sizes": ["in the result and", "give the model that the result was trained on"],
    "own file": ["--output", "choose another name"],
    "word of another": ["new1.safetensors", "is something else", "<new1>"],
    "word and file": ["new1.safetensors", "the output file", "<new1>"],
    "a folder": ["exists"],
    "existing folder": ["--output", "exists"],
}
BAD_ARGUMENTS = {
    "rank 0": ["--rank 0"],
    "energy 2": ["--energy 2.0"],
    "both": ["--rank or --energy"],
    "rank of full": ["--format lora"],
    "keep": ["--keep_vocabulary", "--format model"],
    "file for a folder": ["--output", "folder"],
    "no ending": ["--output", ".safetensors"],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, refusals):
    """One line that names what is wrong and says what to do."""
    message = refusals[0][name]
    assert isinstance(message, str) and message.startswith("error: ") and len(message.splitlines()) == 1, message
    assert all(words in message for words in BAD[name]), message


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name, refusals):
    status, message = refusals[0][name]
    assert status == 2 and len(message.splitlines()) == 1
    assert all(words in message for words in BAD_ARGUMENTS[name]), message


def test_bad_input_writes_nothing(refusals):
    assert [file.name for file in refusals[1].glob("out*")] == []


def refusal(result, model, output, **values):
    """The line with which the script ends."""
    with pytest.raises(SystemExit) as ended:
        export_here(result, model, output, **values)
    assert str(ended.value).startswith("error: ") and len(str(ended.value).splitlines()) == 1
    return str(ended.value)


def test_folder_around_the_one_that_is_meant(results, tmp_path):
    """As in a cache of the hub: the line names the folder inside."""
    model, folder = results["sd1"]
    shutil.copytree(model, tmp_path / "models--me--sd" / "snapshots" / "abc")
    shutil.copytree(folder, tmp_path / "models--me--cat" / "snapshots" / "def")
    line = refusal(folder, tmp_path / "models--me--sd", tmp_path / "cat.safetensors")
    assert "no model_index.json" in line and line.endswith(": snapshots/abc")
    line = refusal(tmp_path / "models--me--cat", model, tmp_path / "cat.safetensors")
    assert f"no {WEIGHTS}" in line and line.endswith(": snapshots/def")


def test_checkpoint_of_diffusers_script(results, tmp_path):
    """It is a checkpoint, but holds the state of a training alone."""
    for name in ("model.safetensors", "random_states_0.pkl"):
        (tmp_path / name).write_bytes(b"")
    assert "the diffusers script" in refusal(tmp_path, results["sd1"][0], tmp_path / "cat.safetensors")


def test_file_that_the_disk_does_not_give(results, tmp_path):
    """It is not the file that is wrong."""
    model, folder = results["sd1"]
    other = shutil.copytree(model, tmp_path / "model")
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.symlink_to("/proc/version")  # can't be mapped into memory, as files on some network disks
    line = refusal(folder, other, tmp_path / "cat.safetensors")
    assert line.startswith(f"error: {file}: ") and "local disk" in line and "corrupt" not in line


def test_error_is_one_line_of_a_process(results, tmp_path):
    said = export(tmp_path, results["sd1"][0], tmp_path / "cat.safetensors", status=1)
    assert said.startswith(f"error: {tmp_path}: ") and len(said.splitlines()) == 1


def test_help_and_wrong_arguments_answer_before_the_slow_imports():
    """With torch out of reach."""
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    code += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    process = run(sys.executable, "-c", code, EXPORT, "--help")
    assert process.returncode == 0 and "--keep_vocabulary" in process.stdout
    process = run(sys.executable, "-c", code, EXPORT, "--format=zip")
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["lora", "checkpoint", "model"])
def test_full_disk(kind, results, tmp_path):
    """One line, the earlier file intact and nothing half-written left."""
    model, folder = results["sd1"]
    output = tmp_path / ("cat" if kind == "model" else "cat.safetensors")
    if kind != "model":
        output.write_bytes(b"earlier")
    words = flags(pretrained_model_name_or_path=model, output=output, format=kind)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # noqa: E731
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    process = run(sys.executable, EXPORT, folder, *words, preexec_fn=limit, env=env)
    assert process.returncode == 1 and len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith(f"error: {tmp_path}") and "disk" in process.stderr
    assert [file.name for file in tmp_path.iterdir()] == ([] if kind == "model" else ["cat.safetensors"])
    assert kind == "model" or output.read_bytes() == b"earlier"
