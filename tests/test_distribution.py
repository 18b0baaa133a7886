"""Several processes and accumulation: what the ranks hold, who writes, how many steps are taken, how a failure ends."""

import os
import re
import shutil
import socket
import sys
import time

import pytest
import torch
from conftest import with_classes
from launching import FAST, LAUNCHERS, OBSERVERS, SCRIPT, finish, flags, fork, run, start, train, wait_until
from observers import (
    fewer_gpus_than_processes,
    gpu_of_another_torch,
    kill_a_worker,
    record_files_and_weights,
    run_out_of_memory,
)
from pictures import make_picture
from reading import distance, load_trained, movement, training_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def watched(two_concepts, tmp_path_factory):
    """Two processes with everything on: generated class pictures, validation, checkpoints, tensorboard."""
    folder = tmp_path_factory.mktemp("watched")
    concepts = with_classes(two_concepts["concepts_list"], (folder / "classes").joinpath, folder / "concepts.json")
    values = two_concepts | {
        "concepts_list": concepts,
        "num_class_images": 3,
        "sample_batch_size": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_prompt": "a <New1> cat",
        "validation_steps": 2,
        "report_to": "tensorboard",
        "dataloader_num_workers": 1,
    }
    train(folder / "run", "accelerate, two processes", observer=record_files_and_weights, **values)
    return folder


def written_by(folder, rank):
    """What a process created, wrote, renamed or deleted, a line each."""
    return (folder / f"run.files{rank}").read_text().splitlines()


def test_ranks_hold_the_same_bits(watched):
    """Attention and embeddings, and what was saved is what they hold."""
    (weights, trained), (other, other_trained) = (torch.load(watched / f"run.files{rank}.pt") for rank in (0, 1))
    assert weights.keys() == other.keys() and trained == other_trained
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    saved = load_trained(watched / "run")
    (rows,) = [weights[name] for name in trained if ".attn2." not in name]
    assert torch.equal(rows, torch.stack([saved["<New1>"], saved["<new2>"]]))
    assert len(trained) == len(saved) - 1


def test_only_the_main_process_writes(watched):
    """But for its share of the class pictures, the second one creates, writes and renames nothing."""
    assert any("unfinished-checkpoint" in line for line in written_by(watched, 0))
    assert [line for line in written_by(watched, 1) if str(watched / "classes") not in line] == []


def test_class_pictures_are_shared_out(watched):
    """Each made once, by one of the processes."""
    made = [
        [line for line in written_by(watched, rank) if line.startswith("os.rename") and "/classes/" in line]
        for rank in (0, 1)
    ]
    assert len(made[0]) == len(made[1]) == 3
    assert len(set(made[0] + made[1])) == len(list((watched / "classes").rglob("*.png"))) == 6


def test_only_the_main_process_prints(watched):
    stdout, stderr = ((watched / "run" / name).read_text() for name in ("stdout.txt", "stderr.txt"))
    assert stdout.count("Saved to") == stdout.count("Training ") == 1
    assert stderr.count("steps:   0%") == stderr.count("class pictures:   0%") == 1


# The same training, however it is divided


@pytest.fixture(scope="module")
def divided(two_real_concepts, tmp_path_factory):
    """Trains 3 steps of a number of draws, divided in a way; returns the folder."""
    runs = {}

    def get(batch, accumulation=1, processes=1):
        way = (batch, accumulation, processes)
        if way not in runs:
            values = {"num_class_images": 3, "max_train_steps": 3, "checkpointing_steps": 3}
            # a step is nearly the gradient itself, not its sign, and its size does not hide a wrong scale
            values |= {"learning_rate": 1, "adam_epsilon": 1, "adam_weight_decay": 0, "max_grad_norm": 1e6}
            values |= {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "processes": processes}
            runs[way] = fork(tmp_path_factory.mktemp("runs") / "run", **two_real_concepts | values)
        return runs[way]

    return get


@pytest.mark.parametrize("way", [(1, 2, 1), (1, 3, 1), (1, 1, 2), (1, 2, 2), (1, 3, 2)], ids=str)
def test_divided_is_the_same(way, divided, sd1):
    """Batch, accumulation, processes: as one batch of all. Epochs have 8 draws, so windows of 3 and 6 straddle them."""
    batch, accumulation, processes = way
    expected = load_trained(divided(batch * accumulation * processes))
    found = load_trained(divided(*way))
    assert distance(found, expected) < 0.01 * movement(sd1, expected)


def test_resume_on_another_number_of_processes(divided, two_real_concepts, sd1, tmp_path):
    """Two processes with a batch of 1 for two steps, then one process with a batch of 2: as one process all along."""
    values = two_real_concepts | {"num_class_images": 3, "checkpointing_steps": 2}
    values |= {"learning_rate": 1, "adam_epsilon": 1, "adam_weight_decay": 0, "max_grad_norm": 1e6}
    folder = fork(tmp_path / "run", processes=2, max_train_steps=2, train_batch_size=1, **values)
    fork(folder, max_train_steps=3, train_batch_size=2, resume_from_checkpoint="checkpoint-2", **values)
    expected = load_trained(divided(2))
    assert distance(load_trained(folder), expected) < 0.01 * movement(sd1, expected)


@pytest.mark.parametrize("way", [(1, 2, 1), (1, 3, 1), (1, 2, 2)], ids=str)
def test_one_optimizer_step_for_a_window(way, divided):
    """Three steps were asked for: the optimizer counts three, for each of exactly the trained parameters."""
    folder = divided(*way)
    assert [checkpoint.name for checkpoint in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    state = training_state(folder / "checkpoint-3")
    assert {int(parameter["step"]) for parameter in state["optimizer"].values()} == {3}
    assert state["lr_scheduler"] == 3
    shapes = [tuple(value.shape) for key, value in load_trained(folder).items() if "processor" in key]
    moments = [tuple(parameter["exp_avg"].shape) for parameter in state["optimizer"].values()]
    assert sorted(moments) == sorted([*shapes, (2, 32)])


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_weights_in_parts(name, one_concept, tmp_path):
    """Set by another project's `accelerate config`: one line, as no process holds all weights then."""
    folder = tmp_path / "run"
    said = finish(start(folder, env={f"ACCELERATE_USE_{name}": "true"}, **one_concept), folder, status=1)
    assert said.startswith(f"error: ACCELERATE_USE_{name}: ") and "accelerate config" in said
    assert len(said.splitlines()) == 1 and not folder.exists()


def test_no_shared_memory(one_real_concept, tmp_path):
    """Containers have little of it; 8 + 8 pictures of 128 pixels, 2 MB, go by another way."""
    if run("unshare", "-Urm", "true").returncode:
        pytest.skip("no user namespaces here, so no small file system")
    values = {"resolution": 128, "train_batch_size": 8, "max_train_steps": 6, "dataloader_num_workers": 2}
    words = flags(**FAST | one_real_concept | values | {"output_dir": tmp_path / "run"})
    commands = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    process = run("unshare", "-Urm", "bash", "-c", commands, "bash", sys.executable, SCRIPT, *words)
    assert process.returncode == 0, process.stderr[-3000:]


def test_worker_processes_need_little(one_concept, tmp_path):
    """Neither sockets in a temporary folder, whose name may be too long for one, nor a file for each tensor."""
    long = tmp_path / ("d" * 60) / ("e" * 60)
    long.mkdir(parents=True)
    values = {"dataloader_num_workers": 8, "max_train_steps": 4, "output_dir": tmp_path / "run"}
    words = flags(**FAST | one_concept | values)
    command = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash", sys.executable, SCRIPT, *words]
    process = run(*command, env=os.environ | {"TMPDIR": str(long)}, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]


def test_worker_that_the_system_kills(one_real_concept, tmp_path):
    values = one_real_concept | {"max_train_steps": 2, "dataloader_num_workers": 1}
    said = finish(start(tmp_path / "run", observer=kill_a_worker, **values), tmp_path / "run", status=1)
    assert said.splitlines()[-1].startswith("error: data-loader worker: the system ended it")
    assert "Traceback" not in said


def test_picture_that_vanishes(one_real_concept, tmp_path):
    """What ends a worker ends the run: Python does not wait for ever for workers that the error keeps alive."""
    values = one_real_concept | {"class_data_dir": tmp_path / "cats", "max_train_steps": 1000}
    shutil.copytree(one_real_concept["class_data_dir"], tmp_path / "cats")
    (child,) = start(tmp_path / "run", **values, dataloader_num_workers=2)
    wait_until(lambda: re.search(r"[1-9]\d*/1000", (tmp_path / "run.log").read_text()))
    shutil.rmtree(tmp_path / "cats")
    assert "FileNotFoundError" in finish([child], tmp_path / "run", status=1)


# A failure of one process


@pytest.fixture
def own_pictures(one_concept, tmp_path):
    """One concept whose pictures a test may change."""
    (tmp_path / "mine").mkdir()
    for i in range(4):
        make_picture(i).save(tmp_path / "mine" / f"{i}.png")
    return one_concept | {"instance_data_dir": tmp_path / "mine", "max_train_steps": 200}


def end_of(children):
    """Exit statuses, when all have ended; the ones that wait for a dead one are ended as a launcher does."""
    until = time.monotonic() + 300
    while all(child.exitcode is None for child in children):
        assert time.monotonic() < until, "it hangs"
        time.sleep(0.01)
    for child in children:
        child.join(10)
        child.terminate()
        child.join(10)
        assert child.exitcode is not None
    return [child.exitcode for child in children]


def test_one_process_out_of_memory(own_pictures, tmp_path):
    """Its message, and an end for all."""
    folder = tmp_path / "run"
    statuses = end_of(start(folder, processes=2, observer=run_out_of_memory, **own_pictures))
    assert statuses[1] == 1 and statuses[0] != 0
    said = (tmp_path / "run.log1").read_text()
    assert len(said.splitlines()) == 1 and "out of memory" in said and "--gradient_checkpointing" in said
    assert "--sample_batch_size" in said


def test_launcher_ends_when_one_process_fails(own_pictures, tmp_path):
    """torchrun: exit status, the one line, no hang."""
    folder = tmp_path / "run"
    words = flags(**FAST | own_pictures | {"output_dir": folder})
    process = run(*LAUNCHERS["torchrun"], OBSERVERS, run_out_of_memory.__name__, folder, *words)
    assert process.returncode != 0 and process.stderr.count("error: out of memory") == 1


def test_bad_data_ends_all_processes(own_pictures, tmp_path):
    """Each of two processes ends with the line and nothing else; a launcher may end one before it has said so."""
    (tmp_path / "mine" / "2.png").write_bytes(b"no picture")
    assert end_of(start(tmp_path / "run", processes=2, **own_pictures)) == [1, 1]
    for rank in (0, 1):
        (line,) = (tmp_path / f"run.log{rank}").read_text().splitlines()
        assert line.startswith("error: ") and "2.png: " in line
    process = run(*LAUNCHERS["torchrun"], SCRIPT, *flags(**FAST | own_pictures | {"output_dir": tmp_path / "run"}))
    assert process.returncode != 0 and "2.png: " in process.stderr
    assert "SystemExit" not in process.stderr and 'train_custom_diffusion.py", line' not in process.stderr
    assert not (tmp_path / "run").exists()


def test_processes_that_find_different_checkpoints(own_pictures, tmp_path):
    """Machines that do not share a folder would train apart."""
    folder = fork(tmp_path / "run", processes=2, **own_pictures | {"max_train_steps": 2, "checkpointing_steps": 2})
    elsewhere = {1: {"output_dir": tmp_path / "elsewhere"}}
    children = start(folder, processes=2, of_rank=elsewhere, resume_from_checkpoint="latest", **own_pictures)
    assert all(end_of(children))
    (line,) = [line for line in (tmp_path / "run.log0").read_text().splitlines() if line.startswith("error: ")]
    assert "--resume_from_checkpoint" in line and "[2, 0]" in line


# What launchers, containers and GPUs get wrong

LAUNCHES = {
    "MPI's variables of a container": {"OMPI_COMM_WORLD_SIZE": "2"},
    "MPI's, complete": {
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "another MPI's": {"PMI_SIZE": "4", "PMI_RANK": "0"},
    "a launcher's, without an address": {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    "no number": {"WORLD_SIZE": "two"},
    "empty": {"LOCAL_RANK": ""},
}  # fmt: skip


@pytest.mark.parametrize("case", LAUNCHES)
def test_variables_of_a_launcher(case, one_concept, tmp_path):
    """One line that begins with them and says what to do."""
    env = LAUNCHES[case]
    (tmp_path / "run.log0").touch()
    child = start(tmp_path / "run", env=env | {"MASTER_ADDR": None, "MASTER_PORT": None}, **one_concept)
    (line,) = finish(child, tmp_path / "run", status=1).splitlines()
    name, value = next(iter(env.items()))
    assert re.match(rf"error: (RANK=0, |WORLD_SIZE=\d, )*{name}={value}[,:]", line) or f", {name}={value}" in line
    assert line.endswith("or unset these variables")


def test_port_in_use(one_concept, tmp_path):
    """Another launch on the same machine has it."""
    (tmp_path / "run.log0").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(server.getsockname()[1])
        said = finish(start(tmp_path / "run", env=env, **one_concept), tmp_path / "run", status=1)
    line = said.splitlines()[-1]
    assert line.startswith("error: WORLD_SIZE=2") and "address already in use" in line and "Traceback" not in said


def test_fewer_gpus_than_processes(one_concept, tmp_path):
    env = {"LOCAL_RANK": "0"}
    child = start(tmp_path / "run", env=env, observer=fewer_gpus_than_processes, **one_concept)
    (line,) = finish(child, tmp_path / "run", status=1).splitlines()
    assert (
        line.startswith("error: LOCAL_RANK=0: CUDA error: invalid device ordinal")
        and "one process for each GPU" in line
    )


def test_gpu_that_torch_was_not_built_for(one_concept, tmp_path):
    """Told with the version, before the model is loaded: it is not there."""
    values = one_concept | {"pretrained_model_name_or_path": "nowhere"}
    child = start(tmp_path / "run", observer=gpu_of_another_torch, **values)
    (line,) = finish(child, tmp_path / "run", status=1).splitlines()
    assert re.match(rf"error: .+: torch {re.escape(torch.__version__)} was not built for it; install", line)
