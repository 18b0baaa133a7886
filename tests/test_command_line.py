"""The command line: help, booleans, and one clear line for whatever is wrong."""

import json
import struct
import sys
import time
import zlib

import pytest
from conftest import SCRIPT, flags, make_picture, refusals_of, run

from train_custom_diffusion import parse_args

HEAVY = ("torch", "diffusers", "transformers", "accelerate")


def imported(stderr):
    """Top-level modules that `python -X importtime` reports."""
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in stderr.splitlines() if "import time" in line}


def test_help_is_quick():
    """Under a second; the best of five, so that a busy machine does not matter."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert run(sys.executable, SCRIPT, "--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 1


@pytest.mark.parametrize("words, status", [(["--help"], 0), (["--resolution=zero"], 2)])
def test_answers_before_heavy_imports(words, status):
    process = run(sys.executable, "-X", "importtime", SCRIPT, *words)
    assert process.returncode == status
    modules = imported(process.stderr)
    assert "argparse" in modules and not modules & set(HEAVY)


def test_data_errors_come_before_heavy_imports(tmp_path):
    words = flags(pretrained_model_name_or_path="m", instance_data_dir=tmp_path / "no", instance_prompt="a cat")
    process = run(sys.executable, "-X", "importtime", SCRIPT, *words)
    assert process.returncode == 1 and "error: instance_data_dir" in process.stderr
    assert not imported(process.stderr) & set(HEAVY)


def test_help_names_every_flag():
    """Every flag of the contract."""
    names = """pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir instance_prompt
        class_data_dir class_prompt concepts_list modifier_token initializer_token freeze_model
        with_prior_preservation prior_loss_weight num_class_images real_prior prior_generation_precision
        sample_batch_size resolution center_crop hflip noaug train_batch_size gradient_accumulation_steps
        num_train_epochs max_train_steps learning_rate scale_lr lr_scheduler lr_warmup_steps adam_beta1 adam_beta2
        adam_weight_decay adam_epsilon use_8bit_adam max_grad_norm mixed_precision allow_tf32 gradient_checkpointing
        enable_xformers_memory_efficient_attention set_grads_to_none
        dataloader_num_workers local_rank seed output_dir logging_dir report_to validation_prompt num_validation_images
        validation_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint push_to_hub hub_token
        hub_model_id no_safe_serialization"""
    text = run(sys.executable, SCRIPT, "--help").stdout
    assert [name for name in names.split() if f"--{name}" not in text] == []


NEEDED = ["--pretrained_model_name_or_path=m", "--instance_data_dir=cat", "--instance_prompt=a <new1> cat"]


def test_defaults():
    args = parse_args(NEEDED)
    expected = {
        "initializer_token": "ktn+pll+ucd", "freeze_model": "crossattn_kv", "prior_loss_weight": 1.0,
        "num_class_images": 200, "sample_batch_size": 4, "resolution": 512, "train_batch_size": 4,
        "gradient_accumulation_steps": 1, "num_train_epochs": 1, "max_train_steps": None, "learning_rate": 1e-5,
        "lr_scheduler": "constant", "lr_warmup_steps": 500, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "dataloader_num_workers": 2,
        "local_rank": -1, "seed": 42, "output_dir": "custom-diffusion-model", "logging_dir": "logs",
        "report_to": "tensorboard", "num_validation_images": 2, "validation_steps": 50, "checkpointing_steps": 250,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    optional = ("revision", "variant", "mixed_precision", "validation_prompt", "hub_token", "hub_model_id")
    assert all(getattr(args, name) is None for name in optional)


BOOLEANS = """with_prior_preservation real_prior center_crop hflip noaug scale_lr use_8bit_adam allow_tf32
    gradient_checkpointing enable_xformers_memory_efficient_attention set_grads_to_none push_to_hub
    no_safe_serialization"""


@pytest.mark.parametrize("name", BOOLEANS.split())
def test_booleans(name):
    """Off by default, bare, =True and =False."""
    around = [*NEEDED, "--class_data_dir=c", "--class_prompt=cat"]
    around += ["--with_prior_preservation"] if name == "real_prior" else []
    assert getattr(parse_args(around), name) is False
    for words, value in ((f"--{name}", True), (f"--{name}=True", True), (f"--{name}=False", False)):
        assert getattr(parse_args([*around, words]), name) is value
    assert getattr(parse_args([*around, f"--{name}", "--seed=3"]), name) is True


# Arguments that are wrong by themselves: exit status 2


ARGUMENTS = {
    "no model": ({"pretrained_model_name_or_path": None}, ["--pretrained_model_name_or_path"]),
    "no pictures": ({"instance_data_dir": None}, ["--instance_data_dir", "--concepts_list"]),
    "no prompt": ({"instance_prompt": None}, ["--instance_prompt"]),
    "no class pictures": ({"with_prior_preservation": True, "class_prompt": "cat"}, ["--class_data_dir"]),
    "no class": ({"with_prior_preservation": True, "class_data_dir": "c"}, ["--class_prompt"]),
    "unknown flag": ({"resolutoin": 512}, ["--resolutoin"]),
    "shortened flag": ({"resol": 512}, ["--resol"]),
    "no number": ({"train_batch_size": "four"}, ["--train_batch_size", "four"]),
    "no boolean": ({"hflip": "maybe"}, ["--hflip", "maybe"]),
    "no choice": ({"freeze_model": "all"}, ["--freeze_model", "crossattn_kv"]),
    "no schedule": ({"lr_scheduler": "up"}, ["--lr_scheduler", "cosine"]),
    "batch": ({"train_batch_size": 0}, ["--train_batch_size", "0"]),
    "accumulation": ({"gradient_accumulation_steps": 0}, ["--gradient_accumulation_steps"]),
    "steps": ({"max_train_steps": 0}, ["--max_train_steps"]),
    "negative steps": ({"max_train_steps": -3}, ["--max_train_steps", "-3"]),
    "epochs": ({"num_train_epochs": 0}, ["--num_train_epochs"]),
    "resolution": ({"resolution": 0}, ["--resolution"]),
    "class images": ({"num_class_images": 0}, ["--num_class_images"]),
    "sample batch": ({"sample_batch_size": 0}, ["--sample_batch_size"]),
    "checkpoints": ({"checkpointing_steps": 0}, ["--checkpointing_steps"]),
    "limit": ({"checkpoints_total_limit": 0}, ["--checkpoints_total_limit"]),
    "validation": ({"validation_steps": 0}, ["--validation_steps"]),
    "workers": ({"dataloader_num_workers": -1}, ["--dataloader_num_workers"]),
    "learning rate": ({"learning_rate": -1e-5}, ["--learning_rate", "-1e-05"]),
    "learning rate nan": ({"learning_rate": "nan"}, ["--learning_rate", "nan"]),
    "beta": ({"adam_beta1": 1}, ["--adam_beta1"]),
    "real_prior alone": ({"real_prior": True}, ["--real_prior", "--with_prior_preservation"]),
    "token twice": ({"modifier_token": "<new1>+<new1>"}, ["--modifier_token", "<new1>", "twice"]),
    "empty token": ({"modifier_token": "<new1>+"}, ["--modifier_token"]),
    "initializers": ({"modifier_token": "<new1>+<b>", "initializer_token": "cat"}, ["--initializer_token", "1", "2"]),
    "token of the hub": ({"hub_token": "hf_x", "report_to": "wandb"}, ["--hub_token", "wandb"]),
}


def check_one_line(process, status, words, output_dir):
    """One line on stderr that has these words, this exit status, and nothing was made."""
    assert process.returncode == status, process.stderr
    (line,) = process.stderr.splitlines()
    assert "error: " in line and all(word in line for word in words), line
    assert not output_dir.exists()


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments(case, tmp_path):
    values, words = ARGUMENTS[case]
    output_dir = tmp_path / "run"
    values = {
        "pretrained_model_name_or_path": "model",
        "instance_data_dir": "cat",
        "instance_prompt": "a <new1> cat",
        "modifier_token": "<new1>",
        "output_dir": output_dir,
    } | values
    check_one_line(run(sys.executable, SCRIPT, *flags(**values)), 2, words, output_dir)


# Data that is wrong: exit status 1. Each makes its files in a folder and returns flags.


def truncated(folder):
    file = folder / "cat" / "half.png"
    make_picture(0).save(file)
    file.write_bytes(file.read_bytes()[:300])
    return {}


def bomb(folder):
    """A PNG of a few bytes that says it is 60,000 pixels wide and high."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    (folder / "cat" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return {}


def concepts(text):
    def make(folder):
        (folder / "concepts.json").write_text(text)
        return {"concepts_list": folder / "concepts.json"}

    return make


def no_pictures(folder):
    (folder / "texts").mkdir()
    (folder / "texts" / "notes.txt").write_text("not a picture")
    return {"instance_data_dir": folder / "texts"}


def retrieved(images, captions):
    def make(folder):
        real = folder / "real"
        (real / "images").mkdir(parents=True)
        make_picture(1).save(real / "images" / "0.png")
        (real / "images.txt").write_text(images)
        (real / "caption.txt").write_text(captions)
        return {"class_data_dir": real, "class_prompt": "cat", "with_prior_preservation": True, "real_prior": True}

    return make


def output_is_a_file(folder):
    (folder / "file").write_text("mine")
    return {"output_dir": folder / "file" / "run"}


CONCEPT = {"instance_prompt": "a <new1> cat", "instance_data_dir": "cat"}
DATA = {
    "no such folder": (lambda f: {"instance_data_dir": f / "dog"}, ["instance_data_dir", "dog"]),
    "not a folder": (lambda f: {"instance_data_dir": f / "cat" / "0.png"}, ["instance_data_dir", "0.png"]),
    "no pictures": (no_pictures, ["instance_data_dir", "texts", "no pictures"]),
    "truncated picture": (truncated, ["half.png"]),
    "no picture at all": (lambda f: (f / "cat" / "fake.jpg").write_text("hello") and {}, ["fake.jpg"]),
    "decompression bomb": (bomb, ["bomb.png"]),
    "no JSON": (concepts('[\n{"instance_prompt": }]'), ["--concepts_list", "line 2", "column 21"]),
    "no list": (concepts('{"a": 1}'), ["--concepts_list", "not a list"]),
    "empty list": (concepts("[]"), ["--concepts_list"]),
    "no object": (concepts("[3]"), ["--concepts_list", "concept 1"]),
    "key missing": (concepts(json.dumps([CONCEPT, {"instance_prompt": "b"}])), ["concept 2", "instance_data_dir"]),
    "no JSON file": (lambda f: {"concepts_list": f / "none.json"}, ["--concepts_list", "none.json"]),
    "token in no prompt": (lambda f: {"instance_prompt": "a cat"}, ["instance_prompt", "<new1>"]),
    "second token in no prompt": (lambda f: {"modifier_token": "<new1>+<b>"}, ["--modifier_token", "<b>"]),
    "more images than captions": (
        retrieved("images/0.png\nimages/0.png\n", "a\n"),
        ["real", "images.txt", "caption.txt"],
    ),
    "more captions than images": (retrieved("images/0.png\n", "a\nb\n"), ["real", "images.txt", "caption.txt"]),
    "retrieved picture gone": (retrieved("images/1.png\n", "a\n"), ["real", "images/1.png"]),
    "xformers": (lambda f: {"enable_xformers_memory_efficient_attention": True}, ["--enable_xformers", "xformers"]),
    "8-bit Adam": (lambda f: {"use_8bit_adam": True}, ["--use_8bit_adam", "bitsandbytes"]),
    "comet_ml": (lambda f: {"report_to": "comet_ml"}, ["--report_to", "comet_ml"]),
    "output below a file": (output_is_a_file, ["--output_dir", "file"]),
}


@pytest.fixture
def folder(tmp_path):
    """A folder `cat` with one good picture."""
    (tmp_path / "cat").mkdir()
    make_picture(0).save(tmp_path / "cat" / "0.png")
    return tmp_path


def good_flags(folder, model):
    return {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": folder / "cat",
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
        "resolution": 64,
        "output_dir": folder / "run",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "max_train_steps": 1,
    }


@pytest.mark.parametrize("case", DATA)
def test_wrong_data(case, folder):
    make, words = DATA[case]
    values = good_flags(folder, "model") | make(folder)
    check_one_line(run(sys.executable, SCRIPT, *flags(**values), cwd=folder), 1, words, folder / "run")


def test_output_dir_is_a_file(folder):
    (folder / "run").write_text("mine")
    process = run(sys.executable, SCRIPT, *flags(**good_flags(folder, "model")))
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "--output_dir" in line and (folder / "run").read_text() == "mine"


# What only the tokenizer or the model folder can tell. One notebook asks for all of it.


def other_pipeline(folder):
    (folder / "other").mkdir()
    (folder / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return {"pretrained_model_name_or_path": folder / "other"}


def no_model(folder):
    (folder / "papers").mkdir()
    (folder / "papers" / "thesis.txt").write_text("")
    return {"pretrained_model_name_or_path": folder / "papers"}


MODEL = {
    "unknown initializer": (
        lambda f: {"initializer_token": "wolpertinger"},
        ["--initializer_token", "wolpertinger", "wol"],
    ),
    "token is a word": (
        lambda f: {"modifier_token": "cat", "instance_prompt": "a cat"},
        ["--modifier_token", "'cat'", "vocabulary"],
    ),
    "prompt too long": (lambda f: {"instance_prompt": "<new1> cat" + " and a dog" * 40}, ["instance_prompt", "77"]),
    "resolution": (lambda f: {"resolution": 100}, ["--resolution", "100", "8"]),
    "another pipeline": (other_pipeline, ["--pretrained_model_name_or_path", "FluxPipeline"]),
    "no model": (no_model, ["--pretrained_model_name_or_path", "papers", "thesis.txt"]),
    "nowhere": (lambda f: {"pretrained_model_name_or_path": f / "gone"}, ["--pretrained_model_name_or_path", "gone"]),
}


@pytest.fixture(scope="module")
def answers(sd1, tmp_path_factory):
    """What the notebook answered to each case of MODEL."""
    calls, folders = {}, {}
    for name, (make, _) in MODEL.items():
        folder = folders[name] = tmp_path_factory.mktemp("case")
        (folder / "cat").mkdir()
        make_picture(0).save(folder / "cat" / "0.png")
        calls[name] = flags(**good_flags(folder, sd1) | make(folder))
    found = refusals_of(calls)
    assert not any((folder / "run").exists() for folder in folders.values())
    return found


@pytest.mark.parametrize("case", MODEL)
def test_wrong_for_the_model(case, answers):
    answer = answers[case]
    assert answer.startswith("error: ") and "\n" not in answer
    assert all(word in answer for word in MODEL[case][1]), answer


def test_tokenizer_errors_come_before_the_networks(folder, sd1):
    """A model folder without any weights: the initializer is still what is complained about."""
    import shutil

    shutil.copytree(sd1, folder / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    values = good_flags(folder, folder / "light") | {"initializer_token": "wolpertinger"}
    check_one_line(run(sys.executable, SCRIPT, *flags(**values)), 1, ["--initializer_token"], folder / "run")
