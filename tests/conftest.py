"""What the tests share: an environment of their own, pictures and concepts, and runs that many tests look at.

Helpers are in launching.py (start the trainer), observers.py (watch it at work), reading.py (open what it left),
models.py and pictures.py. A launch costs seconds, so one trained run serves many tests.
"""

import gc
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# pytest-xdist's workers inherit the variable that hides the GPUs, so another one says which there were.
GPUS = os.environ.setdefault("GPUS_OF_THE_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ.update(
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    CUDA_VISIBLE_DEVICES="",  # equal bits are promised on a CPU; tests marked gpu see the GPUs
    OMP_NUM_THREADS="1",  # the models are so small that a second thread only costs
    TOKENIZERS_PARALLELISM="false",
)

# ruff: noqa: E402 (some of these read the environment)
pytest_plugins = ["models"]
pytest.register_assert_rewrite("launching", "reading")

from launching import LAUNCHERS, SECRET, SECRETS, run, train
from pictures import make_picture


def show_gpus(monkeypatch):
    """Undoes the hiding of GPUs, for this process and those that it starts."""
    if GPUS == "all":
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPUS)


def sees_gpu():
    """Whether there is a CUDA GPU, asked in a process of its own: torch keeps the first answer, here that of none."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        show_gpus(monkeypatch)
        return not run(sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())").returncode


def pytest_collection_modifyitems(items):
    """Skips the tests marked gpu where there is no GPU, and puts the one that takes minutes first.

    At the end, one process would wait for it.
    """
    items.sort(key=lambda item: item.name != "test_blocks")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or sees_gpu():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish():
    """Lets garbage collections pass over the million objects that the imports of the tests have made."""
    gc.freeze()


@pytest.fixture(autouse=True)
def gpus(request, monkeypatch):
    """Shows the GPUs to the processes that a test marked gpu starts; others see none."""
    if request.node.get_closest_marker("gpu"):
        show_gpus(monkeypatch)


# Pictures and concepts


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
        validation_prompt=["a <new1> cat in a bucket", "a pot"],
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
