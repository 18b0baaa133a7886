"""Whatever is wrong with the input: one line that says so, the right exit status, and nothing left behind.

Each case makes its files in a folder of its own and returns the flags that it changes. What needs no model runs in a
Python in which torch and the other heavy libraries can't be imported.
"""

import json
import os
import resource
import shutil
import struct
import sys
import zlib
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT, SECRET, WEIGHTS, flags, make_picture, refusals_of, run

# the root user may read and write everything, but for this
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.fixture
def folder(tmp_path):
    """A folder `cat` with one good picture."""
    (tmp_path / "cat").mkdir()
    make_picture(0).save(tmp_path / "cat" / "0.png")
    return tmp_path


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


def check_one_line(process, status, words):
    """One line on stderr that has these words, nothing on stdout, this exit status."""
    assert process.returncode == status, process.stdout + process.stderr
    (line,) = process.stderr.splitlines()
    assert "error: " in line and line.isprintable(), line
    assert [word for word in words if str(word) not in line] == [], line
    assert process.stdout == ""


def refuse(folder, values, status, words, light_python, prefix=(), **environment):
    """Runs the script with these flags changed; checks its answer, its time, and that it changed no file."""
    before, spent = listing(folder), resource.getrusage(resource.RUSAGE_CHILDREN)
    words_of_command = [*prefix, sys.executable, SCRIPT, *flags(**good_flags(folder) | values)]
    process = run(*words_of_command, cwd=folder, env=light_python | environment, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    check_one_line(process, status, words)
    assert listing(folder) == before
    # seconds of work, not of waiting for a busy machine
    assert after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime < 2


# Arguments that are wrong by themselves: exit status 2


ARGUMENTS = {
    "no model": ({"pretrained_model_name_or_path": None}, ["--pretrained_model_name_or_path"]),
    "no pictures": ({"instance_data_dir": None}, ["--instance_data_dir", "--concepts_list"]),
    "no prompt": ({"instance_prompt": None}, ["--instance_prompt"]),
    "no class pictures": ({"with_prior_preservation": True, "class_prompt": "cat"}, ["--class_data_dir"]),
    "no class": ({"with_prior_preservation": True, "class_data_dir": "c"}, ["--class_prompt"]),
    "unknown flag": ({"resolutoin": 512}, ["--resolutoin"]),
    "shortened flag": ({"resol": 512}, ["--resol"]),
    "flag with a line break": ({"a\nb": 1}, ["--a\\nb"]),
    "no number": ({"train_batch_size": "four"}, ["--train_batch_size", "four"]),
    "half a picture": ({"train_batch_size": 1.5}, ["--train_batch_size", "1.5"]),
    "no boolean": ({"hflip": "maybe"}, ["--hflip", "maybe"]),
    "no choice": ({"freeze_model": "all"}, ["--freeze_model", "crossattn_kv"]),
    "no schedule": ({"lr_scheduler": "up"}, ["--lr_scheduler", "cosine"]),
    "no tracker": ({"report_to": "paper"}, ["--report_to", "tensorboard"]),
    "no precision": ({"mixed_precision": "fp8"}, ["--mixed_precision", "bf16"]),
    "negative steps": ({"max_train_steps": -3}, ["--max_train_steps", "-3"]),
    "huge batch": ({"train_batch_size": 10**12}, ["--train_batch_size", "2**31"]),
    "huge size": ({"resolution": 10**500}, ["--resolution", "2**31"]),
    "seed too large": ({"seed": 10**400}, ["--seed", "2**63"]),
    "seed of many digits": ({"seed": "9" * 5000}, ["--seed"]),
    "negative seed": ({"seed": -1}, ["--seed", "-1"]),
    "infinite seed": ({"seed": "1e999"}, ["--seed", "1e999"]),
    "workers": ({"dataloader_num_workers": -1}, ["--dataloader_num_workers"]),
    "warm-up": ({"lr_warmup_steps": -1}, ["--lr_warmup_steps"]),
    "learning rate": ({"learning_rate": -1e-5}, ["--learning_rate", "-1e-05"]),
    "learning rate nan": ({"learning_rate": "nan"}, ["--learning_rate", "nan"]),
    "learning rate infinite": ({"learning_rate": "1e999"}, ["--learning_rate", "inf"]),
    "weight decay": ({"adam_weight_decay": -1}, ["--adam_weight_decay"]),
    "epsilon": ({"adam_epsilon": "nan"}, ["--adam_epsilon"]),
    "clipping": ({"max_grad_norm": -1}, ["--max_grad_norm"]),
    "prior loss": ({"prior_loss_weight": -1}, ["--prior_loss_weight"]),
    "cached latents": ({"cache_latents": -1}, ["--cache_latents"]),
    "beta": ({"adam_beta1": 1}, ["--adam_beta1"]),
    "beta nan": ({"adam_beta2": "nan"}, ["--adam_beta2"]),
    "real_prior alone": ({"real_prior": True}, ["--real_prior", "--with_prior_preservation"]),
    "token twice": ({"modifier_token": "<new1>+<new1>"}, ["--modifier_token", "<new1>", "twice"]),
    "empty token": ({"modifier_token": "<new1>+"}, ["--modifier_token"]),
    "token with a slash": ({"modifier_token": "a/b"}, ["--modifier_token", "a/b"]),
    "token that hides its file": ({"modifier_token": ".new"}, ["--modifier_token", ".new"]),
    "token with a line break": ({"modifier_token": "a\nb"}, ["--modifier_token", "a\\nb"]),
    "token too long for a file": ({"modifier_token": "n" * 300}, ["--modifier_token"]),
    "token that names the weights": ({"modifier_token": WEIGHTS}, ["--modifier_token", WEIGHTS]),
    "initializers": ({"modifier_token": "<new1>+<b>", "initializer_token": "cat"}, ["--initializer_token", "1", "2"]),
    "prompt that is no text": ({"instance_prompt": "a \udcff <new1>"}, ["--instance_prompt", "\\udcff", "UTF-8"]),
    "folder that is no text": ({"output_dir": "run\udcff"}, ["--output_dir", "\\udcff", "UTF-8"]),
    **{
        f"{name} 0": ({name: 0}, [f"--{name}", "1 or more"])
        for name in """train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps resolution
            num_class_images sample_batch_size checkpointing_steps checkpoints_total_limit validation_steps
            num_validation_images""".split()
    },
    **{
        f"token of the hub with {tracker}": ({"hub_token": SECRET, "report_to": tracker}, ["--hub_token", tracker])
        for tracker in ("wandb", "comet_ml", "all")
    },
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, folder, light_python):
    values, words = ARGUMENTS[case]
    refuse(folder, values, 2, words, light_python)


# Data and environment: exit status 1


def given(**values):
    """A case that changes flags alone; in its texts {} is the case's folder."""
    return lambda folder: {
        name: value.replace("{}", str(folder)) if isinstance(value, str) else value for name, value in values.items()
    }


def picture(name, content):
    """A case with one more instance picture."""

    def make(folder):
        (folder / "cat" / name).write_bytes(content(folder) if callable(content) else content)
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


def float_picture(*values):
    def content(folder):
        import numpy as np
        from PIL import Image

        Image.fromarray(np.array([values], np.float32)).save(folder / "float.tif")
        return (folder / "float.tif").read_bytes()

    return content


def link(target):
    """A case with a picture that is a link."""

    def make(folder):
        (folder / "cat" / "link.jpg").symlink_to(target)
        return {}

    return make


def pipe(name, **values):
    """A case with a pipe that nobody writes to."""

    def make(folder):
        os.mkfifo(folder / name)
        return given(**values)(folder)

    return make


def concepts(content):
    def make(folder):
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (folder / "list.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return {"concepts_list": "list.json", "instance_prompt": None, "instance_data_dir": None}

    return make


CONCEPT = {"instance_prompt": "a <new1> cat", "instance_data_dir": "cat"}
ELSEWHERE = CONCEPT | {"instance_data_dir": "dog"}
PRIOR = {"with_prior_preservation": True, "class_prompt": "cat"}


def with_class(make, **values):
    return lambda folder: make(folder) | PRIOR | values


def retrieved(images, captions):
    """A case with class pictures as retrieve.py leaves them."""

    def make(folder):
        real = folder / "real"
        (real / "images").mkdir(parents=True)
        make_picture(1).save(real / "images" / "0.png")
        for name, content in (("images.txt", images), ("caption.txt", captions)):
            (real / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"class_data_dir": "real", "real_prior": True} | PRIOR

    return make


def made(*names, **values):
    """A case with more folders (ending in a slash) and files."""

    def make(folder):
        for name in names:
            if name.endswith("/"):
                (folder / name).mkdir()
            else:
                (folder / name).write_text("mine")
        return given(**values)(folder)

    return make


def forbidden(name, mode, make=None, **values):
    """A case in which something may not be read, written or entered."""

    def change(folder):
        changed = make(folder) if make else {}
        (folder / name).chmod(mode)
        return changed | values

    return change


def shared(*classes):
    """Concepts that share a folder of generated class pictures."""
    concept = CONCEPT | {"class_data_dir": "class"}
    return with_class(concepts([concept | {"class_prompt": name} for name in classes]))


DATA = {
    # folders and pictures
    "no such folder": (given(instance_data_dir="dog"), ["instance_data_dir", "dog"]),
    "not a folder": (given(instance_data_dir="cat/0.png"), ["instance_data_dir", "0.png"]),
    "name too long": (given(instance_data_dir="n" * 5000), ["instance_data_dir", "too long"]),
    "empty folder": (made("dog/", instance_data_dir="dog"), ["instance_data_dir", "dog", "no pictures"]),
    "no pictures": (made("dog/", "dog/a.txt", instance_data_dir="dog"), ["instance_data_dir", "dog", "no pictures"]),
    "only folders": (made("dog/", "dog/a.jpg/", instance_data_dir="dog"), ["instance_data_dir", "dog", "no pictures"]),
    "truncated picture": (picture("half.png", truncated), ["cat/half.png", "mend or remove"]),
    "truncated, with a warning of Pillow": (
        picture("half.tif", b"II*\0\x86\0\0\0"),
        ["cat/half.tif", "mend or remove"],
    ),
    "no bytes": (picture("empty.jpg", b""), ["cat/empty.jpg", "mend or remove"]),
    "text": (picture("fake.jpg", b"hello"), ["cat/fake.jpg", "mend or remove"]),
    "decompression bomb": (picture("bomb.png", bomb), ["cat/bomb.png", "3600000000 pixels", "bomb"]),
    "floats out of range": (picture("f.tif", float_picture(0, 200)), ["cat/f.tif", "outside 0 to 1"]),
    "floats that are none": (picture("f.tif", float_picture(0, float("nan"))), ["cat/f.tif", "outside 0 to 1"]),
    "dangling link": (link("nowhere.jpg"), ["cat/link.jpg", "mend or remove"]),
    "link to itself": (link("link.jpg"), ["cat/link.jpg", "mend or remove"]),
    "pipe": (pipe("cat/pipe.jpg"), ["cat/pipe.jpg", "mend or remove"]),
    "device": (link("/dev/zero"), ["cat/link.jpg", "mend or remove"]),
    "line break in a name": (picture("a\nb\u2028\x1b[31m.png", b"hello"), ["cat/a\\nb\\u2028\\x1b[31m.png"]),
    "name that is no text": (picture("a\udcff.png", b"hello"), ["cat/a\\udcff.png"]),
    # lists of concepts
    "no list file": (given(concepts_list="none.json"), ["--concepts_list", "none.json", "No such file"]),
    "folder as a list": (made("list.json/", concepts_list="list.json"), ["--concepts_list", "list.json"]),
    "pipe as a list": (pipe("list.json", concepts_list="list.json"), ["--concepts_list", "list.json"]),
    "no JSON": (concepts('[\n{"instance_prompt": }]'), ["--concepts_list", "list.json", "line 2, column 21"]),
    "empty file": (concepts(""), ["--concepts_list", "line 1, column 1"]),
    "not UTF-8": (concepts(b'["\xff"]'), ["--concepts_list", "list.json", "UTF-8"]),
    "UTF-16": (concepts(json.dumps([CONCEPT]).encode("utf-16")), ["--concepts_list", "UTF-8"]),
    "too deep": (concepts("[" * 100000), ["--concepts_list", "list.json", "recursion"]),
    "huge number": (concepts("[" + "9" * 5000 + "]"), ["--concepts_list", "list.json", "digits"]),
    "no list": (concepts({"a": 1}), ["--concepts_list", "not a list"]),
    "empty list": (concepts([]), ["--concepts_list", "not a list"]),
    "nan": (concepts("[NaN]"), ["--concepts_list", "concept 1"]),
    "no object": (concepts([CONCEPT, [CONCEPT]]), ["--concepts_list", "concept 2"]),
    "key missing": (concepts([CONCEPT, {"instance_prompt": "b"}]), ["concept 2", "'instance_data_dir'"]),
    "key twice": (
        concepts('[{"instance_prompt": "a", "instance_prompt": "b"}]'),
        ["--concepts_list", "key twice"],
    ),
    "key of another kind": (concepts([CONCEPT | {"instance_prompt": ["a"]}]), ["concept 1", "'instance_prompt'"]),
    "key empty": (concepts([CONCEPT | {"instance_data_dir": ""}]), ["concept 1", "'instance_data_dir'"]),
    "class key missing": (with_class(concepts([CONCEPT])), ["concept 1", "'class_prompt'"]),
    "zero byte in a folder": (
        concepts([CONCEPT | {"instance_data_dir": "a\0b"}]),
        ["concept 1", "'instance_data_dir'"],
    ),
    "zero byte in a prompt": (
        concepts([CONCEPT | {"instance_prompt": "a\0<new1>"}]),
        ["concept 1", "'instance_prompt'"],
    ),
    "half a character": (concepts([CONCEPT | {"instance_prompt": "\ud800<new1>"}]), ["concept 1", "'instance_prompt'"]),
    "second folder missing": (
        concepts([CONCEPT, ELSEWHERE]),
        ["instance_data_dir", "dog"],
    ),
    "one folder for two classes": (shared("cat", "dog"), ["class_data_dir", "'cat'", "'dog'"]),
    # prompts and tokens
    "token in no prompt": (given(instance_prompt="a cat"), ["instance_prompt", "'a cat'", "<new1>"]),
    "token in other letters": (given(instance_prompt="a <NEW1> cat"), ["instance_prompt", "<new1>"]),
    "second token in no prompt": (given(modifier_token="<new1>+<b>"), ["--modifier_token", "<b>"]),
    "second concept without a token": (
        concepts([CONCEPT, CONCEPT | {"instance_prompt": "a\n dog"}]),
        ["instance_prompt", "a\\n dog"],
    ),
    # class pictures
    "more images": (retrieved("images/0.png\nimages/0.png\n", "a\n"), ["class_data_dir", "2 lines", "caption.txt"]),
    "more captions": (retrieved("images/0.png\n", "a\nb\n"), ["class_data_dir", "images.txt", "2 in caption.txt"]),
    "retrieved picture gone": (retrieved("images/1.png\n", "a\n"), ["real", "'images/1.png'", "retrieve.py"]),
    "retrieved picture is a folder": (retrieved("images\n", "a\n"), ["real", "'images'", "retrieve.py"]),
    "retrieved picture without a name": (retrieved("images/0.png\n\n", "a\nb\n"), ["real", "''", "retrieve.py"]),
    "retrieved picture is none": (retrieved("caption.txt\n", "a\n"), ["real/caption.txt", "mend or remove"]),
    "zero byte in images.txt": (retrieved("a\0b\n", "a\n"), ["real", "a\\x00b", "retrieve.py"]),
    "images.txt not UTF-8": (retrieved(b"\xff.png\n", "a\n"), ["real/images.txt", "UTF-8"]),
    "captions not UTF-8": (retrieved("images/0.png\n", b"\xff\n"), ["real/caption.txt", "UTF-8"]),
    "nothing retrieved": (retrieved("", ""), ["class_data_dir", "python retrieve.py --class_prompt cat"]),
    "no real pictures": (
        with_class(given(class_data_dir="real", real_prior=True)),
        ["class_data_dir", "python retrieve.py --class_prompt cat --class_data_dir real"],
    ),
    "class pictures in a file": (with_class(made("class", class_data_dir="class")), ["class_data_dir", "class"]),
    "class pictures below a file": (with_class(made("f", class_data_dir="f/class")), ["class_data_dir", "f/class"]),
    # output folder
    "output is a file": (made("run"), ["--output_dir", "run", "no folder"]),
    "output below a file": (made("file", output_dir="file/run"), ["--output_dir", "file/run"]),
    "output is a dangling link": (lambda f: (f / "run").symlink_to("gone") or {}, ["--output_dir", "run"]),
    "output name too long": (given(output_dir="n" * 300), ["nnn", "too long"]),
    "output among the pictures": (given(output_dir="./cat/"), ["--output_dir", "cat", "give a folder of its own"]),
    "output among class pictures": (
        with_class(given(class_data_dir="run")),
        ["--output_dir", "run", "give a folder of its own"],
    ),
    "output full of other things": (made("run/", "run/image_0.png", instance_data_dir="dog"), ["instance_data_dir"]),
    # packages
    "xformers": (
        given(enable_xformers_memory_efficient_attention=True),
        ["--enable_xformers_memory_efficient_attention", "pip install xformers"],
    ),
    "8-bit Adam": (given(use_8bit_adam=True), ["--use_8bit_adam", "pip install bitsandbytes"]),
    "comet_ml": (given(report_to="comet_ml"), ["--report_to", "pip install comet_ml"]),
    "wandb": (given(report_to="wandb"), ["--report_to", "pip install wandb"]),
    "tensorboard": (given(report_to="tensorboard"), ["--report_to", "pip install tensorboard"]),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, folder, light_python):
    make, words = DATA[case]
    refuse(folder, make(folder), 1, words, light_python)


FORBIDDEN = {
    "unreadable picture": (forbidden("cat/0.png", 0), ["cat/0.png", "denied"]),
    "unreadable folder": (forbidden("cat", 0), ["instance_data_dir", "cat", "denied"]),
    "closed folder": (forbidden("cat", 0o400), ["cat/0.png", "denied"]),
    "unreadable list": (forbidden("list.json", 0, concepts([CONCEPT])), ["--concepts_list", "denied"]),
    "unreadable captions": (
        forbidden("real/caption.txt", 0, retrieved("images/0.png", "a")),
        ["caption.txt", "denied"],
    ),
    "output not writable": (forbidden("run", 0o500, made("run/")), ["--output_dir", "run", "not writable"]),
    "output below a closed folder": (
        forbidden("shut", 0o600, made("shut/"), output_dir="shut/run"),
        ["shut/run", "denied"],
    ),
    "class pictures not writable": (
        forbidden("class", 0o500, with_class(made("class/"), class_data_dir="class")),
        ["class_data_dir", "class", "not writable"],
    ),
}


@pytest.mark.skipif(not shutil.which("setpriv") and os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("case", FORBIDDEN)
def test_permissions(case, folder, light_python):
    make, words = FORBIDDEN[case]
    refuse(folder, make(folder), 1, words, light_python, UNPRIVILEGED)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_variables_of_launchers(name, folder, light_python):
    refuse(folder, {}, 1, [name, "'two'"], light_python, **{name: "two"})


PLAIN = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
ASCII = PLAIN | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_terminal_without_unicode(folder, light_python):
    """Letters that the terminal can't show are written as their codes; without any UTF-8 a prompt can't be read."""
    refuse(folder, {"instance_prompt": "a Käfer"}, 1, ["a K\\xe4fer", "<new1>"], light_python, **PLAIN)
    (folder / "cat" / "Käfer.png").write_text("")
    refuse(folder, {}, 1, ["cat/K\\xe4fer.png"], light_python, **PLAIN)
    refuse(folder, {}, 1, ["cat/K\\udcc3\\udca4fer.png"], light_python, **ASCII)
    refuse(folder, {"instance_prompt": "Käfer"}, 2, ["--instance_prompt", "UTF-8 locale"], light_python, **ASCII)


# What only the tokenizer or the model folder can tell, or a machine without a GPU. One notebook asks for all of it.

REFUSALS = """
import json, os, sys, tempfile
from train_custom_diffusion import main, parse_args

answers = {}
for name, (folder, call) in json.loads(sys.stdin.read()).items():
    os.chdir(folder)
    with tempfile.TemporaryFile("w+") as said:
        streams = [(number, os.dup(number)) for number in (1, 2)]
        for number, _ in streams:
            os.dup2(said.fileno(), number)
        try:
            main(parse_args(call))
            answer = "went on"
        except SystemExit as end:
            answer = end.code
        except BaseException as error:
            answer = "traceback of " + repr(error)
        sys.stdout.flush()
        for number, kept in streams:
            os.dup2(kept, number)
        said.seek(0)
        answers[name] = [answer, said.read()]
print("ANSWERS", json.dumps(answers))
"""


def model(**contents):
    """A case with a folder of these files as the model; JSON where the content is no bytes."""

    def make(folder, sd1):
        (folder / "other").mkdir()
        for name, content in contents.items():
            file = folder / "other" / name.replace("__", ".")
            file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return {"pretrained_model_name_or_path": folder / "other"}

    return make


def broken(change, **values):
    """A case with a copy of the model in which something is changed."""

    def make(folder, sd1):
        shutil.copytree(sd1, folder / "broken")
        change(folder / "broken")
        return {"pretrained_model_name_or_path": folder / "broken"} | values

    return make


def cut(name, length=1000):
    """Change: a file is only so long."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def write(name, content):
    """Change: a file has this content, JSON where it is no bytes."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(text)


def without(name):
    """Change: a folder or file is gone."""
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def forget(name, key):
    """Change: weights are not in their file."""

    def change(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / name)
        save_file({k: value for k, value in weights.items() if key not in k}, folder / name, {"format": "pt"})

    return change


def adjust(name, **values):
    """Change: a configuration has other values."""

    def change(folder):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | values))

    return change


def pickled(folder):
    """Change: weights as a pickle that is none."""
    without("text_encoder/model.safetensors")(folder)
    write("text_encoder/pytorch_model.bin", b"junk")(folder)


def nine_channels(folder):
    """Change: a UNet for inpainting."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(config, in_channels=9).save_pretrained(folder / "unet")


def changed(**values):
    return lambda folder, sd1: values


BROKEN = ["--pretrained_model_name_or_path", "broken"]
GENERATE = PRIOR | {"class_data_dir": "class", "num_class_images": 1}
VAE, UNET = "vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"
MODEL = {
    # the tokenizer's
    "unknown initializer": (
        changed(initializer_token="wolpertinger"),
        ["--initializer_token", "wolpertinger", "'wol'"],
    ),
    "no initializer": (changed(initializer_token=""), ["--initializer_token"]),
    "token is a word": (
        changed(modifier_token="cat", instance_prompt="a cat"),
        ["--modifier_token", "'cat'", "vocabulary"],
    ),
    "token within another": (
        changed(modifier_token="<new1>+<new1>x", instance_prompt="a <new1>x cat"),
        ["instance_prompt", "finds no '<new1>'"],
    ),
    "prompt too long": (
        changed(instance_prompt="<new1> cat" + " and a dog" * 40),
        ["instance_prompt", "77", "shorten"],
    ),
    "prompt too long when enlarged": (
        changed(instance_prompt="<new1>" + " cat" * 72),
        ["instance_prompt", "'a far away", "78 tokens"],
    ),
    "before the networks": (
        broken(without(UNET), initializer_token="wolpertinger"),
        ["--initializer_token", "wolpertinger"],
    ),
    "no tokenizer": (broken(without("tokenizer")), [*BROKEN, "no usable tokenizer"]),
    "another tokenizer, gone": (changed(tokenizer_name="gone"), ["--tokenizer_name gone", "no usable tokenizer"]),
    # no Stable Diffusion
    "resolution": (changed(resolution=100), ["--resolution", "100", "8", "96"]),
    "no such folder": (changed(pretrained_model_name_or_path="./gone"), ["--pretrained_model_name_or_path", "./gone"]),
    "hub id, offline": (
        changed(pretrained_model_name_or_path="some/model"),
        ["--pretrained_model_name_or_path some/model"],
    ),
    "no hub id": (changed(pretrained_model_name_or_path="a b\nc"), ["--pretrained_model_name_or_path a b\\nc"]),
    "empty folder": (model(), ["--pretrained_model_name_or_path", "no model_index.json", "found: nothing"]),
    "other things": (model(thesis__txt=b""), ["no model_index.json", "found: thesis.txt"]),
    "transformers model": (
        model(config__json={"model_type": "bert"}, model__safetensors=b""),
        ["no model_index.json", "found: config.json, model.safetensors", "diffusers format"],
    ),
    "SDXL": (
        model(model_index__json={"_class_name": "StableDiffusionXLPipeline"}),
        ["a StableDiffusionXLPipeline; give"],
    ),
    "inpainting": (
        model(model_index__json={"_class_name": "StableDiffusionInpaintPipeline"}),
        ["a StableDiffusionInpaintPipeline; give"],
    ),
    "index of another kind": (model(model_index__json=[1]), ["--pretrained_model_name_or_path", "model_index.json"]),
    "index without a class": (model(model_index__json={}), ["--pretrained_model_name_or_path", "model_index.json"]),
    "index is no JSON": (model(model_index__json=b"{"), ["--pretrained_model_name_or_path", "model_index.json"]),
    "single file": (
        lambda folder, sd1: {"pretrained_model_name_or_path": sd1 / UNET},
        ["--pretrained_model_name_or_path", "a single file", "from_single_file"],
    ),
    # broken parts
    "no VAE": (broken(without("vae")), [*BROKEN, "no usable vae"]),
    "VAE of another kind": (broken(write("vae/config.json", [1])), [*BROKEN, "no usable vae"]),
    "VAE without sizes": (broken(write("vae/config.json", {})), [*BROKEN, "no usable vae"]),
    "VAE cut": (broken(cut(VAE)), [*BROKEN, "no usable vae"]),
    "VAE with holes": (broken(forget(VAE, "encoder.conv_in")), [*BROKEN, "no usable vae", "encoder.conv_in"]),
    "UNet cut": (broken(cut(UNET)), [*BROKEN, "no usable unet"]),
    "UNet empty": (broken(cut(UNET, 0)), [*BROKEN, "no usable unet"]),
    "UNet with holes": (broken(forget(UNET, "attn2.to_k")), [*BROKEN, "no usable unet", "attn2.to_k.weight"]),
    "UNet of other sizes": (
        broken(adjust("unet/config.json", block_out_channels=[64, 64])),
        [*BROKEN, "no usable unet"],
    ),
    "UNet that is odd": (broken(adjust("unet/config.json", block_out_channels=5)), [*BROKEN, "no usable unet"]),
    "UNet for inpainting": (broken(nine_channels), [*BROKEN, "9 channels"]),
    "text encoder cut": (broken(cut("text_encoder/model.safetensors")), [*BROKEN, "no usable text_encoder"]),
    "text encoder with holes": (
        broken(forget("text_encoder/model.safetensors", "layers.1.mlp.fc1")),
        [*BROKEN, "no usable text_encoder", "layers.1.mlp.fc1"],
    ),
    "text encoder of another kind": (
        broken(write("text_encoder/config.json", [])),
        [*BROKEN, "no usable text_encoder"],
    ),
    "text encoder that is a pickle": (broken(pickled), [*BROKEN, "no usable text_encoder"]),
    "no scheduler": (broken(without("scheduler")), [*BROKEN, "no usable scheduler"]),
    "odd schedule": (
        broken(adjust("scheduler/scheduler_config.json", beta_schedule="x")),
        [*BROKEN, "no usable scheduler"],
    ),
    "odd prediction": (
        broken(adjust("scheduler/scheduler_config.json", prediction_type="sample")),
        [*BROKEN, "prediction_type is 'sample'", "v_prediction"],
    ),
    "no such variant": (changed(variant="fp16"), ["--pretrained_model_name_or_path", "no usable text_encoder", "fp16"]),
    "generating with holes": (
        broken(forget("text_encoder/model.safetensors", "layers.1.mlp.fc1"), **GENERATE),
        [*BROKEN, "no usable text_encoder", "layers.1.mlp.fc1"],
    ),
    # packages; xformers and bitsandbytes are there, a GPU is not
    "xformers without a GPU": (
        changed(enable_xformers_memory_efficient_attention=True),
        ["--enable_xformers_memory_efficient_attention", "GPU", "leave"],
    ),
    "8-bit Adam without a GPU": (changed(use_8bit_adam=True), ["--use_8bit_adam", "GPU", "leave"]),
}


@pytest.fixture(scope="module")
def answers(sd1, tmp_path_factory):
    """What the notebook answered to each case of MODEL and printed besides, and the folders that were changed."""
    calls, before, packages = {}, {}, tmp_path_factory.mktemp("packages")
    for package in ("xformers", "bitsandbytes"):
        (packages / package).mkdir()
        (packages / package / "__init__.py").write_text("")
    for name, (make, _) in MODEL.items():
        folder = tmp_path_factory.mktemp("case")
        (folder / "cat").mkdir()
        make_picture(0).save(folder / "cat" / "0.png")
        values = good_flags(folder, sd1) | make(folder, sd1)
        calls[name], before[name] = (str(folder), flags(**values)), listing(folder)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{packages}"}
    process = run(sys.executable, "-c", REFUSALS, input=json.dumps(calls), env=environment)
    assert process.returncode == 0, process.stderr
    folders = {name: Path(folder) for name, (folder, _) in calls.items()}
    return json.loads(process.stdout.rpartition("ANSWERS")[2]), {
        name: listing(folder) ^ before[name] for name, folder in folders.items()
    }


@pytest.mark.parametrize("case", MODEL)
def test_model(case, answers):
    """SystemExit with one line, which Python prints; nothing else printed, no file changed."""
    (answer, printed), changes = (part[case] for part in answers)
    assert isinstance(answer, str) and answer.startswith("error: ") and answer.isprintable(), answer
    assert [word for word in MODEL[case][1] if word not in answer] == [], answer
    assert printed == "" and changes == set()


def test_folder_named_like_a_package(folder, sd1):
    """A folder in the working folder is no installed package."""
    (folder / "xformers").mkdir()
    words = flags(**good_flags(folder, sd1), enable_xformers_memory_efficient_attention=True)
    (answer,) = refusals_of({"xformers": words}, cwd=folder).values()
    assert "pip install xformers" in answer


def test_half_precision_without_a_gpu(folder, sd1):
    """A process of its own: accelerate takes one precision a process."""
    before = listing(folder)
    process = run(sys.executable, SCRIPT, *flags(**good_flags(folder, sd1), mixed_precision="fp16"), cwd=folder)
    check_one_line(process, 1, ["--mixed_precision fp16", "cpu", "bf16"])
    assert listing(folder) == before
