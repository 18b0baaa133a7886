"""Runs that are killed, stopped, short of disk or lied to: what is left is complete, and a resumed run ends as any."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import FAST, LAUNCHERS, SCRIPT, WEIGHTS, finish, flags, fork, load_trained, same_bits, start, wait_until
from PIL import Image

pytestmark = pytest.mark.slow

STEPS = 6
SLOW_DISK = """
import os, time
fsync, unlink = os.fsync, os.unlink
os.fsync = lambda descriptor: (time.sleep(0.03), fsync(descriptor))
os.unlink = lambda *file, **options: (time.sleep(0.03), unlink(*file, **options))
"""


@pytest.fixture(scope="module")
def common(one_concept):
    """One concept, a checkpoint every second step, two of them kept."""
    return one_concept | {
        "learning_rate": 1e-2,
        "max_train_steps": STEPS,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
    }


@pytest.fixture(scope="module")
def undisturbed(common, tmp_path_factory):
    """The same run with all of its checkpoints, and nothing happening to it."""
    return fork(tmp_path_factory.mktemp("runs") / "run", **common | {"checkpoints_total_limit": None})


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def check_complete(folder, expected):
    """Every folder with a checkpoint's name has all files, and the weights and state of the undisturbed run."""
    for name in checkpoints(folder):
        files = {file.name for file in (expected / name).iterdir()}
        assert {file.name for file in (folder / name).iterdir()} == files
        for file in files - {"checkpoint.json"}:
            assert (folder / name / file).read_bytes() == (expected / name / file).read_bytes(), (name, file)


# Killed


def unfinished_files(folder, step):
    """How many files the checkpoint that is being written has so far; None if none is being written."""
    return files_in(folder / f".unfinished-checkpoint-{step}")


def files_in(folder):
    """How many; None if there is no such folder."""
    try:
        return len(list(folder.iterdir()))
    except FileNotFoundError:
        return None


def half_deleted(folder, name):
    """Whether a checkpoint has lost some of its files, wherever it is by now."""
    return any(files_in(place) in range(1, 6) for place in (folder / name, folder / f".unfinished-deleted-{name}"))


KILLS = {
    "before the first checkpoint": lambda folder: folder.is_dir(),
    "a checkpoint has no file": lambda folder: unfinished_files(folder, 2) is not None,
    "a checkpoint has one file": lambda folder: unfinished_files(folder, 2) == 1,
    "a checkpoint has some files": lambda folder: unfinished_files(folder, 2) == 3,
    "a checkpoint has all but its record": lambda folder: unfinished_files(folder, 2) == 5,
    "the first is there": lambda folder: checkpoints(folder) == ["checkpoint-2"],
    "the second has two files": lambda folder: unfinished_files(folder, 4) == 2,
    "the second is there": lambda folder: "checkpoint-4" in checkpoints(folder),
    "the third has four files": lambda folder: unfinished_files(folder, 6) == 4,
    "the first is half deleted": lambda folder: half_deleted(folder, "checkpoint-2"),
    "the result is being written": lambda folder: (folder / f"{WEIGHTS}.bin").exists(),
}


def test_killed_at_many_points(common, undisturbed, tmp_path):
    """One run, killed again and again on a slow disk and resumed with `latest` each time."""
    folder, resumed = tmp_path / "run", []
    for name, reached in KILLS.items():
        (child,) = start(folder, prelude=SLOW_DISK, resume_from_checkpoint="latest", **common)
        wait_until(lambda child=child, reached=reached: reached(folder) or not child.is_alive())
        assert child.is_alive(), f"{name}: it ended before it was killed\n" + (tmp_path / "run.log").read_text()
        child.kill()
        child.join()
        check_complete(folder, undisturbed)
        resumed.append(max((int(name[11:]) for name in checkpoints(folder)), default=0))
    fork(folder, resume_from_checkpoint="latest", **common)
    assert {2, 4, 6} <= set(resumed) and resumed == sorted(resumed), "the kills hit what they were meant to hit"
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]
    assert not list(folder.glob(".*")), "what the kills left is gone"
    check_complete(folder, undisturbed)
    assert same_bits(load_trained(folder), load_trained(undisturbed))


def test_killed_at_random(common, undisturbed, tmp_path):
    """At any moment from the first second on."""
    rng, folder, kills = random.Random(0), tmp_path / "run", 0
    for _ in range(5):
        (child,) = start(folder, prelude=SLOW_DISK, resume_from_checkpoint="latest", **common)
        wait_until(folder.exists)
        child.join(rng.uniform(0, 1.5))
        kills += child.is_alive()
        child.kill()
        child.join()
        check_complete(folder, undisturbed)
    fork(folder, resume_from_checkpoint="latest", **common)
    assert kills
    assert same_bits(load_trained(folder), load_trained(undisturbed))


KILLED_WHILE_DRAWING = """
import io, os
from PIL import Image
save, count = Image.Image.save, iter((False, True)).__next__
def half(image, target, *args, **options):
    if not count():
        return save(image, target, *args, **options)
    content = io.BytesIO()
    save(image, content, "PNG")
    stream = target if hasattr(target, "write") else open(target, "wb")
    stream.write(content.getvalue()[:1000])
    stream.flush()
    os._exit(9)
Image.Image.save = half
"""


def test_killed_while_a_picture_is_written(common, tmp_path):
    """Just after a checkpoint: the run that goes on does not draw it again, and makes its sheets without it."""
    values = common | {"validation_prompt": "a <new1> cat", "validation_steps": 2}
    folder = tmp_path / "run"
    finish(start(folder, prelude=KILLED_WHILE_DRAWING, **values), folder, status=9)
    assert checkpoints(folder) == ["checkpoint-2"]
    fork(folder, **values, resume_from_checkpoint="latest")
    assert Image.open(folder / "steps.png").size == (3 * 64, 64 + 16)  # before, 4 and 6


def test_newest_is_what_was_written_last(common, undisturbed, tmp_path):
    """A fresh run in a folder with checkpoints of a longer, earlier one: its own stay, and are the latest."""
    folder = tmp_path / "run"
    for old, name in (("checkpoint-4", "checkpoint-40"), ("checkpoint-6", "checkpoint-60")):
        shutil.copytree(undisturbed / old, folder / name)
    fork(folder, **common | {"max_train_steps": 2})
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-60"]
    fork(folder, resume_from_checkpoint="latest", **common)
    assert "step 2" in (tmp_path / "run.log").read_text()
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]
    assert same_bits(load_trained(folder), load_trained(undisturbed))


# Damaged


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)


def flip_last(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


DAMAGES = {
    "truncated state": ("training_state.pt", truncate),
    "empty state": ("training_state.pt", empty),
    "empty weights": (f"{WEIGHTS}.safetensors", empty),
    "a bit of a safetensors header": (f"{WEIGHTS}.safetensors", flip),
    "a bit of a trained number": (f"{WEIGHTS}.safetensors", flip_last),
    "a bit of an embedding": ("<new1>.safetensors", flip_last),
    "no embedding": ("<new1>.safetensors", remove),
    "no record": ("checkpoint.json", remove),
    "empty record": ("checkpoint.json", empty),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage, common, undisturbed, tmp_path):
    """Refused by its name; `latest` names it and takes the one before."""
    file, spoil = DAMAGES[damage]
    folder = tmp_path / "run"
    for step in (2, 4):
        shutil.copytree(undisturbed / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    spoil(folder / "checkpoint-4" / file)
    said = finish(start(folder, resume_from_checkpoint="checkpoint-4", **common), folder, status=1)
    assert len(said.splitlines()) == 1 and "checkpoint-4" in said and "damaged" in said and file in said, said
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    fork(folder, resume_from_checkpoint="latest", **common)
    said = (tmp_path / "run.log").read_text()
    assert re.search(rf"Skipped \S*checkpoint-4.*{re.escape(file)}", said) and "checkpoint-2, step 2" in said
    assert same_bits(load_trained(folder), load_trained(undisturbed))


def test_all_damaged(common, undisturbed, tmp_path):
    """Not silently from the start."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoint-2", folder / "checkpoint-2")
    empty(folder / "checkpoint-2" / "training_state.pt")
    said = finish(start(folder, resume_from_checkpoint="latest", **common), folder, status=1)
    assert "all checkpoints" in said.splitlines()[-1]


def test_record_has_the_hashes(undisturbed):
    """checkpoint.json, against the files as they are."""
    record = json.loads((undisturbed / "checkpoint-4" / "checkpoint.json").read_text())
    files = {file for file in (undisturbed / "checkpoint-4").iterdir() if file.name != "checkpoint.json"}
    assert record["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert record["step"] == 4 and record["made_with"]["modifier_token"] == "<new1>"


def test_pickle_is_not_trusted(common, undisturbed, tmp_path):
    """A checkpoint with code in it, its hash in the record: the code does not run."""
    import torch

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    folder = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoint-2", folder / "checkpoint-2")
    state = folder / "checkpoint-2" / "training_state.pt"
    torch.save({"optimizer": Trap()}, state)
    record = json.loads((folder / "checkpoint-2" / "checkpoint.json").read_text())
    record["sha256"]["training_state.pt"] = hashlib.sha256(state.read_bytes()).hexdigest()
    (folder / "checkpoint-2" / "checkpoint.json").write_text(json.dumps(record))
    said = finish(start(folder, resume_from_checkpoint="checkpoint-2", **common), folder, status=1)
    assert not (tmp_path / "trap").exists() and "error: " in said.splitlines()[-1]


# Stopped by signals


LONG = {"max_train_steps": 150, "checkpointing_steps": 1000, "checkpoints_total_limit": None}
UNDER_WAY = re.compile(r" [1-9]\d*/150 ")  # in the progress bar


@pytest.fixture(scope="module")
def undisturbed_long(common, tmp_path_factory):
    return fork(tmp_path_factory.mktemp("runs") / "run", **common | LONG)


def check_stopped(folder, said):
    """One checkpoint, of the step that was said, and how to go on."""
    step = int(re.search(r"Stopped after step (\d+); .*--resume_from_checkpoint latest", said).group(1))
    assert 0 < step < LONG["max_train_steps"]
    assert checkpoints(folder) == [f"checkpoint-{step}"]
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal(name, common, undisturbed_long, tmp_path):
    """To the whole process group, as Ctrl-C and job schedulers send it, with worker processes in it."""
    folder, number = tmp_path / "run", getattr(signal, name)
    (child,) = start(folder, **common | LONG | {"dataloader_num_workers": 2})
    wait_until(lambda: UNDER_WAY.search((tmp_path / "run.log").read_text()))
    os.killpg(child.pid, number)
    check_stopped(folder, finish([child], folder, status=128 + number))
    fork(folder, resume_from_checkpoint="latest", **common | LONG)
    assert same_bits(load_trained(folder), load_trained(undisturbed_long))


def test_signal_to_one_of_two_processes(common, tmp_path):
    """Both stop after the same step."""
    folder = tmp_path / "run"
    children = start(folder, processes=2, **common | LONG)
    wait_until(lambda: UNDER_WAY.search((tmp_path / "run.log0").read_text()))
    os.kill(children[1].pid, signal.SIGTERM)
    check_stopped(folder, finish(children, folder, status=143))
    assert not (tmp_path / "run.log1").read_text()


def test_signal_to_torchrun(common, tmp_path):
    """torchrun hands the signal on and waits."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    values = FAST | common | LONG | {"output_dir": folder}
    with open(log, "w") as stream:
        process = subprocess.Popen(
            list(map(str, [*LAUNCHERS["torchrun"], SCRIPT, *flags(**values)])), stdout=stream, stderr=stream
        )
    wait_until(lambda: UNDER_WAY.search(log.read_text()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) != 0
    step = re.search(r"Stopped after step (\d+)", log.read_text()).group(1)
    assert checkpoints(folder) == [f"checkpoint-{step}"]


def test_second_signal_ends_at_once(common, tmp_path):
    """For those who do not want to wait for the step."""
    folder = tmp_path / "run"
    freeze = "import time, diffusers\nadd = diffusers.DDPMScheduler.add_noise\n"
    freeze += "def slow(*args): time.sleep(60)\ndiffusers.DDPMScheduler.add_noise = slow"
    (child,) = start(folder, prelude=freeze, **common | LONG)
    wait_until(lambda: "0/150" in (tmp_path / "run.log").read_text())
    time.sleep(1)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(1)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGTERM)
    child.join(10)
    assert child.exitcode == -signal.SIGTERM


# Full disk


def test_full_disk(common, undisturbed, tmp_path):
    """A small file system of its own: one line, and the checkpoint before is intact and resumable."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no small file system")
    size = sum(file.stat().st_size for file in (undisturbed / "checkpoint-2").iterdir())
    mount, kept = tmp_path / "mount", tmp_path / "kept"
    mount.mkdir()
    words = flags(**FAST | common | {"output_dir": mount / "run", "checkpoints_total_limit": None})
    commands = f"mount -t tmpfs -o size={round(1.7 * size)} tmpfs {mount}"
    commands += f' && "$@"; status=$?; cp -a {mount}/run {kept}; exit $status'
    call = ["unshare", "-Urm", "bash", "-c", commands, "bash", sys.executable, str(SCRIPT), *words]
    process = subprocess.run(call, capture_output=True, text=True)
    line = process.stderr.splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert "No space left on device" in line and "--resume_from_checkpoint latest" in line
    assert checkpoints(kept) == ["checkpoint-2"] and not list(kept.glob(".*"))
    check_complete(kept, undisturbed)
    fork(kept, resume_from_checkpoint="latest", **common)
    assert same_bits(load_trained(kept), load_trained(undisturbed))


# The save proves itself


SABOTAGE = """
import diffusers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
load = UNet2DConditionModel.load_attn_procs
file = folder / "pytorch_custom_diffusion_weights.safetensors"
def spoilt(unet, *args, **kwargs):
    {}
    return load(unet, *args, **kwargs)
UNet2DConditionModel.load_attn_procs = spoilt
"""
SABOTAGES = {
    "damaged file": SABOTAGE.format("file.write_bytes(file.read_bytes()[:-1000])"),
    "another number": SABOTAGE.format(
        "state = load_file(file); max(state.values(), key=len)[0, 0] += 1e-3; save_file(state, file)"
    ),
    "missing key": SABOTAGE.format(
        "state = load_file(file); state.pop(max(state, key=lambda key: len(state[key]))); save_file(state, file)"
    ),
    "missing layer": SABOTAGE.format(
        "state = load_file(file); layer = max(state, key=lambda key: len(state[key])).partition('.processor')[0];"
        "save_file({k: v for k, v in state.items() if not k.startswith(layer)}, file)"
    ),
    "loader without _pipeline": SABOTAGE.format("kwargs.pop('_pipeline')"),
    "loader that adds noise": SABOTAGE.format("unet.conv_in.weight.data += 0.1"),
    "embedding not loaded": "import diffusers\n"
    "def skip(pipeline, *args, **kwargs): pipeline.tokenizer.add_tokens('<new1>');"
    " pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))\n"
    "diffusers.StableDiffusionPipeline.load_textual_inversion = skip",
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_save_proves_itself(sabotage, common, undisturbed, tmp_path):
    """Fails with one line, without final pictures, and the trained numbers are still there."""
    folder = tmp_path / "run"
    values = common | {"validation_prompt": "a <new1> cat", "validation_steps": 100, "num_validation_images": 1}
    said = finish(start(folder, prelude=SABOTAGES[sabotage], **values), folder, status=1)
    assert said.splitlines()[-1].startswith("error: ") and "kept" in said.splitlines()[-1], said
    assert "Traceback" not in said and "checked" not in said
    assert not list(folder.glob("image_*.png"))
    assert (folder / f"{WEIGHTS}.bin").read_bytes() == (undisturbed / f"{WEIGHTS}.bin").read_bytes()
    assert (folder / "<new1>.bin").read_bytes() == (undisturbed / "<new1>.bin").read_bytes()
