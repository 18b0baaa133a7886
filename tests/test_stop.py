"""--stop_when_learned: when it stops, on which losses, resumed, and in several processes."""

import shutil

import numpy as np
import pytest
import torch
from launching import fork
from reading import load_trained, same_bits

STOPPING = {"stop_when_learned": True, "checkpointing_steps": 10, "max_train_steps": 180}


def fixed_losses(folder):
    """The losses on fixed draws of a run's last checkpoint, one of every ten steps."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = torch.load(last / "training_state.pt", weights_only=True)
    assert len(state["fixed_losses"]) == int(last.name.split("-")[1]) / 10
    return np.array(state["fixed_losses"])


def is_flat(losses):
    """Whether the mean of five fell by less than 1 % of the whole fall in the last fifth of the steps."""
    if len(losses) < 10:
        return False
    before, now = losses[: len(losses) * 4 // 5][-5:].mean(), losses[-5:].mean()
    return before - now <= 0.01 * (losses[0] - now)


@pytest.fixture(scope="module")
def stopped(one_concept, tmp_path_factory):
    """A run that learns for 60 steps, and nothing from there on."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    fork(folder, **one_concept | STOPPING | {"max_train_steps": 60})
    return fork(folder, **one_concept | STOPPING, learning_rate=0, resume_from_checkpoint="latest")


def test_stops_where_the_loss_is_flat(stopped):
    """As soon as it is, with a result like that of any other run."""
    losses = fixed_losses(stopped)
    flat = [is_flat(losses[: count + 1]) for count in range(len(losses))]
    assert flat[-2:] == [True, True] and 11 < len(losses) < 18
    assert not any(first and second for first, second in zip(flat[:-2], flat[1:-1], strict=True))
    assert losses[-1] < losses[0]
    step = 10 * len(losses)
    assert same_bits(load_trained(stopped), load_trained(stopped / f"checkpoint-{step}"))
    said = stopped.with_suffix(".log").read_text()
    assert f"Learned after step {step}:" in said and "loads as trained (checked)" in said


def test_resumes_to_the_bit(stopped, one_concept, tmp_path):
    """A run that is resumed stops after the same step, with the same weights."""
    folder = tmp_path / "resumed"
    shutil.copytree(stopped / "checkpoint-70", folder / "checkpoint-70")
    fork(folder, **one_concept | STOPPING, learning_rate=0, resume_from_checkpoint="latest")
    assert (fixed_losses(folder) == fixed_losses(stopped)).all()
    assert same_bits(load_trained(folder), load_trained(stopped))


def test_draws_stay_the_same(one_concept, tmp_path):
    """A model that does not change has the same loss every time, and ends after 110 steps; so in two processes."""
    values = one_concept | STOPPING | {"learning_rate": 0}
    losses = fixed_losses(fork(tmp_path / "one", **values))
    assert len(losses) == 11
    assert len(set(losses)) == 1
    assert fixed_losses(fork(tmp_path / "two", processes=2, **values)) == pytest.approx(losses, rel=1e-5)
