"""What a user gives the trainer: the command line, data, models and packages.

Whatever is wrong with these is answered with one line that names it, with exit status 2 (arguments) or 1 (the rest),
and leaves every file as it was. Each case makes its files in a folder of its own and returns the flags that it changes.
"""

import json
import os
import re
import shutil
import struct
import sys
import time
import zlib
from pathlib import Path

import packaging
import pytest
from launching import ROOT, SCRIPT, SECRET, UNPRIVILEGED, flags, in_one_process, python, run
from packaging.requirements import Requirement
from pictures import make_picture
from transformers import CLIPTokenizer

from train_custom_diffusion import parse_args

HEAVY = ("torch", "diffusers", "transformers", "accelerate")


@pytest.fixture
def folder(tmp_path):
    """A folder `cat` with one good picture."""
    return with_cat(tmp_path)


def with_cat(folder):
    (folder / "cat").mkdir()
    make_picture(0).save(folder / "cat" / "0.png")
    return folder


def good_flags(folder, model="model"):
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


def listing(folder):
    """All that lies in a folder: path, time of change and size, without following links."""
    return {
        (path, path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*") if not path.is_dir()
    } | {path for path in folder.rglob("*") if path.is_dir()}


def refuse(folder, values, status, words, **options):
    """Launches the script with these flags changed; checks its one line, its exit status, and that no file changed."""
    before = listing(folder)
    process = run(sys.executable, SCRIPT, *flags(**good_flags(folder) | values), cwd=folder, **options)
    assert process.returncode == status, process.stdout + process.stderr
    (line,) = process.stderr.splitlines()
    assert "error: " in line and [word for word in words if str(word) not in line] == [], line
    assert process.stdout == "" and listing(folder) == before


# Help and defaults


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
    lines = [line for line in process.stderr.splitlines() if "import time" in line]
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "argparse" in modules and not modules & set(HEAVY)


def test_help_names_every_flag():
    """Every flag of the contract."""
    names = """pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir instance_prompt
        class_data_dir class_prompt concepts_list modifier_token initializer_token freeze_model
        with_prior_preservation prior_loss_weight num_class_images real_prior prior_generation_precision
        sample_batch_size resolution center_crop hflip noaug cache_latents train_batch_size
        gradient_accumulation_steps num_train_epochs max_train_steps learning_rate scale_lr lr_scheduler
        lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_8bit_adam max_grad_norm
        mixed_precision allow_tf32 gradient_checkpointing enable_xformers_memory_efficient_attention
        set_grads_to_none dataloader_num_workers local_rank seed output_dir logging_dir report_to validation_prompt
        num_validation_images validation_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
        push_to_hub hub_token hub_model_id no_safe_serialization"""
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
        "cache_latents": 0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    optional = ("revision", "variant", "mixed_precision", "validation_prompt", "hub_token", "hub_model_id")
    assert all(getattr(args, name) is None for name in optional)


BOOLEANS = """with_prior_preservation real_prior center_crop hflip noaug scale_lr use_8bit_adam allow_tf32
    gradient_checkpointing channels_last enable_xformers_memory_efficient_attention set_grads_to_none push_to_hub
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


def test_validation_prompts(tmp_path, monkeypatch):
    """Several, also from files as other systems and editors write them; each once, with single spaces."""
    monkeypatch.chdir(tmp_path)
    Path("p.TXT").write_bytes("\ufeffa <new1> cat\r\n\r\n# a dog\r\n  a pot, a cafe\u0301\t\r\n".encode())
    Path("utf16.txt").write_bytes("a dog\r\n".encode("utf-16"))
    given = ["--validation_prompt=a  zebra", "--validation_prompt", "p.TXT", "--validation_prompt=utf16.txt"]
    args = parse_args([*NEEDED, *given, "--validation_prompt=a pot, a caf\u00e9"])
    assert args.validation_prompt == ["a zebra", "a <new1> cat", "a pot, a caf\u00e9", "a dog"]
    assert parse_args([*NEEDED, given[0]]).validation_prompt == ["a zebra"]


def test_prompts_with_options(tmp_path, monkeypatch, capsys):
    """kohya's trainer reads its prompts so: what it would take for options would be drawn here."""
    (tmp_path / "p.txt").write_text("# two\na <new1> cat\na pot --n blurred --w 512 --d 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        parse_args([*NEEDED, "--validation_prompt=p.txt"])
    assert end.value.code == 2 and "--validation_prompt: p.txt: --n means nothing" in capsys.readouterr().err


# Flags in a file

LINES = """\ufeff# a comment
--pretrained_model_name_or_path=~/m
--instance_data_dir "my cat" \\

  --instance_prompt = a <new1> cat: "naïve", --, #1\t
--class_prompt='a "cat"'
--validation_prompt=@me = <new1>
--validation_prompt a pot
--hflip
--noaug False
--learning_rate 1e-3   \\
--seed=1
"""


def test_flags_in_a_file(tmp_path, monkeypatch):
    """As people edit them, with the ends of lines of any system; what comes later in the command line wins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["--pretrained_model_name_or_path=~/m", "--instance_data_dir=my cat", "--hflip", "--noaug=False"]
    given += ['--instance_prompt=a <new1> cat: "naïve", --, #1', '--class_prompt=a "cat"', "--learning_rate=1e-3"]
    given += ["--validation_prompt=@me = <new1>", "--validation_prompt=a pot"]
    for name, content in {
        "flags.txt": LINES.encode(),
        "my flags": LINES.replace("\n", "\r\n").encode(),
        "utf16.txt": LINES[1:].encode("utf-16"),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert parse_args([f"@{name}"]) == parse_args([*given, "--seed=1"]), name
        assert parse_args([f"@~/{name}", "--seed=2"]) == parse_args([*given, "--seed=2"])
        assert parse_args(["--seed=2", f"@{tmp_path / name}"]) == parse_args([*given, "--seed=1"])


def test_values_that_begin_with_an_at_sign():
    args = parse_args([*NEEDED, "--validation_prompt", "@me", "--class_prompt=@you"])
    assert args.validation_prompt == ["@me"] and args.class_prompt == "@you"


REFUSED_LINES = {  # content of a file: words of the error
    "--seed=1\n--resolution=64 --hflip": ["line 2: several flags; write --flag=value"],
    '--instance_prompt="a cat" --modifier_token="<new1>"': ["line 1: several flags"],
    "\n# no\naccelerate launch train_custom_diffusion.py \\\n": ["line 3: no flag; write --flag=value"],
    "--seed\n1": ["line 2: no flag"],
    b"--output_dir=caf\xe9": ["UTF-8"],
    None: ["No such file"],
}


@pytest.mark.parametrize("content", REFUSED_LINES)
def test_lines_that_are_no_flags(content, tmp_path):
    """One line, and no part of the file in it, which may be a secret."""
    file = tmp_path / "flags.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as end:
        parse_args([*NEEDED, f"@{file}"])
    assert str(end.value).startswith(f"error: @{file}") and "\n" not in str(end.value)
    assert [words for words in REFUSED_LINES[content] if words not in str(end.value)] == []
    assert "<new1>" not in str(end.value)


ODD_VALUES = [" a  ", '"a"', "'", "''", "a \\", "= a", "-1", "@me", "a\u00a0", '"a\' "', "#1", "\\", '"a" \\']


@pytest.mark.parametrize("value", ODD_VALUES)
def test_values_survive_a_file(value, tmp_path):
    """What a run writes to flags.txt is read as it was."""
    from train_custom_diffusion import write_flag

    file = tmp_path / "flags.txt"
    file.write_text(f"{write_flag('--class_prompt', value)}\n{write_flag('--seed', 0)}\n", "utf-8")
    args = parse_args([*NEEDED, f"@{file}"])
    assert (args.class_prompt, args.seed) == (value, 0)


def test_text_in_several_lines():
    """As quotes in a shell or in Python make it: a line of a file, or a path, can't hold it."""
    args = parse_args([*NEEDED, "--class_prompt=a\ncat\n", "--validation_prompt=a\r\n  pot"])
    assert args.class_prompt == "a cat" and args.validation_prompt == ["a pot"]


# Arguments that are wrong by themselves: exit status 2

NAME = "--pretrained_model_name_or_path"

ARGUMENTS = {
    "no model": ({"pretrained_model_name_or_path": None}, ["--pretrained_model_name_or_path"]),
    "no pictures": ({"instance_data_dir": None}, ["--instance_data_dir", "--concepts_list"]),
    "no prompt": ({"instance_prompt": None}, ["--instance_prompt"]),
    "no class pictures": ({"with_prior_preservation": True, "class_prompt": "cat"}, ["--class_data_dir"]),
    "no class": ({"with_prior_preservation": True, "class_data_dir": "c"}, ["--class_prompt"]),
    "unknown flag": ({"resolutoin": 512}, ["--resolutoin"]),
    "shortened flag": ({"resol": 512}, ["--resol"]),
    "no number": ({"train_batch_size": "four"}, ["--train_batch_size", "four"]),
    "half a picture": ({"train_batch_size": 1.5}, ["--train_batch_size", "1.5"]),
    "no boolean": ({"hflip": "maybe"}, ["--hflip", "maybe"]),
    "no choice": ({"freeze_model": "all"}, ["--freeze_model", "crossattn_kv"]),
    "no schedule": ({"lr_scheduler": "up"}, ["--lr_scheduler", "cosine"]),
    "no tracker": ({"report_to": "paper"}, ["--report_to", "tensorboard"]),
    "no precision": ({"mixed_precision": "fp8"}, ["--mixed_precision", "bf16"]),
    "negative steps": ({"max_train_steps": -3}, ["--max_train_steps", "-3"]),
    "negative seed": ({"seed": -1}, ["--seed", "-1"]),
    "workers": ({"dataloader_num_workers": -1}, ["--dataloader_num_workers"]),
    "warm-up": ({"lr_warmup_steps": -1}, ["--lr_warmup_steps"]),
    "learning rate": ({"learning_rate": -1e-5}, ["--learning_rate", "-1e-05"]),
    "learning rate nan": ({"learning_rate": "nan"}, ["--learning_rate", "nan"]),
    "weight decay": ({"adam_weight_decay": -1}, ["--adam_weight_decay"]),
    "epsilon": ({"adam_epsilon": -1}, ["--adam_epsilon"]),
    "clipping": ({"max_grad_norm": -1}, ["--max_grad_norm"]),
    "prior loss": ({"prior_loss_weight": -1}, ["--prior_loss_weight"]),
    "cached latents": ({"cache_latents": -1}, ["--cache_latents"]),
    "beta": ({"adam_beta1": 1}, ["--adam_beta1"]),
    "real_prior alone": ({"real_prior": True}, ["--real_prior", "--with_prior_preservation"]),
    "token twice": ({"modifier_token": "<new1>+<new1>"}, ["--modifier_token", "<new1>", "different words"]),
    "empty token": ({"modifier_token": "<new1>+"}, ["--modifier_token"]),
    "token with a space": ({"modifier_token": "my cat"}, ["--modifier_token", "'my cat'", "'my_cat'"]),
    "token with a space, among others": ({"modifier_token": "<new1>+my\tcat"}, ["--modifier_token", "'my_cat'"]),
    "no initializer": ({"initializer_token": ""}, ["--initializer_token", "is empty"]),
    "output folder of an unset variable": ({"output_dir": ""}, ["--output_dir", "is empty"]),
    "model of an unset variable": ({"pretrained_model_name_or_path": ""}, [NAME, "is empty"]),
    "output folder of several lines": ({"output_dir": "a\nb"}, ["--output_dir", "line break"]),
    "variant of an unset variable": ({"variant": ""}, ["--variant", "is empty"]),
    "prompt that is no UTF-8": ({"instance_prompt": "a <new1> caf\udce9"}, ["--instance_prompt"]),
    "seed": ({"seed": 2**64}, ["--seed", "18446744073709551616"]),
    "token with a slash": ({"modifier_token": "a/b"}, ["--modifier_token", "a/b"]),
    "initializers": (
        {"modifier_token": "<new1>+<b>", "initializer_token": "cat"},
        ["--initializer_token", "cat", "<new1>+<b>"],
    ),
    **{
        f"{name} 0": ({name: 0}, [f"--{name}"])
        for name in (
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_steps",
            "resolution",
            "num_class_images",
            "sample_batch_size",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "validation_steps",
            "num_validation_images",
        )
    },
    **{
        f"token of the hub with {tracker}": ({"hub_token": SECRET, "report_to": tracker}, ["--hub_token", tracker])
        for tracker in ("wandb", "comet_ml", "all")
    },
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, tmp_path, capsys):
    """Exit status 2, and one line on stderr; the pictures are not even looked for."""
    values, words = ARGUMENTS[case]
    with pytest.raises(SystemExit) as end:
        parse_args(flags(**good_flags(tmp_path) | values))
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert end.value.code == 2 and printed.out == ""
    assert "error: " in line and [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("case", ["unknown flag", "negative steps", "real_prior alone"])
def test_arguments_of_a_process(case, folder):
    values, words = ARGUMENTS[case]
    refuse(folder, values, 2, words)


# Data, models and packages: exit status 1. One process calls main for all cases.


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3438167534\n"


def given(**values):
    """A case that changes flags alone."""
    return lambda folder, model: values


def picture(name, content):
    """A case with one more instance picture."""

    def make(folder, model):
        (folder / "cat" / name).write_bytes(content(folder) if callable(content) else content)
        return {}

    return make


def beside(files):
    """A case with these texts beside the instance pictures; None stands for one more picture."""

    def make(folder, model):
        for name, text in files.items():
            if text is None:
                make_picture(len(name)).save(folder / "cat" / name)
            else:
                (folder / "cat" / name).write_text(text)
        return {}

    return make


def truncated(folder):
    return (folder / "cat" / "0.png").read_bytes()[:300]


def bomb(folder):
    """A PNG of a few bytes that says it is 60,000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(data)


def link(target):
    """A case with a picture that is a link."""

    def make(folder, model):
        (folder / "cat" / "link.jpg").symlink_to(target)
        return {}

    return make


def concepts(content):
    """A case with this concepts list: text, bytes, or what JSON can hold."""

    def make(folder, model):
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (folder / "list.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return {"concepts_list": "list.json", "instance_prompt": None, "instance_data_dir": None}

    return make


CONCEPT = {"instance_prompt": "a <new1> cat", "instance_data_dir": "cat"}
ELSEWHERE = CONCEPT | {"instance_data_dir": "dog"}
PRIOR = {"with_prior_preservation": True, "class_prompt": "cat"}


def with_class(make, **values):
    """A case with prior preservation."""
    return lambda folder, model: make(folder, model) | PRIOR | values


def retrieved(images, captions):
    """A case with class pictures as retrieve.py leaves them."""

    def make(folder, model):
        real = folder / "real"
        (real / "images").mkdir(parents=True)
        make_picture(1).save(real / "images" / "0.png")
        for name, content in (("images.txt", images), ("caption.txt", captions)):
            (real / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"class_data_dir": "real", "real_prior": True} | PRIOR

    return make


def made(*names, **values):
    """A case with more folders (ending in a slash) and files."""

    def make(folder, model):
        for name in names:
            if name.endswith("/"):
                (folder / name).mkdir()
            else:
                (folder / name).write_text("mine")
        return values

    return make


def forbidden(name, mode, make=None, **values):
    """A case in which something may not be read or written."""

    def change(folder, model):
        changed = make(folder, model) if make else {}
        (folder / name).chmod(mode)
        return changed | values

    return change


def shared(*classes, folders=("class", "class")):
    """Concepts whose folders of generated class pictures have these names."""
    both = zip(classes, folders, strict=True)
    return with_class(concepts([CONCEPT | {"class_prompt": name, "class_data_dir": path} for name, path in both]))


def prompt_file(content):
    """A case with a file of validation prompts."""

    def make(folder, model):
        (folder / "p.txt").write_bytes(content)
        return {"validation_prompt": "p.txt"}

    return make


def class_among_pictures(folder, model):
    """A case in which a concept's class pictures are another one's instance pictures."""
    shutil.copytree(folder / "cat", folder / "dog")
    first = CONCEPT | {"class_prompt": "cat", "class_data_dir": "class"}
    second = ELSEWHERE | {"class_prompt": "dog", "class_data_dir": str(folder / "cat")}
    return with_class(concepts([first, second]))(folder, model)


DATA = {
    # folders and pictures
    "no such folder": (given(instance_data_dir="dog"), ["instance_data_dir", "dog"]),
    "not a folder": (given(instance_data_dir="cat/0.png"), ["instance_data_dir", "0.png"]),
    "empty folder": (made("dog/", instance_data_dir="dog"), ["instance_data_dir", "dog", "no pictures"]),
    "no pictures": (made("dog/", "dog/a.txt", instance_data_dir="dog"), ["instance_data_dir", "dog", "no pictures"]),
    "only folders": (made("dog/", "dog/a.jpg/", instance_data_dir="dog"), ["instance_data_dir", "dog", "no pictures"]),
    "truncated picture": (picture("half.png", truncated), ["cat/half.png"]),
    "no bytes": (picture("empty.jpg", b""), ["cat/empty.jpg"]),
    "text": (picture("fake.jpg", b"hello"), ["cat/fake.jpg"]),
    "decompression bomb": (picture("bomb.png", bomb), ["cat/bomb.png", "3600000000 pixels"]),
    "picture not fetched": (picture("0.png", POINTER.encode()), ["cat/0.png", "git lfs pull"]),
    "dangling link": (link("nowhere.jpg"), ["cat/link.jpg"]),
    "caption not UTF-8": (picture("0.txt", b"caf\xe9"), ["cat/0.txt", "utf-8"]),
    # files of validation prompts
    "no file of prompts": (given(validation_prompt="none.txt"), ["none.txt", "No such file", "one prompt a line"]),
    "no prompt in the file": (prompt_file(b" \r\n\n# cats\n"), ["p.txt: no prompt in it", "one prompt a line"]),
    "prompts that are no text": (prompt_file(b"caf\xe9"), ["p.txt: 'utf-8'"]),
    # lists of concepts
    "no list file": (given(concepts_list="none.json"), ["--concepts_list", "none.json", "No such file"]),
    "folder as a list": (made("list.json/", concepts_list="list.json"), ["--concepts_list", "list.json"]),
    "no JSON": (concepts('[\n{"instance_prompt": }]'), ["--concepts_list", "list.json", "line 2", "column 21"]),
    "empty file": (concepts(""), ["--concepts_list", "list.json"]),
    "UTF-16": (concepts(json.dumps([CONCEPT]).encode("utf-16")), ["--concepts_list", "UTF-8"]),
    "no list": (concepts({"a": 1}), ["--concepts_list", "list"]),
    "empty list": (concepts([]), ["--concepts_list", "list"]),
    "no object": (concepts([CONCEPT, [CONCEPT]]), ["--concepts_list", "concept 2"]),
    "key missing": (concepts([CONCEPT, {"instance_prompt": "b"}]), ["concept 2", "'instance_data_dir'"]),
    "key of another kind": (concepts([CONCEPT | {"instance_prompt": ["a"]}]), ["concept 1", "'instance_prompt'"]),
    "key empty": (concepts([CONCEPT | {"instance_data_dir": ""}]), ["concept 1", "'instance_data_dir'"]),
    "class key missing": (with_class(concepts([CONCEPT])), ["concept 1", "'class_prompt'"]),
    "second folder missing": (concepts([CONCEPT, ELSEWHERE]), ["instance_data_dir", "dog"]),
    "one folder for two classes": (shared("cat", "dog"), ["class_data_dir", "'cat'", "'dog'"]),
    "one folder, written in two ways": (
        shared("cat", "dog", folders=("class", "./cat/../class")),
        ["class_data_dir", "'cat'", "'dog'"],
    ),
    "one folder, by a link": (
        lambda folder, model: (
            (folder / "class").mkdir()
            or (folder / "link").symlink_to("class")
            or shared("cat", "dog", folders=("class", "link"))(folder, model)
        ),
        ["class_data_dir", "'cat'", "'dog'"],
    ),
    "class pictures among another concept's": (class_among_pictures, ["instance_data_dir", "different folders"]),
    # class pictures
    "more images": (retrieved("images/0.png\nimages/0.png\n", "a\n"), ["class_data_dir", "images.txt", "caption.txt"]),
    "more captions": (retrieved("images/0.png\n", "a\nb\n"), ["class_data_dir", "images.txt", "caption.txt"]),
    "retrieved picture gone": (retrieved("images/1.png\n", "a\n"), ["real", "images/1.png", "retrieve.py"]),
    "retrieved picture is none": (retrieved("caption.txt\n", "a\n"), ["real/caption.txt"]),
    "captions not UTF-8": (retrieved("images/0.png\n", b"\xff\n"), ["class_data_dir real", "utf-8"]),
    "nothing retrieved": (retrieved("", ""), ["class_data_dir", "python retrieve.py --class_prompt cat"]),
    "no real pictures": (
        with_class(given(class_data_dir="real", real_prior=True)),
        ["class_data_dir", "python retrieve.py --class_prompt cat --class_data_dir real"],
    ),
    "class pictures in a file": (with_class(made("class", class_data_dir="class")), ["class_data_dir", "class"]),
    # output folder
    "output is a file": (made("run"), ["--output_dir", "run"]),
    "output below a file": (made("file", output_dir="file/run"), ["--output_dir", "file/run"]),
    "output among the pictures": (given(output_dir="./cat/"), ["output_dir", "different folders"]),
    "output among class pictures": (with_class(given(class_data_dir="run")), ["output_dir", "different folders"]),
    "class pictures among the pictures": (
        with_class(given(class_data_dir="cat")),
        ["class_data_dir", "different folders"],
    ),
    # permissions
    "unreadable picture": (forbidden("cat/0.png", 0), ["cat/0.png", "denied"]),
    "unreadable folder": (forbidden("cat", 0), ["instance_data_dir", "cat", "denied"]),
    "output not writable": (forbidden("run", 0o500, made("run/")), ["--output_dir", "run"]),
    "class pictures not writable": (
        forbidden("class", 0o500, with_class(made("class/"), class_data_dir="class")),
        ["class_data_dir class", "written to"],
    ),
}
PERMISSIONS = list(DATA)[-4:]


def other_model(**contents):
    """A case with a folder of these files as the model; JSON where the content is no bytes."""

    def make(folder, model):
        (folder / "other").mkdir()
        for name, content in contents.items():
            file = folder / "other" / name.replace("__", ".")
            file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return {"pretrained_model_name_or_path": folder / "other"}

    return make


def broken(change, **values):
    """A case with a copy of the model in which something is changed."""

    def make(folder, model):
        shutil.copytree(model, folder / "broken")
        change(folder / "broken")
        return {"pretrained_model_name_or_path": folder / "broken"} | values

    return make


def with_word(model):
    """Change: an earlier training has left its word."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    tokenizer.add_tokens("<new1>")
    tokenizer.save_pretrained(model / "tokenizer")


def cut(name, length=1000):
    """Change: a file is only so long."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def without(name):
    """Change: a folder or file is gone."""
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def predict_samples(folder):
    """Change: the scheduler is of a model that predicts the picture itself."""
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))


def nine_channels(folder):
    """Change: a UNet for inpainting."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(config, in_channels=9).save_pretrained(folder / "unet")


def config_changed(part, change):
    """Change: settings of a part's configuration, or of model_index.json."""

    def make(folder):
        file = folder / part
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return make


def link_to_nothing(folder):
    """Change: the UNet's file is a link, as in a hub's cache, and was copied as such."""
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("../../blobs/0123")


def in_a_cache(folder):
    """Change: the model lies where a hub's cache has it."""
    place = folder / "snapshots" / "abc"
    place.mkdir(parents=True)
    for part in list(folder.iterdir()):
        if part.name != "snapshots":
            part.rename(place / part.name)


def pointer_for(name):
    """Change: a file stands for one that Git LFS has not fetched."""
    return lambda folder: (folder / name).write_text(POINTER)


UNET = "unet/diffusion_pytorch_model.safetensors"
MODEL = {
    # what the tokenizer alone can tell
    "token in no prompt": (given(instance_prompt="a cat"), ["instance_prompt", "'a cat'", "<new1>"]),
    "token in other letters": (given(instance_prompt="a <NEW1> cat"), ["instance_prompt", "<new1>"]),
    "second token in no prompt": (given(modifier_token="<new1>+<b>"), ["--modifier_token", "<b>"]),
    "second concept without a token": (
        concepts([CONCEPT, CONCEPT | {"instance_prompt": "a dog"}]),
        ["instance_prompt", "a dog"],
    ),
    "caption without a token": (picture("0.txt", b"a cat"), ["cat/0.txt 'a cat'", "<new1>"]),
    "empty caption": (picture("0.txt", b" "), ["cat/0.txt ''", "<new1>"]),
    "several captions without a token": (
        beside({"0.txt": "a cat", "1.png": None, "1.caption": "a dog", "2.png": None, "2.txt": "a <new1> cat"}),
        ["cat/0.txt 'a cat', ", "cat/1.caption 'a dog': ", "<new1>"],
    ),
    "token cut off in captions": (
        beside({"0.txt": "cat " * 80 + "<new1>", "1.png": None, "1.txt": "<new1>" + " cat" * 80 + " <new1>"}),
        ["cat/0.txt 'cat cat", "77 tokens"],
    ),
    "one of two tokens cut off": (
        given(instance_prompt="<new1> cat" + " and a dog" * 40 + " and <b>", modifier_token="<new1>+<b>"),
        ["instance_prompt '<new1> cat and a dog", "77 tokens"],
    ),
    "token cut off when enlarged": (given(instance_prompt="cat " * 72 + "<new1>"), ["instance_prompt", "77 tokens"]),
    "token in no caption": (
        lambda folder, model: picture("0.txt", b"a <b> cat")(folder, model) | {"modifier_token": "<b>+<new1>"},
        ["--modifier_token '<new1>'"],
    ),
    "unknown initializer": (given(initializer_token="wolpertinger"), ["--initializer_token", "wolpertinger", "'wol'"]),
    "token is a word": (
        given(modifier_token="cat", instance_prompt="a cat"),
        ["--modifier_token", "'cat'", "vocabulary", "'<cat-2>'"],
    ),
    "token is a word in other letters": (
        given(modifier_token="Cat", instance_prompt="a Cat cat"),
        ["--modifier_token", "'Cat'", "vocabulary", "'<Cat-2>'"],
    ),
    "token is a piece in other letters": (
        given(modifier_token="KTN", instance_prompt="a KTN cat"),
        ["--modifier_token", "'KTN'", "vocabulary"],
    ),
    "token is one of the model's own": (broken(with_word), ["--modifier_token '<new1>'", "vocabulary", "'<new1-2>'"]),
    "token in the prompt in other letters, too": (
        given(instance_prompt="a <new1> cat beside a <New1> pot"),
        ["instance_prompt", "<new1>", "capitals"],
    ),
    "token in a caption in other letters, too": (
        picture("0.txt", b"a <new1> cat, <NEW1>"),
        ["cat/0.txt", "<new1>", "capitals"],
    ),
    "token in the class prompt": (
        with_class(made("classes/"), class_data_dir="classes", class_prompt="a <new1> cat"),
        ["class_prompt", "<new1>"],
    ),
    "token in the class prompt, in other letters": (
        with_class(
            made("classes/"),
            class_data_dir="classes",
            class_prompt="one katez, none of catkatezoo",
            modifier_token="Katez",
            instance_prompt="a Katez cat",
        ),
        ["class_prompt 'one katez, ", "Katez"],
    ),
    "token within another": (
        given(modifier_token="<new1>+<new1>x", instance_prompt="a <new1>x cat"),
        ["--modifier_token", "'<new1>'"],
    ),
    "before the UNet is loaded": (
        broken(without(UNET), initializer_token="wolpertinger"),
        ["--initializer_token", "wolpertinger"],
    ),
    "another tokenizer, gone": (given(tokenizer_name="gone"), ["--tokenizer_name gone"]),
    # validation prompts
    "token cut off in a validation prompt": (
        given(validation_prompt=["a <new1> cat", "cat " * 80 + "<new1>"]),
        ["--validation_prompt 'cat cat", "77 tokens"],
    ),
    "token in a validation prompt in other letters": (
        given(validation_prompt="a <New1> cat"),
        ["--validation_prompt 'a <New1> cat'", "<new1>", "capitals"],
    ),
    # no Stable Diffusion
    "resolution": (given(resolution=100), ["--resolution", "100", "8", "104"]),
    "no such model": (given(pretrained_model_name_or_path="./gone"), [NAME, "./gone", "no such folder"]),
    "no such model, with its whole path": (given(pretrained_model_name_or_path="/gone/sd"), [NAME, "no such folder"]),
    "another kind of VAE": (
        broken(config_changed("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]})),
        [NAME, "broken", "Stable Diffusion"],
    ),
    "schedule that divides by zero": (
        given(lr_scheduler="polynomial", lr_warmup_steps=2, max_train_steps=2),
        ["--lr_scheduler polynomial", "--lr_warmup_steps"],
    ),
    "schedule that ends above the rate": (
        given(lr_scheduler="polynomial", lr_warmup_steps=0, learning_rate=1e-7),
        ["--lr_scheduler polynomial", "lr_end"],
    ),
    "hub id, offline": (given(pretrained_model_name_or_path="some/model"), [NAME, "some/model"]),
    "empty model": (other_model(), [NAME, "no model_index.json", "nothing"]),
    "transformers model": (
        other_model(config__json={"model_type": "bert"}, model__safetensors=b""),
        [NAME, "no model_index.json", "config.json, model.safetensors", "diffusers"],
    ),
    "another pipeline": (
        other_model(model_index__json={"_class_name": "StableDiffusion3Pipeline"}),
        [NAME, "StableDiffusion3Pipeline"],
    ),
    "a part's file": (
        lambda folder, model: {"pretrained_model_name_or_path": model / UNET},
        [NAME, "a part of a model in diffusers format", "give a file with all of"],
    ),
    # broken parts
    "no VAE": (broken(without("vae")), [NAME, "broken", "complete model"]),
    "UNet cut": (broken(cut(UNET)), [NAME, "broken", "unet"]),
    "UNet for inpainting": (broken(nine_channels), [NAME, "broken", "9 channels"]),
    "predicts samples": (broken(predict_samples), [NAME, "broken", "'sample'"]),
    "a UNet of XL alone": (
        broken(config_changed("unet/config.json", {"addition_embed_type": "text_time"})),
        [NAME, "broken", "text_encoder_2 is missing"],
    ),
    "an XL model's text encoders alone": (
        broken(config_changed("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]})),
        [NAME, "broken", "complete model"],
    ),
    "UNet for text and classes": (
        broken(config_changed("unet/config.json", {"class_embed_type": "projection"})),
        [NAME, "broken", "class_embed_type"],
    ),
    "UNet of another text encoder": (
        broken(config_changed("unet/config.json", {"cross_attention_dim": 1024})),
        [NAME, "broken", "takes 1024 numbers a token, its text encoder gives 32"],
    ),
    # files that Git LFS has not fetched
    "UNet not fetched": (broken(pointer_for(UNET)), [NAME, f"broken/{UNET}", "git lfs pull"]),
    "vocabulary not fetched": (broken(pointer_for("tokenizer/vocab.json")), ["tokenizer/vocab.json", "git lfs pull"]),
    "configuration not fetched": (
        broken(pointer_for("text_encoder/config.json")),
        ["text_encoder/config.json", "git lfs pull"],
    ),
    "link to what was not copied": (broken(link_to_nothing), [NAME, UNET, "link to nothing", "cp -rL"]),
    "a hub's cache": (broken(in_a_cache), [NAME, "broken", "no model_index.json but snapshots/abc/model_index.json"]),
    "index not fetched": (broken(pointer_for("model_index.json")), ["model_index.json", "git lfs pull"]),
    "no such variant": (given(variant="fp16"), [NAME, "fp16"]),
    # packages that are there, unlike a GPU
    "xformers without a GPU": (
        given(enable_xformers_memory_efficient_attention=True),
        ["--enable_xformers_memory_efficient_attention", "GPU"],
    ),
    "8-bit Adam without a GPU": (given(use_8bit_adam=True), ["--use_8bit_adam", "GPU"]),
}


def prepare(cases, folder_of, model):
    """Makes the folders of cases; returns {case: (folder, flags)}."""
    calls = {}
    for name, (make, _) in cases.items():
        folder = with_cat(folder_of())
        calls[name] = folder, flags(**good_flags(folder, model) | make(folder, model))
    return calls


@pytest.fixture(scope="module")
def answers(sd1, tmp_path_factory):
    """How main ended for each case of DATA and MODEL and what it printed, and the files that it changed."""
    packages = tmp_path_factory.mktemp("packages")
    for package in ("xformers", "bitsandbytes"):
        (packages / package).mkdir()
        (packages / package / "__init__.py").write_text("")

    def folder_of():
        return tmp_path_factory.mktemp("case")

    calls = prepare(DATA, folder_of, "model") | prepare(MODEL, folder_of, sd1)
    before = {name: listing(folder) for name, (folder, _) in calls.items()}
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{packages}"}
    prefix = UNPRIVILEGED if shutil.which("setpriv") else []
    found = in_one_process(calls, prefix, env=environment)
    return {name: (found[name], listing(folder) ^ before[name]) for name, (folder, _) in calls.items()}


def check_refused(answer, changes, words):
    """SystemExit with one line, which Python prints, and exit status 1; nothing else printed, no file changed."""
    ended = answer["ended"]
    assert isinstance(ended, str) and ended.startswith("error: ") and ended.isprintable(), ended
    assert [word for word in words if word not in ended] == [], ended
    assert answer["printed"] == "" and changes == set()


@pytest.mark.parametrize("case", DATA)
def test_data(case, answers):
    """Told before the model, which is not there, is looked for."""
    if case in PERMISSIONS and os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("the root user may read and write everything")
    check_refused(*answers[case], DATA[case][1])


@pytest.mark.parametrize("case", MODEL)
def test_model(case, answers):
    check_refused(*answers[case], MODEL[case][1])


@pytest.mark.parametrize("case", ["truncated picture", "key missing", "another pipeline"])
def test_data_of_a_process(case, folder, sd1):
    make, words = (DATA | MODEL)[case]
    refuse(folder, make(folder, sd1), 1, words)


@pytest.mark.parametrize("listed", [False, True])
def test_home(listed, folder, sd1):
    """A shell leaves the ~ of --flag=~/folder as it is, and so does JSON."""
    values = {"instance_data_dir": "~/cat", "output_dir": "~/run", "pretrained_model_name_or_path": "~/model"}
    if listed:
        (folder / "list.json").write_text(json.dumps([CONCEPT | {"instance_data_dir": "~/cat"}]))
        values |= {"concepts_list": "~/list.json", "instance_data_dir": None, "instance_prompt": None}
    (folder / "model").symlink_to(sd1)
    process = run(sys.executable, SCRIPT, *flags(**good_flags(folder) | values), env=os.environ | {"HOME": folder})
    assert process.returncode == 0, process.stderr
    assert (folder / "run" / "<new1>.bin").is_file()


def test_half_precision_without_a_gpu(folder, sd1):
    """A process of its own: accelerate takes one precision a process."""
    values = {"mixed_precision": "fp16", "pretrained_model_name_or_path": sd1}
    refuse(folder, values, 1, ["--mixed_precision fp16", "cpu", "bf16"])


# Packages


PACKAGES = {
    "xformers": {"enable_xformers_memory_efficient_attention": True},
    "bitsandbytes": {"use_8bit_adam": True},
    "comet_ml": {"report_to": "comet_ml"},
    "wandb": {"report_to": "wandb"},
    "tensorboard": {"report_to": "tensorboard"},
}


@pytest.fixture(scope="module")
def without_packages(sd1, tmp_path_factory):
    """How main ends where the packages are not installed that its flags ask for."""
    folder = with_cat(tmp_path_factory.mktemp("without"))
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({list(PACKAGES)}))\n")
    calls = {name: (folder, flags(**good_flags(folder, sd1) | values)) for name, values in PACKAGES.items()}
    before = listing(folder)
    found = in_one_process(calls, env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"})
    return found, {path for path in listing(folder) ^ before if "__pycache__" not in str(path)}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_not_installed(package, without_packages):
    found, changes = without_packages
    (flag,) = PACKAGES[package]
    check_refused(found[package], changes, [f"--{flag}", f"pip install {package}"])


def test_folder_named_like_a_package(folder, sd1):
    """A folder in the working folder, such as wandb's own records, is no installed package."""
    (folder / "xformers").mkdir()
    values = {"enable_xformers_memory_efficient_attention": True, "pretrained_model_name_or_path": sd1}
    refuse(folder, values, 1, ["pip install xformers"], env=os.environ | {"PYTHONPATH": str(folder)})


def test_phone_pictures_without_pillow_heif(folder, sd1):
    """They are left out, and the run says which and what to do."""
    for name in ("IMG_1.HEIC", "IMG_2.heif"):
        (folder / "cat" / name).write_bytes(b"a picture")
    (folder / "pillow_heif.py").write_text("raise ImportError('not here')")
    values = good_flags(folder, sd1) | {"output_dir": folder / "run"}
    process = run(sys.executable, SCRIPT, *flags(**values), env=os.environ | {"PYTHONPATH": str(folder)})
    assert process.returncode == 0, process.stderr
    (line,) = (line for line in process.stdout.splitlines() if "IMG_1.HEIC, IMG_2.heif" in line)
    assert "instance_data_dir" in line and "pip install pillow-heif" in line


# Versions: one line, before imports that would fail in their own ways


REQUIREMENTS = {
    requirement.name: requirement
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line.split("#")[0].strip()
    for requirement in [Requirement(line.split("#")[0].strip())]
}
CHECKED = ("torch", "diffusers", "transformers", "accelerate", "numpy", "Pillow")
LOWEST = {
    name: next(limit.version for limit in REQUIREMENTS[name].specifier if limit.operator == ">=") for name in CHECKED
}


@pytest.fixture
def bare(tmp_path):
    """Function that starts Python without packages, but with metadata of the needed ones: lowest or given versions."""

    def start(*words, **versions):
        (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
        for name, version in (LOWEST | versions).items():
            if version:
                (tmp_path / f"{name}-{version}.dist-info").mkdir()
                content = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(content)
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        return run(sys.executable, "-S", *words, env=os.environ | {"PYTHONPATH": path})

    return start


REFUSED = [(name, None) for name in CHECKED] + [
    ("torch", "2.5.1+cu124"),
    ("diffusers", "0.34.0"),
    ("transformers", "4.40.0"),
    ("transformers", "6.0.0"),
    ("accelerate", "0.34.2"),
    ("accelerate", "2.0.0"),
    ("numpy", "1.25.2"),
    ("Pillow", "9.5.0"),
]


@pytest.mark.parametrize("name, version", REFUSED)
def test_version_is_refused(name, version, bare):
    process = bare(SCRIPT, *NEEDED, **{name: version})
    (line,) = process.stderr.splitlines()
    assert re.match(rf"error: packages: .*\b{name}\b", line) and (not version or f"{name} {version}" in line), line
    assert not version or f">={LOWEST[name]}" in line
    assert "pip install -r requirements.txt" in line
    assert (process.returncode, process.stdout) == (1, "")


ACCEPTED = {"lowest": {}, "later": {"torch": "2.13.0+cpu", "diffusers": "1.0.0.dev0", "transformers": "5.23.0rc1",
            "accelerate": "1.15.0", "numpy": "10.0", "Pillow": "13.0.0"}}  # fmt: skip


@pytest.mark.parametrize("versions", ACCEPTED.values(), ids=ACCEPTED)
def test_version_is_accepted(versions, bare):
    """The script goes on to its first import, for which nothing is there."""
    (line,) = bare(SCRIPT, *NEEDED, **versions).stderr.splitlines()
    assert line.startswith("error: packages: No module named ")


@pytest.mark.parametrize("words, status", [(["--help"], 0), (["--resolution=zero"], 2)])
def test_arguments_need_no_packages(words, status, tmp_path):
    process = run(sys.executable, "-S", SCRIPT, *words, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.returncode == status and "Traceback" not in process.stderr


def test_version_in_a_notebook(tmp_path):
    """parse_args refuses it there, too."""
    (tmp_path / "diffusers-0.34.0.dist-info").mkdir()
    content = "Metadata-Version: 2.1\nName: diffusers\nVersion: 0.34.0\n"
    (tmp_path / "diffusers-0.34.0.dist-info" / "METADATA").write_text(content)
    code = f"from train_custom_diffusion import parse_args; parse_args({NEEDED})"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = run(sys.executable, "-c", code, env=os.environ | {"PYTHONPATH": path})
    assert process.returncode == 1 and process.stderr.startswith("error: packages: diffusers 0.34.0 is installed, and ")


BROKEN = {
    "torchvision": (
        "raise RuntimeError('operator torchvision::nms does not exist')",
        "packages: torchvision: operator torchvision::nms",
    ),
    "xformers": ("raise OSError('_C.so: undefined symbol: _ZNK3c10')", "packages: xformers: _C.so: undefined symbol"),
    "peft": ("from transformers import Gone", "packages: peft: cannot import name 'Gone' from 'transformers'"),
    "scipy": ("from numpy import Gone", "packages: scipy: cannot import name 'Gone' from 'numpy'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_package(name, tmp_path):
    """A package that cannot be imported, as after an update of torch: one line says why, or it does not matter."""
    code, reason = BROKEN[name]
    (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / f"{name}-99.0.dist-info").mkdir()
    (tmp_path / f"{name}-99.0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = run(sys.executable, SCRIPT, *NEEDED, cwd=tmp_path, env=environment)
    (line,) = process.stderr.splitlines()
    assert process.returncode == 1 and (reason in line or "instance_data_dir" in line), line


def test_old_python(bare):
    code = f"import runpy, sys; sys.version_info = (3, 9); sys.argv[1:] = {NEEDED}; runpy.run_path('{SCRIPT}', {{}}, "
    process = bare("-c", code + "'__main__')")
    assert re.fullmatch(r"error: Python .*: this script needs 3\.10 or later\n", process.stderr)


def test_traceback_on_demand(folder):
    """An environment variable shows the error behind the one line."""
    (folder / "cat" / "fake.jpg").write_bytes(b"hello")
    words, shown = flags(**good_flags(folder)), os.environ | {"CUSTOM_DIFFUSION_TRACEBACK": "1"}
    process = run(sys.executable, SCRIPT, *words, cwd=folder, env=shown)
    lines = process.stderr.splitlines()
    assert lines[0].startswith("Traceback") and any("UnidentifiedImageError" in line for line in lines)
    assert lines[-1].startswith("error: ") and "cat/fake.jpg" in lines[-1]


def test_broken_package_in_a_notebook(tmp_path):
    """The import raises an error, which ends no notebook, and garbage is collected as before."""
    (tmp_path / "accelerate.py").write_text("raise RuntimeError('it is broken')")
    code = """
import gc
try:
    import train_custom_diffusion
except RuntimeError as error:
    print(error, gc.isenabled())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    assert python(code, env=environment).stdout == "it is broken True\n"


def test_retrieve_without_packages():
    process = run(sys.executable, "-S", ROOT / "retrieve.py", "--class_prompt=cat", "--class_data_dir=cats")
    assert re.fullmatch(r"error: No module named '\w+'; pip install -r requirements\.txt\n", process.stderr), (
        process.stderr
    )
    assert process.returncode == 1


def test_retrieve_with_a_broken_datasets(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError('pyarrow requires NumPy 2.0 or newer, found 1.26.4')")
    words = flags(source="dataset", dataset="hub/set", class_prompt="cat", class_data_dir=tmp_path / "cats")
    process = run(sys.executable, ROOT / "retrieve.py", *words, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    problem = "--dataset: pyarrow requires NumPy 2.0 or newer, found 1.26.4; pip install -r requirements.txt"
    assert process.stderr == f"error: {problem}\n" and process.returncode == 1
