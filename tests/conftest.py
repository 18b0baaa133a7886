"""What the tests share: tiny models, pictures, and the ways in which a user starts the trainer.

A launch costs seconds, so one trained run serves many tests.
"""

import atexit
import contextlib
import copy
import functools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_custom_diffusion.py"
EMBEDDED = ROOT / "assets" / "model"
WEIGHTS = "pytorch_custom_diffusion_weights"
SECRET = "hf_NobodyMayReadThis"
SECRETS = {
    "HF_TOKEN": "hf_NorThisOfTheEnvironment",
    "WANDB_API_KEY": "nobody0may0read0this0key" + "0" * 16,
    "COMET_API_KEY": "NobodyMayReadThisKeyEither",
}

sys.path.insert(0, str(ROOT))
os.environ.update(
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    CUDA_VISIBLE_DEVICES="",  # promises of equal bits hold on a CPU
    OMP_NUM_THREADS="1",  # the models are so small that a second thread only costs
    TOKENIZERS_PARALLELISM="false",
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it

LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [Path(sys.executable).with_name("accelerate"), "launch"],
    "torchrun": [Path(sys.executable).with_name("torchrun"), "--nproc_per_node=2"],
}


# Starting the trainer


def run(*words, **options):
    """Runs a command as a process and returns it when it is done, whatever its exit status."""
    options = {"capture_output": True, "text": True, "timeout": 600} | options
    return subprocess.run([str(word) for word in words], **options)


def flags(**values):
    """Command-line flags from keywords: True is the bare flag, None leaves it out."""
    given = {name: value for name, value in values.items() if value is not None}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def train(output_dir, launcher="python", script=SCRIPT, cwd=None, env=None, **values):
    """Trains for a few steps at 64 pixels, checks that it ended well, and returns output_dir."""
    defaults = {
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "dataloader_num_workers": 0,
    }
    process = run(*LAUNCHERS[launcher], script, *flags(output_dir=output_dir, **(defaults | values)), cwd=cwd, env=env)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    assert secrets_in(process.stdout, process.stderr) == []
    (Path(output_dir) / "stdout.txt").write_text(process.stdout)
    return Path(output_dir)


FAST = {"resolution": 64, "train_batch_size": 1, "report_to": "none", "dataloader_num_workers": 0}


def main_in_child(words, folder, prelude, env):
    """What a forked process does: everything that it says goes to folder/log.txt."""
    os.environ.update(env)
    os.setsid()
    log = os.open(folder.with_name(f"{folder.name}.log{env.get('RANK', '')}"), os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    import train_custom_diffusion

    exec(prelude, {"rank": int(env.get("RANK", 0)), "folder": folder, "trainer": train_custom_diffusion})
    train_custom_diffusion.main(train_custom_diffusion.parse_args(words))


def start(folder, processes=1, prelude="", **values):
    """Starts the trainer's main in processes forked from one that has imported it (seconds saved); returns them.

    `prelude` is code that changes the world around the trainer in its process, such as a slow disk. Several processes
    find each other as torchrun's do. What each says is appended to <folder>.log, or <folder>.log0 and so on.
    """
    values = {"output_dir": folder} | FAST | values
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_custom_diffusion"])
    envs = [{}]
    if processes > 1:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
            port = server.getsockname()[1]
        place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        envs = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    words = flags(**values)
    children = [context.Process(target=main_in_child, args=(words, Path(folder), prelude, env)) for env in envs]
    for child, env in zip(children, envs, strict=True):
        Path(f"{folder}.log{env.get('RANK', '')}").touch()
        child.start()
        atexit.register(child.kill)  # a test that fails may leave it waiting for ever
    return children


def finish(children, folder, status=0):
    """Waits for started processes, checks how they ended, and returns what they said."""
    for child in children:
        child.join(300)
    said = "".join(file.read_text() for file in sorted(folder.parent.glob(f"{folder.name}.log*")))
    assert [child.exitcode for child in children] == [status] * len(children), said[-4000:]
    return said


def fork(folder, status=0, **values):
    """Runs the trainer's main to its end in forked processes; returns the folder."""
    finish(start(folder, **values), folder, status)
    return folder


def wait_until(condition, seconds=300):
    """Waits until condition() is true, looking every millisecond."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def python(code, *words, **options):
    """Runs Python code, as a notebook would, with the repository on its path; returns the finished process."""
    process = run(sys.executable, "-c", code, *words, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    return process


NOTEBOOK = """
import json, sys
from train_custom_diffusion import main, parse_args

answers = {}
for name, call in json.loads(sys.stdin.read()).items():
    try:
        main(parse_args(call))
        answers[name] = "went on"
    except SystemExit as end:
        answers[name] = str(end)
print("ANSWERS", json.dumps(answers))
"""


def refusals_of(calls, **options):
    """What one notebook answers to several calls, lists of flags by name: the error, or "went on"."""
    process = python(NOTEBOOK, input=json.dumps(calls), **options)
    return json.loads(process.stdout.rpartition("ANSWERS")[2])


HIDDEN = ("torch", "diffusers", "transformers", "accelerate", "wandb", "tensorboard", "comet_ml")


@pytest.fixture(scope="session")
def light_python(tmp_path_factory):
    """Environment of a Python that can't import the heavy libraries, nor packages that are to be not installed."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({HIDDEN}))\n")
    return os.environ | {"PYTHONPATH": str(folder)}


# Reading what it left


def secrets_in(*places):
    """Which places, texts or folders, have a secret in them; of a folder every file."""
    names = [secret.encode() for secret in (SECRET, *SECRETS.values())]
    found = []
    for place in places:
        files = [file for file in place.rglob("*") if file.is_file()] if isinstance(place, Path) else [place]
        for file in files:
            content = file.encode() if isinstance(file, str) else file.read_bytes() + str(file).encode()
            found += [file] if any(name in content for name in names) else []
    return found


def load_weights(folder):
    """Trained attention weights of a folder, without the empty entries, as safetensors reads them."""
    from safetensors.torch import load_file

    return {key: value for key, value in load_file(folder / f"{WEIGHTS}.safetensors").items() if value.numel()}


def load_trained(folder):
    """Everything that a run trained: attention weights by their key and embeddings by their word."""
    from safetensors.torch import load_file

    trained = load_weights(folder)
    for file in folder.glob("*.safetensors"):
        if file.stem != WEIGHTS:
            trained |= load_file(file)
    return trained


def same_bits(left, right):
    """Whether two dicts of tensors hold the same names and exactly the same numbers."""
    return left.keys() == right.keys() and all(bool((left[key] == right[key]).all()) for key in left)


def base_weights(model, trained):
    """The base model's own weights for every key of `trained` that is an attention projection."""
    base = loaded_pipeline(model).unet.state_dict()
    keys = [key for key in trained if "processor" in key]
    return {key: base[key.replace("processor.", "").replace("_custom_diffusion", "")] for key in keys}


def distance(left, right):
    """Euclidean distance over all tensors of two dicts."""
    assert left.keys() == right.keys()
    return sum(float((left[key].double() - right[key].double()).square().sum()) for key in left) ** 0.5


def beginning(model, trained):
    """Where the numbers of `trained` started: the base model's projections, ktn's row, pll's for a second word."""
    table = loaded_pipeline(model).text_encoder.get_input_embeddings().weight.detach()
    words = sorted(key for key in trained if "processor" not in key)
    return base_weights(model, trained) | {word: table[row] for word, row in zip(words, (42170, 47629), strict=False)}


def movement(model, trained):
    """How far training moved."""
    return distance(trained, beginning(model, trained))


@functools.cache
def loaded_pipeline(model):
    """The base model as diffusers loads it, in float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fresh_pipeline(model):
    """A copy of the base model that a test may change."""
    return copy.deepcopy(loaded_pipeline(model))


def prediction(pipeline, prompt):
    """The UNet's output for a prompt and fixed noise."""
    import torch

    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    size = pipeline.unet.config.sample_size
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipeline.unet(noise, torch.tensor([400]), pipeline.text_encoder(ids)[0]).sample


# Tiny models with random weights


def make_model(folder, text, unet, scheduler):
    """Saves a Stable Diffusion of random weights, with CLIP's whole vocabulary and a VAE of factor 8."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4, 4, 8, 8],
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
    )
    text_config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=49408, **text
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=[32, 32],
        cross_attention_dim=32,
        norm_num_groups=8,
        **unet,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """Stable Diffusion 1.x in small: predicts the noise, one size of attention head."""
    from diffusers import PNDMScheduler

    unet = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 8,
    }
    scheduler = PNDMScheduler(skip_prk_steps=True, **BETAS)
    return make_model(tmp_path_factory.mktemp("models") / "sd1", {"hidden_act": "quick_gelu"}, unet, scheduler)


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    """Stable Diffusion 2.x in small: v-prediction, linear projections, a list of head dimensions."""
    from diffusers import DDIMScheduler

    unet = {
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
    }
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **BETAS)
    return make_model(tmp_path_factory.mktemp("models") / "sd2", {"hidden_act": "gelu"}, unet, scheduler)


# Pictures


def make_picture(seed, width=80, height=80):
    """A soft random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A user's working folder.

    my_cat, my_pot: instance pictures, beside files that are none. cats: a plain folder of class pictures.
    retrieved: class pictures as retrieve.py leaves them, with the three kinds of path that it may write.
    """
    folder = tmp_path_factory.mktemp("world")
    for name, count, seed in (("my_cat", 5, 100), ("my_pot", 3, 200), ("cats", 6, 300), ("retrieved/images", 6, 400)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            width = 120 if i == 1 else 80  # one that is not square
            make_picture(seed + i, width).save(folder / name / f"{i}.png")
    (folder / "my_cat" / "notes.txt").write_text("not a picture")
    (folder / "my_cat" / ".DS_Store").write_bytes(b"\0\1")
    (folder / "my_cat" / ".hidden.png").write_bytes(b"no picture either")
    images = folder / "retrieved" / "images"
    paths = [images / "0.png", images / "1.png", "retrieved/images/2.png", "retrieved/images/3.png"]
    paths += ["images/4.png", "images/5.png"]
    (folder / "retrieved" / "images.txt").write_text("".join(f"{path}\n" for path in paths))
    (folder / "retrieved" / "caption.txt").write_text("".join(f"a cat, number {i}\n" for i in range(6)))
    (folder / "concepts.json").write_text(
        json.dumps(
            [
                {
                    "instance_prompt": f"photo of a {word} {name}",
                    "class_prompt": name,
                    "instance_data_dir": str(folder / f"my_{name}"),
                    "class_data_dir": str(folder / f"generated_{name}"),
                }
                for word, name in (("<New1>", "cat"), ("<new2>", "pot"))
            ]
        )
    )
    return folder


@pytest.fixture(scope="session", autouse=True)
def accelerate_config(tmp_path_factory):
    """The guide's first command, in a home of its own so that no configuration of the user's is used."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("home"))
    process = run(LAUNCHERS["accelerate"][0], "config", "default")
    assert process.returncode == 0, process.stderr


# What many tests train


@pytest.fixture(scope="session")
def one_concept(sd1, world):
    """Flags of one concept and word."""
    return {
        "pretrained_model_name_or_path": sd1,
        "instance_data_dir": world / "my_cat",
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
    }


@pytest.fixture(scope="session")
def two_concepts(sd1, world):
    """Flags of two concepts and words, with prior preservation; their class pictures are yet to be generated."""
    return {
        "pretrained_model_name_or_path": sd1,
        "concepts_list": world / "concepts.json",
        "modifier_token": "<New1>+<new2>",
        "with_prior_preservation": True,
    }


def with_classes(concepts_list, folder_of, file):
    """Writes a concepts list with class folders of its own, folder_of(class prompt), to `file`, which it returns."""
    concepts = json.loads(concepts_list.read_text())
    for concept in concepts:
        concept["class_data_dir"] = str(folder_of(concept["class_prompt"]))
    file.write_text(json.dumps(concepts))
    return file


@pytest.fixture(scope="session")
def one_real_concept(one_concept, world):
    """One concept with a plain folder of real class pictures, of which four are used; mirrored at random."""
    return one_concept | {
        "class_data_dir": world / "cats",
        "class_prompt": "cat",
        "with_prior_preservation": True,
        "real_prior": True,
        "num_class_images": 4,
        "hflip": True,
    }


@pytest.fixture(scope="session")
def two_real_concepts(two_concepts, world, tmp_path_factory):
    """Two concepts that share real class pictures, of which four are used."""
    file = tmp_path_factory.mktemp("two") / "concepts.json"
    with_classes(two_concepts["concepts_list"], lambda name: world / "cats", file)
    return two_concepts | {"concepts_list": file, "real_prior": True, "num_class_images": 4}


# Runs that many tests look at


@pytest.fixture(scope="session")
def cat_flags(one_real_concept, world):
    """One concept with class pictures as retrieve.py leaves them: six steps."""
    return one_real_concept | {
        "class_data_dir": world / "retrieved",
        "real_prior": "True",
        "num_class_images": 5,
        "train_batch_size": 2,
        "max_train_steps": 6,
        "cwd": world,
    }


@pytest.fixture(scope="session")
def trained(cat_flags, tmp_path_factory):
    """The run with everything on: validation, checkpoints, tensorboard, worker processes."""
    return train(
        tmp_path_factory.mktemp("runs") / "trained",
        launcher="accelerate",
        report_to="tensorboard",
        hub_token=SECRET,
        validation_prompt="a <new1> cat in a bucket",
        validation_steps=3,
        checkpointing_steps=2,
        checkpoints_total_limit=2,
        dataloader_num_workers=2,
        scale_lr=True,
        learning_rate=2.5e-3,
        env=os.environ | SECRETS,
        **cat_flags,
    )


@pytest.fixture(scope="session")
def plain_flags(cat_flags):
    """The same training with nothing around it; the learning rate is the scaled one."""
    return cat_flags | {"learning_rate": 2.5e-3 * 2 * 2}


# The web that retrieve.py asks


@pytest.fixture
def web():
    """A web of pictures on loopback, for retrieve.py."""
    from web import Web

    server = Web()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def local(web):
    """Options that let retrieve.py reach the pictures and services on loopback, and no others."""
    return {
        "backend_url": web.url("/knn-service"),
        "openverse_url": web.url("/v1/images/"),
        "allow_private_hosts": True,
        "retries": 0,
    }
