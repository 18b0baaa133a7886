"""What a run prints, and what becomes of it if nobody can read it: it is worth less than the training."""

import os
import signal
import subprocess
import sys

import pytest
from launching import FAST, SCRIPT, flags, run, wait_until
from reading import load_trained, same_bits


@pytest.fixture(scope="module")
def words(one_concept):
    """A function that gives the flags of a run of 20 steps."""
    return lambda folder, **values: flags(
        **FAST | one_concept | {"max_train_steps": 20, "output_dir": folder, "report_to": "tensorboard"} | values
    )


@pytest.fixture(scope="module")
def heard(words, tmp_path_factory):
    """The weights of a run whose output is read."""
    folder = tmp_path_factory.mktemp("runs") / "heard"
    assert run(sys.executable, SCRIPT, *words(folder)).returncode == 0
    return load_trained(folder)


def test_reader_that_goes_away(words, heard, tmp_path):
    """As `| head`, a closed terminal or a `tee` without room: the run ends as if it were heard."""
    command = '"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}'
    process = run("bash", "-c", command, "bash", sys.executable, SCRIPT, *words(tmp_path / "run"))
    assert process.returncode == 0 and "Traceback" not in process.stdout
    assert same_bits(load_trained(tmp_path / "run"), heard)


def test_output_on_a_full_disk(words, heard, tmp_path):
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, SCRIPT, *words(tmp_path / "run")], stdout=full, stderr=full)
    assert process.returncode == 0 and same_bits(load_trained(tmp_path / "run"), heard)


def test_letters_that_a_terminal_lacks(words, tmp_path):
    """They are printed as escapes, by the error line, too."""
    values = {"modifier_token": "<猫>", "instance_prompt": "photo of a <猫> café cat", "max_train_steps": 1}
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    process = run(sys.executable, SCRIPT, *words(tmp_path / "run", **values), env=env, encoding="cp1252")
    assert process.returncode == 0, process.stderr
    assert r"photo of a <\u732b> caf" in process.stdout
    values["pretrained_model_name_or_path"] = "./猫"
    process = run(sys.executable, SCRIPT, *words(tmp_path / "gone", **values), env=env, encoding="cp1252")
    assert process.returncode == 1 and r"./\u732b: no such folder" in process.stderr


def test_disk_of_the_trackers_fills(words, tmp_path):
    """A warning, once, and the training goes on without them."""
    if run("unshare", "-Urm", "true").returncode:
        pytest.skip("no user namespaces here, so no small file system")
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    commands = f'mount -t tmpfs -o size=16k tmpfs {folder}/logs && exec "$@"'
    process = run(
        "unshare", "-Urm", "bash", "-c", commands, "bash",
        sys.executable, SCRIPT, *words(folder, max_train_steps=200, resolution=32),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stderr.count("warning: trackers left out from here: ") == 1  # amid what TensorBoard's thread prints
    assert "]warning" not in process.stderr, "in the progress bar's line"
    assert "loads as trained (checked)" in process.stdout and load_trained(folder)


def test_interrupted_outside_of_the_training(one_concept, tmp_path):
    """Ctrl-C while class pictures are drawn: one line, and those that are finished stay."""
    folder, classes = tmp_path / "run", tmp_path / "cats"
    values = {"class_data_dir": classes, "class_prompt": "cat", "with_prior_preservation": True}
    values |= {"num_class_images": 500, "sample_batch_size": 1, "max_train_steps": 1}
    command = [sys.executable, SCRIPT, *flags(**FAST | one_concept | values | {"output_dir": folder})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: len(list(classes.glob("*.png"))) > 1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("Stopped by Ctrl-C; ")
    assert not list(classes.glob(".*"))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_unbuffered_output(unbuffered, tmp_path):
    """With PYTHONUNBUFFERED, as containers set it, what is printed is there at once, even if the process is killed."""
    code = "import os, train_custom_diffusion as t; t.keep_output_harmless(); print('here'); os._exit(0)"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "PYTHONUNBUFFERED": unbuffered}
    process = run(sys.executable, "-c", code, env=environment)
    assert process.stdout == ("here\n" if unbuffered else "")
