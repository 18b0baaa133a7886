"""Checkpoints: which ones stay, what is refused, and that a stopped run ends with the bits of one that was not stopped.

Runs are stopped by kills, signals and a full disk. What is left is complete, and `latest` goes on from it.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from launching import (
    FAST,
    LAUNCHERS,
    ROOT,
    SCRIPT,
    UNPRIVILEGED,
    finish,
    flags,
    fork,
    in_one_process,
    refusals_of,
    run,
    start,
    train,
    wait_until,
)
from observers import (
    die_while_a_checkpoint_is_deleted,
    die_while_a_picture_is_written,
    hang_in_a_step,
    no_folder_can_be_renamed,
    no_locks,
    nothing_can_be_renamed,
    slow_disk,
    somebody_reads_a_file,
    take_long_in_a_step,
    too_large_for_the_machine,
)
from PIL import Image
from reading import WEIGHTS, load_trained, same_bits, training_state
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train_custom_diffusion import lock


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def copy_run(folder, target, *keep):
    """A run's folder as it was when only these checkpoints were there, and no result yet."""
    for name in keep:
        shutil.copytree(folder / name, target / name)
    return target


def test_limit_keeps_the_newest(trained):
    """Six steps, one every two, at most two."""
    assert checkpoints(trained) == ["checkpoint-4", "checkpoint-6"]


def test_resume_a_launched_run(trained, plain_flags, tmp_path):
    """With other worker processes and without validation: the same bits."""
    folder = copy_run(trained, tmp_path / "run", "checkpoint-4")
    train(folder, resume_from_checkpoint="checkpoint-4", **plain_flags)
    assert same_bits(load_trained(folder), load_trained(trained))


def touch_all(folder, seconds):
    """Gives every file of a folder the same time, as unpacking, checking out or downloading does."""
    for file in folder.rglob("*"):
        os.utime(file, (seconds, seconds))


def test_latest_is_the_last_step_whatever_the_files_times(undisturbed, six_steps, tmp_path):
    """10 comes after 9 and 2, and the limit keeps it, if all files have one time, or the last the oldest."""
    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-2", "checkpoint-4", "checkpoint-6")
    touch_all(folder, 1e9)
    touch_all(folder / "checkpoint-6", 9e8)
    longer = six_steps | {"max_train_steps": 10, "resume_from_checkpoint": "latest"}
    said = finish(start(folder, **longer), folder)
    assert f"Resuming from {folder / 'checkpoint-6'}, step 6" in said
    assert checkpoints(folder) == ["checkpoint-10", "checkpoint-8"]
    touch_all(folder / "checkpoint-10", 9e8)
    said = finish(start(folder, **longer), folder)
    assert f"Resuming from {folder / 'checkpoint-10'}, step 10" in said


def test_checkpoints_of_an_earlier_run_are_deleted_first(undisturbed, six_steps, tmp_path):
    """A new run in the same folder: its own checkpoints are the latest, although the earlier run got further."""
    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-4", "checkpoint-6")
    fork(folder, **six_steps | {"max_train_steps": 3, "checkpointing_steps": 1})
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-3"]
    said = finish(start(folder, resume_from_checkpoint="latest", **six_steps), folder)
    assert f"Resuming from {folder / 'checkpoint-3'}, step 3" in said
    assert same_bits(load_trained(folder), load_trained(undisturbed))


def test_latest_after_going_on_from_an_earlier_checkpoint(undisturbed, six_steps, tmp_path):
    """Who names a checkpoint starts a new branch there, and that is the latest."""
    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-2", "checkpoint-4", "checkpoint-6")
    values = six_steps | {"checkpoints_total_limit": None, "checkpointing_steps": 1}
    fork(folder, **values | {"resume_from_checkpoint": "checkpoint-2", "max_train_steps": 3})
    said = finish(start(folder, resume_from_checkpoint="latest", **values), folder)
    assert f"Resuming from {folder / 'checkpoint-3'}, step 3" in said


def test_checkpoint_that_cannot_be_deleted(undisturbed, six_steps, tmp_path):
    """As on NFS while somebody reads a file of it: a warning; it is no checkpoint any more, and goes when it can."""
    folder = tmp_path / "run"
    said = finish(start(folder, observer=somebody_reads_a_file, **six_steps), folder)
    assert f"warning: {folder / 'checkpoint-2'} could not be deleted (Directory not empty)" in said
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert os.listdir(folder / "checkpoint-2") == []
    assert same_bits(load_trained(folder), load_trained(undisturbed))
    (folder / ".unfinished-of-a-killed-run").mkdir()
    said = finish(start(folder, resume_from_checkpoint="latest", **six_steps), folder)
    assert f"Resuming from {folder / 'checkpoint-6'}, step 6" in said
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]
    assert [file.name for file in folder.glob(".*")] == [".lock"]


def test_folders_that_cannot_be_renamed(undisturbed, six_steps, tmp_path):
    """As in a bucket that is mounted as a disk: checkpoints are written and deleted, an earlier run's is replaced."""
    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-4")
    (folder / "checkpoint-4" / "of_an_earlier_run.safetensors").touch()
    said = finish(start(folder, observer=no_folder_can_be_renamed, **six_steps), folder)
    assert "warning" not in said and checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]
    assert sorted(os.listdir(folder / "checkpoint-4")) == sorted(os.listdir(undisturbed / "checkpoint-4"))
    assert same_bits(load_trained(folder), load_trained(undisturbed))


def test_files_that_cannot_be_renamed(six_steps, tmp_path):
    """The trial save says so before the first step."""
    children = start(tmp_path / "run", observer=nothing_can_be_renamed, **six_steps)
    said = finish(children, tmp_path / "run", status=1)
    assert said.splitlines()[-1].startswith(
        f"error: --output_dir {tmp_path / 'run'}: [Errno 1] Operation not permitted"
    )
    assert "a trial save failed" in said and "0/6" not in said


def test_checkpoint_that_the_user_keeps(undisturbed, six_steps, tmp_path):
    """A copy under another name is neither deleted nor the latest; its name goes on from it."""
    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-2")
    for name in ("checkpoint-2-best", "checkpoint-2 (copy)", "checkpoint-final"):
        shutil.copytree(undisturbed / "checkpoint-4", folder / name)
    values = six_steps | {"checkpoints_total_limit": 1}
    said = finish(start(folder, resume_from_checkpoint="latest", **values), folder)
    assert f"Resuming from {folder / 'checkpoint-2'}, step 2" in said
    kept = ["checkpoint-2 (copy)", "checkpoint-2-best", "checkpoint-6", "checkpoint-final"]
    assert checkpoints(folder) == kept
    said = finish(start(folder, resume_from_checkpoint="checkpoint-2-best", **values), folder)
    assert f"Resuming from {folder / 'checkpoint-2-best'}, step 4" in said and checkpoints(folder) == kept


def test_checkpoint_of_an_older_version(undisturbed, six_steps, tmp_path):
    """Its record lacks what later versions compare."""
    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-4")
    file = folder / "checkpoint-4" / "checkpoint.json"
    record = json.loads(file.read_text())
    del record["run"], record["settings"]["captions"], record["settings"]["base_model_fp16"]
    file.write_text(json.dumps(record))
    fork(folder, resume_from_checkpoint="latest", **six_steps)
    assert same_bits(load_trained(folder), load_trained(undisturbed))


def test_checkpoint_with_bin_alone(undisturbed, six_steps, tmp_path):
    """As --no_safe_serialization writes it, which the resumed run need not have."""
    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-4")
    for file in (folder / "checkpoint-4").glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    fork(folder, resume_from_checkpoint="latest", **six_steps)
    assert {file.suffix for file in (folder / "checkpoint-6").glob(f"{WEIGHTS}.*")} == {".safetensors"}
    assert same_bits(load_trained(folder), load_trained(undisturbed))


def test_documented_settings_are_those_that_are_compared(trained):
    """docs/outputs.md lists what must stay the same; words, seed, samples and pictures it names otherwise."""
    record = json.loads((trained / "checkpoint-4" / "checkpoint.json").read_text())["settings"]
    others = {"modifier_token", "initializer_token", "seed", "samples_per_step", "concepts", "captions"}
    page = (ROOT / "docs" / "outputs.md").read_text("utf-8")
    listed = page.split("must be the same")[1].split("Batch size")[0]
    named = set(re.findall(r"`--(\w+)`", listed))
    assert named == record.keys() - others - {"base_model_fp16"}


# What does not fit or is damaged is refused. One process calls main for all of it.


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def remove(file):
    file.unlink()


DAMAGES = {  # made to copies of checkpoint-4, in folders of other steps
    "checkpoint-11": ("training_state.pt", truncate),
    "checkpoint-12": ("training_state.pt", empty),
    "checkpoint-13": (f"{WEIGHTS}.safetensors", truncate),
    "checkpoint-14": (f"{WEIGHTS}.safetensors", empty),
    "checkpoint-15": ("<new1>.safetensors", empty),
}
REFUSED = {
    "tokens": ({"modifier_token": "<cat1>", "instance_prompt": "photo of a <cat1> cat"}, ["<new1>", "<cat1>"]),
    "freeze_model": ({"freeze_model": "crossattn"}, ["crossattn_kv", "crossattn"]),
    "initializer": ({"initializer_token": "cat"}, ["initializer_token", "ktn+pll+ucd", "cat"]),
    "resolution": ({"resolution": 72}, ["resolution", "64", "72"]),
    "seed": ({"seed": 7}, ["seed", "42", "7"]),
    "batch": ({"train_batch_size": 3}, ["samples_per_step", "2", "3"]),
    "augmentation": ({"noaug": True}, ["noaug"]),
    "mirroring": ({"hflip": None}, ["hflip"]),
    "crop": ({"center_crop": True}, ["center_crop"]),
    "prior loss": ({"prior_loss_weight": 0.5}, ["prior_loss_weight", "1.0", "0.5"]),
    "prompt": ({"instance_prompt": "a <new1> cat"}, ["photo of a <new1> cat", "'a <new1> cat'"]),
    "class pictures": ({"num_class_images": 3}, ["5", "3"]),
    "no prior preservation": ({"with_prior_preservation": None, "real_prior": None}, ["with_prior_preservation"]),
    "another base model": ({"pretrained_model_name_or_path": "SD2"}, ["base"]),
    "no such checkpoint": ({"resume_from_checkpoint": "checkpoint-99"}, ["checkpoint-99", "checkpoint-4"]),
    "incomplete": ({"resume_from_checkpoint": "checkpoint-1"}, ["checkpoint-1"]),
    **{
        f"{spoil.__name__} {file}": ({"resume_from_checkpoint": name}, [name])
        for name, (file, spoil) in DAMAGES.items()
    },
}


@pytest.fixture(scope="module")
def refusals(trained, sd2, plain_flags, tmp_path_factory):
    """How each call of REFUSED ended, and what happened to the folder."""
    folder = copy_run(trained, tmp_path_factory.mktemp("refused"), "checkpoint-4")
    (folder / "checkpoint-1").mkdir()
    for name, (file, spoil) in DAMAGES.items():
        shutil.copytree(folder / "checkpoint-4", folder / name)
        spoil(folder / name / file)
    before = sorted(folder.rglob("*"))
    calls = {}
    for name, (changed, _) in REFUSED.items():
        values = FAST | plain_flags | {"output_dir": folder, "resume_from_checkpoint": "checkpoint-4"} | changed
        if values["pretrained_model_name_or_path"] == "SD2":
            values["pretrained_model_name_or_path"] = sd2
        cwd = values.pop("cwd")
        calls[name] = flags(**values)
    return refusals_of(calls, cwd), sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, refusals):
    """One line that names the checkpoint and what does not fit."""
    answer = refusals[0][case]
    assert answer.startswith("error: ") and "\n" not in answer and "--resume_from_checkpoint" in answer
    assert [word for word in REFUSED[case][1] if word not in answer] == [], answer


def test_refusing_changes_nothing(refusals):
    assert refusals[1]


# Resuming is exact: weights, optimizer, schedule, trackers


STEPS = 8  # epochs are 5 draws long


@pytest.fixture(scope="module")
def every_step(one_real_concept):
    """One concept, prior preservation, augmentation, warm-up and a cosine schedule, a checkpoint after every step."""
    return one_real_concept | {
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 3,
        "max_train_steps": STEPS,
        "checkpointing_steps": 1,
        "report_to": "tensorboard",
    }


WAYS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "two processes": {"processes": 2, "train_batch_size": 2},
    "two processes, accumulation": {"processes": 2, "gradient_accumulation_steps": 2},
    "crossattn": {"freeze_model": "crossattn", "modifier_token": None, "max_grad_norm": 0.1},
}
AROUND = {"dataloader_num_workers": 2, "validation_prompt": "a cat", "validation_steps": 2}
AROUND["num_validation_images"] = 1
STOPS = {  # way: steps after which it is stopped; among them an epoch's end, and before and after it
    "plain": [1, 4, 5, 6],
    "accumulation": [2, 5],
    "two processes": [2],
    "two processes, accumulation": [4],
    "crossattn": [5],
}


@pytest.fixture(scope="module")
def uninterrupted(every_step, tmp_path_factory):
    """Uninterrupted runs by their way, made when asked for."""
    runs = {}

    def get(way):
        if way not in runs:
            runs[way] = fork(tmp_path_factory.mktemp("runs") / "run", **every_step | WAYS[way])
        return runs[way]

    return get


def same_state(left, right):
    """Whether two nested states hold the same numbers, bit by bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[key], right[key]) for key in left)
    return torch.equal(left, right) if torch.is_tensor(left) else left == right


def logged(folder):
    """What tensorboard's files hold: {tag: {step: value}}; every step must be there once."""
    found = {}
    for file in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                assert event.step not in found.setdefault(tag, {}), "logged twice"
                found[tag][event.step] = event.value
    return found


def check_equal(folder, expected):
    """Result, and the last checkpoint with its optimizer state."""
    assert same_bits(load_trained(folder), load_trained(expected))
    last = f"checkpoint-{STEPS}"
    assert same_bits(load_trained(folder / last), load_trained(expected / last))
    states = training_state(folder / last), training_state(expected / last)
    assert states[0]["optimizer"] and same_state(*states)


@pytest.mark.slow
@pytest.mark.parametrize("way, stop", [(way, stop) for way in STOPS for stop in STOPS[way]])
def test_resume_is_exact(way, stop, uninterrupted, every_step, tmp_path):
    """With and without worker processes and validation around the resumed part."""
    expected = uninterrupted(way)
    folder = copy_run(expected, tmp_path / "run", f"checkpoint-{stop}")
    around = AROUND if stop % 2 and way == "plain" else {}
    fork(folder, **every_step | WAYS[way] | around, resume_from_checkpoint="latest")
    check_equal(folder, expected)
    before, after = logged(expected), logged(folder)
    assert after.keys() == before.keys() == {"loss", "lr"}
    for tag in after:
        assert after[tag] == {step: value for step, value in before[tag].items() if step > stop}


@pytest.mark.slow
def test_schedule_as_a_formula(uninterrupted):
    """Warm-up over 3 optimizer steps, then half a cosine, whatever the accumulation and the processes."""
    for way in ("plain", "accumulation", "two processes, accumulation"):
        rates = [
            step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / (STEPS - 3))) / 2 for step in range(STEPS)
        ]
        assert list(logged(uninterrupted(way))["lr"].values()) == pytest.approx([1e-2 * r for r in rates], rel=1e-5)


@pytest.mark.slow
def test_resume_by_name_and_path(uninterrupted, every_step, tmp_path):
    """A name in output_dir, and a path elsewhere."""
    expected = uninterrupted("plain")
    folder = copy_run(expected, tmp_path / "run", "checkpoint-2", "checkpoint-5")
    fork(folder, **every_step, resume_from_checkpoint="checkpoint-2")
    assert "step 2" in (tmp_path / "run.log").read_text()
    check_equal(folder, expected)
    fork(tmp_path / "other", **every_step, resume_from_checkpoint=expected / "checkpoint-5")
    check_equal(tmp_path / "other", expected)


@pytest.mark.slow
def test_more_steps_than_planned(every_step, tmp_path):
    """--max_train_steps may be raised: with a constant learning rate, as if it had been so from the start."""
    constant = every_step | {"lr_scheduler": "constant", "max_train_steps": STEPS}
    expected = fork(tmp_path / "expected", **constant)
    folder = fork(tmp_path / "run", **constant | {"max_train_steps": 3})
    fork(folder, **constant, resume_from_checkpoint="latest")
    check_equal(folder, expected)


@pytest.mark.slow
def test_learning_rate_is_the_command_lines(uninterrupted, every_step, tmp_path):
    """What is given on resuming applies: learning rate and schedule are not taken from the checkpoint."""
    folder = copy_run(uninterrupted("plain"), tmp_path / "run", "checkpoint-4")
    fork(folder, **every_step | {"learning_rate": 5e-4, "lr_scheduler": "constant"}, resume_from_checkpoint="latest")
    assert list(logged(folder)["lr"].values()) == pytest.approx([5e-4] * 4)


@pytest.mark.slow
def test_nothing_left_to_do(uninterrupted, every_step, tmp_path):
    """A run that stopped after its last step only has to write its result."""
    folder = copy_run(uninterrupted("plain"), tmp_path / "run", f"checkpoint-{STEPS}")
    fork(folder, **every_step, resume_from_checkpoint="latest")
    check_equal(folder, uninterrupted("plain"))


# Killed


@pytest.fixture(scope="module")
def six_steps(one_concept):
    """One concept, six steps, a checkpoint every second one, two of them kept."""
    return one_concept | {
        "learning_rate": 1e-2,
        "max_train_steps": 6,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
    }


@pytest.fixture(scope="module")
def undisturbed(six_steps, tmp_path_factory):
    """The same run with all of its checkpoints, and nothing happening to it."""
    return fork(tmp_path_factory.mktemp("runs") / "run", **six_steps | {"checkpoints_total_limit": None})


def check_complete(folder, expected):
    """Every folder with a checkpoint's name has all files, and the weights and state of the undisturbed run."""
    for name in checkpoints(folder):
        files = {file.name for file in (expected / name).iterdir()}
        assert {file.name for file in (folder / name).iterdir()} == files
        for file in files - {"checkpoint.json"}:
            assert (folder / name / file).read_bytes() == (expected / name / file).read_bytes(), (name, file)


def kill_after(changes, child, folder):
    """Kills a process once the names in a folder have changed so many times; returns whether it was still running."""
    names = None
    while child.is_alive() and changes:
        found = [place for place in os.walk(folder)]
        changes -= found != names and names is not None
        names = found
        time.sleep(0.001)
    running = child.is_alive()
    child.kill()
    child.join()
    return running


@pytest.mark.slow
def test_killed_at_many_points(six_steps, undisturbed, tmp_path):
    """One run on a slow disk, killed again and again, a little later each time, and resumed with `latest`."""
    folder, resumed, unfinished = tmp_path / "run", [], 0
    for changes in range(1, 60, 3):
        (child,) = start(folder, observer=slow_disk, resume_from_checkpoint="latest", **six_steps)
        if not kill_after(changes, child, folder):
            break
        check_complete(folder, undisturbed)
        resumed.append(max((int(name[11:]) for name in checkpoints(folder)), default=0))
        unfinished += any(not re.fullmatch(r"checkpoint-\d+", path.name) for path in folder.iterdir())
    said = (tmp_path / "run.log").read_text()
    assert "Traceback" not in said, said
    assert len(set(resumed)) >= 3 and resumed == sorted(resumed) and unfinished > 3, f"where the kills hit: {resumed}"
    fork(folder, resume_from_checkpoint="latest", **six_steps)
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]
    assert [file.name for file in folder.glob(".*")] == [".lock"], "what the kills left is gone"
    check_complete(folder, undisturbed)
    assert same_bits(load_trained(folder), load_trained(undisturbed))


@pytest.mark.slow
def test_killed_before_the_oldest_is_deleted(six_steps, undisturbed, tmp_path):
    """After the last checkpoint: the run that goes on writes none, and keeps no more than it was told to."""
    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-2", "checkpoint-4", "checkpoint-6")
    fork(folder, resume_from_checkpoint="latest", **six_steps)
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.slow
def test_killed_while_the_oldest_is_deleted(six_steps, undisturbed, tmp_path):
    """What is left of it has no checkpoint's name, and the run that goes on clears it away."""
    folder = tmp_path / "run"
    finish(start(folder, observer=die_while_a_checkpoint_is_deleted, **six_steps), folder, status=9)
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]
    check_complete(folder, undisturbed)
    fork(folder, resume_from_checkpoint="latest", **six_steps)
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]
    assert [file.name for file in folder.glob(".*")] == [".lock"]


@pytest.mark.slow
def test_killed_while_the_result_is_written(six_steps, undisturbed, tmp_path):
    folder = tmp_path / "run"
    (child,) = start(folder, observer=slow_disk, **six_steps)
    wait_until(lambda: (folder / f"{WEIGHTS}.bin").exists() or not child.is_alive())
    child.kill()
    child.join()
    assert not (folder / "<new1>.safetensors").exists(), "it was killed in time"
    fork(folder, resume_from_checkpoint="latest", **six_steps)
    assert same_bits(load_trained(folder), load_trained(undisturbed))


@pytest.mark.slow
def test_killed_while_a_picture_is_written(six_steps, tmp_path):
    """Just after a checkpoint: the run that goes on does not draw it again, and makes its sheets without it."""
    values = six_steps | {"validation_prompt": "a <new1> cat", "validation_steps": 2}
    folder = tmp_path / "run"
    finish(start(folder, observer=die_while_a_picture_is_written, **values), folder, status=9)
    assert checkpoints(folder) == ["checkpoint-2"]
    fork(folder, **values, resume_from_checkpoint="latest")
    assert Image.open(folder / "steps.png").size == (3 * 64, 16 + 2 * (16 + 64))  # before, 4 and 6


@pytest.mark.slow
def test_newest_is_what_was_written_last(six_steps, undisturbed, tmp_path):
    """A fresh run in a folder with checkpoints of a longer, earlier one: its own stay, and are the latest."""
    folder = tmp_path / "run"
    for old, name in (("checkpoint-4", "checkpoint-40"), ("checkpoint-6", "checkpoint-60")):
        shutil.copytree(undisturbed / old, folder / name)
    fork(folder, **six_steps | {"max_train_steps": 2})
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-60"]
    fork(folder, resume_from_checkpoint="latest", **six_steps)
    assert "step 2" in (tmp_path / "run.log").read_text()
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]
    assert same_bits(load_trained(folder), load_trained(undisturbed))


# Damaged


@pytest.mark.slow
def test_latest_is_damaged(six_steps, undisturbed, tmp_path):
    """The run neither starts again nor from an older one in silence: it ends with one line that names the newest."""
    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-2", "checkpoint-4")
    empty(folder / "checkpoint-4" / "training_state.pt")
    said = finish(start(folder, resume_from_checkpoint="latest", **six_steps), folder, status=1)
    (line,) = said.splitlines()
    assert line.startswith("error: --resume_from_checkpoint") and "checkpoint-4" in line and "corrupt" in line
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_pickle_is_not_trusted(six_steps, undisturbed, tmp_path):
    """Code in a checkpoint does not run."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    folder = copy_run(undisturbed, tmp_path / "run", "checkpoint-2")
    torch.save({"optimizer": Trap()}, folder / "checkpoint-2" / "training_state.pt")
    said = finish(start(folder, resume_from_checkpoint="checkpoint-2", **six_steps), folder, status=1)
    assert not (tmp_path / "trap").exists() and "error: " in said.splitlines()[-1]


# Stopped by signals


LONG = {"max_train_steps": 150, "checkpointing_steps": 1000, "checkpoints_total_limit": None}
UNDER_WAY = re.compile(r" [1-9]\d*/150 ")  # in the progress bar


@pytest.fixture(scope="module")
def undisturbed_long(six_steps, tmp_path_factory):
    return fork(tmp_path_factory.mktemp("runs") / "run", **six_steps | LONG)


def check_stopped(folder, said):
    """One checkpoint, of the step that was said, and how to go on."""
    step = int(re.search(r"Stopped after step (\d+); .*--resume_from_checkpoint latest", said).group(1))
    assert 0 < step < LONG["max_train_steps"]
    assert checkpoints(folder) == [f"checkpoint-{step}"]
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal(name, six_steps, undisturbed_long, tmp_path):
    """To the whole process group, as Ctrl-C, job schedulers and closed terminals send it, with workers in it."""
    folder, number = tmp_path / "run", getattr(signal, name)
    (child,) = start(folder, **six_steps | LONG | {"dataloader_num_workers": 2})
    wait_until(lambda: UNDER_WAY.search((tmp_path / "run.log").read_text()))
    os.killpg(child.pid, number)
    check_stopped(folder, finish([child], folder, status=128 + number))
    fork(folder, resume_from_checkpoint="latest", **six_steps | LONG)
    assert same_bits(load_trained(folder), load_trained(undisturbed_long))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_other_signals(name, six_steps, tmp_path):
    """Of terminals that close and of schedulers that warn."""
    folder, number = tmp_path / "run", getattr(signal, name)
    (child,) = start(folder, **six_steps | LONG)
    wait_until(lambda: UNDER_WAY.search((tmp_path / "run.log").read_text()))
    os.kill(child.pid, number)
    check_stopped(folder, finish([child], folder, status=128 + number))


@pytest.mark.slow
def test_signal_in_a_long_step(six_steps, tmp_path):
    """The processes that load pictures live on until the step is done and its checkpoint written."""
    folder = tmp_path / "run"
    (child,) = start(folder, observer=take_long_in_a_step, **six_steps | LONG | {"dataloader_num_workers": 2})
    wait_until((tmp_path / "run.long").exists)
    os.killpg(child.pid, signal.SIGTERM)
    check_stopped(folder, finish([child], folder, status=143))
    assert checkpoints(folder) == ["checkpoint-3"]


@pytest.mark.slow
def test_nohup(six_steps, tmp_path):
    """A closed terminal does not stop what was started with nohup."""
    words = flags(**FAST | six_steps | {"output_dir": tmp_path / "run", "max_train_steps": 40})
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(["nohup", sys.executable, SCRIPT, *words], stdout=log, stderr=log)
    wait_until(lambda: re.search(r" [1-9]\d*/40 ", (tmp_path / "log.txt").read_text()))
    process.send_signal(signal.SIGHUP)
    assert process.wait(300) == 0
    assert (tmp_path / "run" / "<new1>.bin").is_file()


@pytest.mark.slow
def test_signal_to_one_of_two_processes(six_steps, tmp_path):
    """Both stop after the same step."""
    folder = tmp_path / "run"
    children = start(folder, processes=2, **six_steps | LONG)
    wait_until(lambda: UNDER_WAY.search((tmp_path / "run.log0").read_text()))
    os.kill(children[1].pid, signal.SIGTERM)
    check_stopped(folder, finish(children, folder, status=143))
    assert not (tmp_path / "run.log1").read_text()


@pytest.mark.slow
def test_signal_to_torchrun(six_steps, tmp_path):
    """torchrun hands the signal on and waits."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    words = [*LAUNCHERS["torchrun"], SCRIPT, *flags(**FAST | six_steps | LONG | {"output_dir": folder})]
    with open(log, "w") as stream:
        process = subprocess.Popen([str(word) for word in words], stdout=stream, stderr=stream)
    wait_until(lambda: UNDER_WAY.search(log.read_text()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) != 0
    step = re.search(r"Stopped after step (\d+)", log.read_text()).group(1)
    assert checkpoints(folder) == [f"checkpoint-{step}"]


@pytest.mark.slow
def test_second_signal_ends_at_once(six_steps, tmp_path):
    """For those who do not want to wait for the step."""
    folder = tmp_path / "run"
    (child,) = start(folder, observer=hang_in_a_step, **six_steps | LONG)
    wait_until(lambda: "0/150" in (tmp_path / "run.log").read_text())
    time.sleep(1)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(1)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGTERM)
    child.join(10)
    assert child.exitcode == -signal.SIGTERM


# Numbers that are not finite


def test_loss_that_is_not_finite(six_steps, tmp_path):
    """The run stops, and neither the checkpoint of that step nor the result is written, nor a good one deleted."""
    values = six_steps | {"checkpointing_steps": 1, "checkpoints_total_limit": None}
    folder = fork(tmp_path / "run", **values | {"max_train_steps": 3})
    good = {file: file.read_bytes() for file in folder.rglob("*.safetensors")}
    said = finish(start(folder, **values | {"learning_rate": 1e18, "max_train_steps": 12}), folder, status=1)
    step = int(re.search(r"error: step (\d+): the loss is (nan|inf)|not finite", said.splitlines()[-1])[1] or 1)
    assert step <= 3 and "Traceback" not in said
    for file, content in good.items():
        values = load_file(file).values()
        assert file.read_bytes() == content or all(value.isfinite().all() for value in values if len(value))


@pytest.mark.parametrize("part", ["conv_in", "to_k"])
def test_base_model_that_is_not_finite(part, sd1, six_steps, tmp_path):
    """A model whose download or conversion went wrong."""
    model = shutil.copytree(sd1, tmp_path / "model")
    (file,) = (model / "unet").glob("*.safetensors")
    state = load_file(file)
    next(value for key, value in state.items() if part in key and "attn1" not in key).view(-1)[0] = math.nan
    save_file(state, file)
    folder = tmp_path / "run"
    said = finish(start(folder, **six_steps | {"pretrained_model_name_or_path": model}), folder, status=1)
    expected = {"conv_in": "error: step 1: the loss is nan; .*model", "to_k": "error: .*not finite; .*model"}
    assert re.match(expected[part], said.splitlines()[-1]) and not list(folder.glob("*.bin"))


# Memory


@pytest.mark.parametrize("shown", [False, True])
def test_computer_without_memory(shown, six_steps, tmp_path):
    """What torch says on a CPU becomes one line as well, and its traceback is shown on demand."""
    folder, env = tmp_path / "run", {"CUSTOM_DIFFUSION_TRACEBACK": "1"} if shown else {}
    said = finish(start(folder, observer=too_large_for_the_machine, env=env, **six_steps), folder, status=1)
    assert said.splitlines()[-1].startswith("error: out of memory: --gradient_checkpointing")
    assert ("DefaultCPUAllocator" in said and "Traceback" in said) == shown


# Two runs in one folder


REFUSALS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO, errno.EACCES]


@pytest.mark.parametrize("number", REFUSALS)
def test_lock_that_a_disk_refuses(number, monkeypatch, capsys, tmp_path):
    """Each of these errors costs a line, and is not taken for another run."""

    def refuse(stream, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock(tmp_path / ".lock")
    said = capsys.readouterr().out
    assert re.fullmatch(rf".*/\.lock can't be locked \(.*{os.strerror(number)}\): take care .*\n", said)


def test_disk_without_locks(one_concept, tmp_path):
    """The training takes place."""
    said = finish(start(tmp_path / "run", observer=no_locks, max_train_steps=1, **one_concept), tmp_path / "run")
    assert said.count("can't be locked") == 1 and "loads as trained (checked)" in said


@pytest.mark.skipif(UNPRIVILEGED and not shutil.which("setpriv"), reason="the root user may read everything")
def test_lock_of_another_user(tmp_path):
    """One that may be read is a lock as any other; one that may not be costs a line."""
    for name, mode in (("readable", 0o444), ("unreadable", 0), ("taken", 0o444)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, "{ROOT}")
from train_custom_diffusion import lock
for name in ("readable", "unreadable", "taken"):
    try:
        lock(Path("{tmp_path}", name))
        print(name, "goes on")
    except BlockingIOError:
        print(name, "is another run's")
"""
    with open(tmp_path / "taken") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        process = run(*UNPRIVILEGED, sys.executable, "-c", code)
    lines = process.stdout.splitlines()
    assert [lines[0], *lines[2:]] == ["readable goes on", "unreadable goes on", "taken is another run's"], (
        process.stderr
    )
    assert "unreadable can't be locked ([Errno 13] Permission denied" in lines[1]


def test_second_run_in_a_folder_is_told(six_steps, tmp_path):
    """While the first is at work; afterwards the folder is free."""
    folder = tmp_path / "run"
    (child,) = start(folder, observer=hang_in_a_step, **six_steps)
    wait_until(lambda: "0/6" in (tmp_path / "run.log").read_text())
    (tmp_path / "run.log0").touch()
    (second,) = start(folder, env={"RANK": "0"}, **six_steps | {"seed": 7})
    second.join(300)
    line = (tmp_path / "run.log0").read_text().splitlines()[-1]
    assert second.exitcode == 1 and line.startswith(f"error: --output_dir {folder}: ") and "another run" in line
    assert child.is_alive() and "--seed=42\n" in (folder / "flags.txt").read_text()
    child.kill()
    child.join()
    fork(folder, **six_steps)


def test_run_after_one_that_failed_in_a_notebook(six_steps, tmp_path):
    """A notebook keeps what a failed call was working on, and so its lock."""
    words = flags(**FAST | six_steps | {"output_dir": tmp_path / "run"})
    calls = {"failed": (tmp_path, [*words, "--learning_rate=1e18"]), "next": (tmp_path, words)}
    ended = {name: answer["ended"] for name, answer in in_one_process(calls).items()}
    assert "--learning_rate" in ended["failed"] and ended["next"] == "went on"


# Full disk


@pytest.mark.slow
def test_full_disk(six_steps, undisturbed, tmp_path):
    """A small file system of its own: one line, and the checkpoint before is intact and resumable."""
    if run("unshare", "-Urm", "true").returncode:
        pytest.skip("no user namespaces here, so no small file system")
    size = sum(file.stat().st_size for file in (undisturbed / "checkpoint-2").iterdir())
    mount, kept = tmp_path / "mount", tmp_path / "kept"
    mount.mkdir()
    words = flags(**FAST | six_steps | {"output_dir": mount / "run", "checkpoints_total_limit": None})
    commands = f"mount -t tmpfs -o size={round(1.7 * size)} tmpfs {mount}"
    commands += f' && "$@"; status=$?; cp -a {mount}/run {kept}; exit $status'
    process = run("unshare", "-Urm", "bash", "-c", commands, "bash", sys.executable, SCRIPT, *words)
    line = process.stderr.splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert "No space left on device" in line and "--resume_from_checkpoint latest" in line
    assert checkpoints(kept) == ["checkpoint-2"] and [file.name for file in kept.glob(".*")] == [".lock"]
    assert not list(kept.rglob("*.unfinished"))
    check_complete(kept, undisturbed)
    fork(kept, resume_from_checkpoint="latest", **six_steps)
    assert same_bits(load_trained(kept), load_trained(undisturbed))
