"""A run that was stopped and resumed ends with the bits of one that was not: weights, optimizer, schedule, trackers."""

import shutil

import pytest
import torch
from conftest import fork, load_trained, same_bits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

STEPS = 8  # epochs are 5 draws long


@pytest.fixture(scope="module")
def common(one_real_concept):
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
AROUND = {"dataloader_num_workers": 2, "validation_prompt": "a <new1> cat", "validation_steps": 2}
STOPS = {  # way: steps after which it is stopped; among them an epoch's end, and before and after it
    "plain": [1, 3, 4, 5, 6, 7],
    "accumulation": [1, 2, 5],
    "two processes": [2, 5],
    "two processes, accumulation": [1, 4],
    "crossattn": [5],
}


@pytest.fixture(scope="module")
def undisturbed(common, tmp_path_factory):
    """Uninterrupted runs by their way, made when asked for."""
    runs = {}

    def get(way):
        if way not in runs:
            runs[way] = fork(tmp_path_factory.mktemp("runs") / "run", **common | WAYS[way])
        return runs[way]

    return get


def training_state(folder):
    return torch.load(folder / "training_state.pt", weights_only=True)


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
    """Result, last checkpoint with its optimizer state, and what was logged."""
    assert same_bits(load_trained(folder), load_trained(expected))
    last = f"checkpoint-{STEPS}"
    assert same_bits(load_trained(folder / last), load_trained(expected / last))
    states = training_state(folder / last), training_state(expected / last)
    assert same_state(*states)
    assert states[0]["optimizer"] and states[0]["lr_scheduler"] == STEPS


@pytest.mark.parametrize("way, stop", [(way, stop) for way in STOPS for stop in STOPS[way]])
def test_resume_is_exact(way, stop, undisturbed, common, tmp_path):
    """With and without worker processes and validation around the resumed part."""
    expected, folder = undisturbed(way), tmp_path / "run"
    shutil.copytree(expected / f"checkpoint-{stop}", folder / f"checkpoint-{stop}")
    around = AROUND if stop % 2 and way == "plain" else {}
    fork(folder, **common | WAYS[way] | around, resume_from_checkpoint="latest")
    check_equal(folder, expected)
    before, after = logged(expected), logged(folder)
    assert after.keys() == before.keys() == {"loss", "lr"}
    for tag in after:
        assert after[tag] == {step: value for step, value in before[tag].items() if step > stop}


def test_schedule_as_a_formula(undisturbed):
    """Warm-up over 3 optimizer steps, then half a cosine, whatever the accumulation and the processes."""
    import math

    for way in ("plain", "accumulation", "two processes, accumulation"):
        rates = [
            step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / (STEPS - 3))) / 2 for step in range(STEPS)
        ]
        assert list(logged(undisturbed(way))["lr"].values()) == pytest.approx([1e-2 * rate for rate in rates], rel=1e-5)


def test_resume_by_name_and_path(undisturbed, common, tmp_path):
    """A name in output_dir, and a path elsewhere."""
    expected, folder = undisturbed("plain"), tmp_path / "run"
    for step in (2, 5):
        shutil.copytree(expected / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    fork(folder, **common, resume_from_checkpoint="checkpoint-2")
    assert "step 2" in (tmp_path / "run.log").read_text()
    check_equal(folder, expected)
    fork(tmp_path / "other", **common, resume_from_checkpoint=expected / "checkpoint-5")
    check_equal(tmp_path / "other", expected)


def test_more_steps_than_planned(undisturbed, common, tmp_path):
    """--max_train_steps may be raised: with a constant learning rate, as if it had been so from the start."""
    constant = common | {"lr_scheduler": "constant", "max_train_steps": STEPS}
    expected = fork(tmp_path / "expected", **constant)
    folder = fork(tmp_path / "run", **constant | {"max_train_steps": 3})
    fork(folder, **constant, resume_from_checkpoint="latest")
    check_equal(folder, expected)


def test_learning_rate_is_the_command_lines(undisturbed, common, tmp_path):
    """What is given on resuming applies: learning rate and schedule are not taken from the checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("plain") / "checkpoint-4", folder / "checkpoint-4")
    fork(folder, **common | {"learning_rate": 5e-4, "lr_scheduler": "constant"}, resume_from_checkpoint="latest")
    assert list(logged(folder)["lr"].values()) == pytest.approx([5e-4] * 4)


def test_nothing_left_to_do(undisturbed, common, tmp_path):
    """A run that stopped after its last step only has to write its result."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("plain") / f"checkpoint-{STEPS}", folder / f"checkpoint-{STEPS}")
    fork(folder, **common, resume_from_checkpoint="latest")
    check_equal(folder, undisturbed("plain"))
