"""Checkpoints of runs that were launched as a user does: which ones stay, resuming, and what is refused."""

import shutil

import pytest
from conftest import flags, load_trained, refusals_of, same_bits, train


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


def test_resume_by_name(trained, plain_flags, tmp_path):
    """With other worker processes and without validation: the same bits."""
    folder = copy_run(trained, tmp_path / "run", "checkpoint-4")
    train(folder, resume_from_checkpoint="checkpoint-4", **plain_flags)
    assert same_bits(load_trained(folder), load_trained(trained))


def test_resume_by_path(trained, plain_flags, tmp_path):
    """In another output folder, with validation and worker processes."""
    folder = tmp_path / "elsewhere"
    more = {"validation_prompt": "a <new1> cat", "num_validation_images": 1, "dataloader_num_workers": 2}
    train(folder, resume_from_checkpoint=trained / "checkpoint-4", **plain_flags | more)
    assert same_bits(load_trained(folder), load_trained(trained))


# What does not fit is refused. One notebook asks for all of it.


REFUSED = {
    "tokens": ({"modifier_token": "<cat1>", "instance_prompt": "photo of a <cat1> cat"}, ["<new1>", "<cat1>"]),
    "more tokens": (
        {"modifier_token": "<new1>+<b>", "instance_prompt": "<new1> and <b>"},
        ["<new1>+<b>", "with modifier_token <new1>,"],
    ),
    "freeze_model": ({"freeze_model": "crossattn"}, ["crossattn_kv", "this run has crossattn;"]),
    "resolution": ({"resolution": 72}, ["64", "72"]),
    "seed": ({"seed": 7}, ["seed 42", "7"]),
    "batch": ({"train_batch_size": 3}, ["train_batch_size 2", "3"]),
    "accumulation": ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps 1", "2"]),
    "no prior preservation": (
        {"with_prior_preservation": None, "real_prior": None},
        ["with_prior_preservation True", "False"],
    ),
    "another base model": ({"pretrained_model_name_or_path": "SD2"}, ["base"]),
    "no such checkpoint": ({"resume_from_checkpoint": "checkpoint-99"}, ["checkpoint-99", "checkpoint-4"]),
    "incomplete": ({"resume_from_checkpoint": "checkpoint-1"}, ["checkpoint-1", "damaged"]),
    "damaged": ({"resume_from_checkpoint": "checkpoint-3"}, ["checkpoint-3", "damaged"]),
}


@pytest.fixture(scope="module")
def refusals(trained, sd2, plain_flags, tmp_path_factory):
    """What each call of REFUSED answered, and what happened to the folder."""
    folder = copy_run(trained, tmp_path_factory.mktemp("refused"), "checkpoint-4")
    (folder / "checkpoint-1").mkdir()
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-3")
    for file in (folder / "checkpoint-3").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = sorted(folder.rglob("*"))
    calls = {}
    for name, (values, _) in REFUSED.items():
        values = {"output_dir": folder, "resolution": 64, "resume_from_checkpoint": "checkpoint-4"} | values
        values = plain_flags | {"report_to": "none"} | values
        if values["pretrained_model_name_or_path"] == "SD2":
            values["pretrained_model_name_or_path"] = sd2
        values.pop("cwd")
        calls[name] = flags(**values)
    return refusals_of(calls, cwd=plain_flags["cwd"]) | {
        "folder": "as it was" if sorted(folder.rglob("*")) == before else "changed"
    }


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, refusals):
    """One line that names the checkpoint and both values."""
    answer = refusals[case]
    assert answer.startswith("error: ") and "\n" not in answer
    assert "--resume_from_checkpoint" in answer
    assert all(words in answer for words in REFUSED[case][1]), answer


def test_refusing_changes_nothing(refusals):
    assert refusals["folder"] == "as it was"
