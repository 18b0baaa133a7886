"""Several processes and accumulation: what the ranks hold, who writes, how many steps are taken, how a failure ends."""

import re
import time

import pytest
import torch
from conftest import (
    FAST,
    LAUNCHERS,
    ROOT,
    distance,
    finish,
    flags,
    fork,
    load_trained,
    movement,
    run,
    start,
    with_classes,
)

pytestmark = pytest.mark.slow

# The trainer, with a record of everything that its process creates, writes or renames, and of its trained numbers.
WATCHED = f"""
import os, sys, threading
sys.path.insert(0, {str(ROOT)!r})
rank = os.environ["RANK"]
watched, record = sys.argv.pop(1), open(sys.argv.pop(1) + "." + rank, "w", buffering=1)

def watch(event, details):
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
    changes |= event == "open" and bool(details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes and isinstance(details[0], str) and os.path.abspath(details[0]).startswith(watched):
        record.write(f"{{event}} {{details[0]}}\\n")
sys.addaudithook(watch)

import torch
from accelerate import Accelerator
from train_custom_diffusion import main, parse_args

free_memory = Accelerator.free_memory
def end(self, *objects):
    (model,) = self._models
    trained = {{name: p.detach() for name, p in model.named_parameters() if p.requires_grad}}
    frozen = {{name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}}
    torch.save([trained, frozen], record.name + ".pt")
    return free_memory(self, *objects)
Accelerator.free_memory = end
main(parse_args())
"""


@pytest.fixture(scope="module")
def common(two_concepts):
    """Epochs of 8 pairs."""
    return two_concepts | {"num_class_images": 3, "sample_batch_size": 2}


# Without --multi_gpu, accelerate starts a single process where there is no GPU.
ACCELERATE = [LAUNCHERS["accelerate"][0], "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no"]


@pytest.fixture(scope="module", params=["torchrun", "accelerate"])
def watched(request, common, tmp_path_factory):
    """Two processes with everything on: generated class pictures, validation, checkpoints, tensorboard."""
    folder = tmp_path_factory.mktemp("watched")
    concepts = with_classes(common["concepts_list"], (folder / "classes").joinpath, folder / "concepts.json")
    script = folder / "watched.py"
    script.write_text(WATCHED)
    launcher = LAUNCHERS["torchrun"] if request.param == "torchrun" else ACCELERATE
    more = {
        "concepts_list": concepts,
        "output_dir": folder / "run",
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_prompt": "a <New1> cat",
        "validation_steps": 2,
        "report_to": "tensorboard",
        "learning_rate": 1e-2,
        "dataloader_num_workers": 1,
    }
    process = run(*launcher, script, folder, folder / "rank", *flags(**FAST | common | more))
    assert process.returncode == 0, process.stderr[-4000:]
    return folder, process


def test_ranks_hold_the_same_bits(watched):
    """Attention and embeddings, and what was saved is what they hold."""
    folder, _ = watched
    (trained, frozen), (other_trained, other_frozen) = (torch.load(folder / f"rank.{rank}.pt") for rank in (0, 1))
    for one, other in ((trained, other_trained), (frozen, other_frozen)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    saved = load_trained(folder / "run")
    rows = next(value for name, value in trained.items() if name.endswith(".rows"))
    assert torch.equal(rows, torch.stack([saved["<New1>"], saved["<new2>"]]))
    assert len(trained) == len(saved) - 1


def test_only_the_main_process_writes(watched):
    """But for its share of the class pictures, the second one creates, writes and renames nothing."""
    folder, _ = watched
    written = [(folder / f"rank.{rank}").read_text().splitlines() for rank in (0, 1)]
    assert any("checkpoint-2" in line for line in written[0])
    assert [line for line in written[1] if str(folder / "classes") not in line] == []


def test_class_pictures_are_shared_out(watched):
    """Each made once, by one of the processes."""
    folder, _ = watched
    made = []
    for rank in (0, 1):
        lines = (folder / f"rank.{rank}").read_text().splitlines()
        made.append([line for line in lines if line.startswith("os.rename") and str(folder / "classes") in line])
    assert len(made[0]) == len(made[1]) == 3
    assert len(set(made[0] + made[1])) == len(list((folder / "classes").rglob("*.png"))) == 6


def test_only_the_main_process_prints(watched):
    _, process = watched
    assert process.stdout.count("Saved to") == process.stdout.count("Training ") == 1
    assert process.stderr.count("steps:   0%") == process.stderr.count("class pictures:   0%") == 1


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


@pytest.mark.parametrize("way", [(1, 2, 1), (1, 3, 1), (1, 4, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 3, 2)], ids=str)
def test_divided_is_the_same(way, divided, sd1):
    """Batch, accumulation, processes: as one batch of all. Epochs have 8 draws, so windows of 3 and 6 straddle them."""
    batch, accumulation, processes = way
    expected = load_trained(divided(batch * accumulation * processes))
    found = load_trained(divided(*way))
    assert distance(found, expected) < 0.01 * movement(sd1, expected)


@pytest.mark.parametrize("way", [(1, 2, 1), (1, 3, 1), (1, 4, 1), (1, 2, 2)], ids=str)
def test_one_optimizer_step_for_a_window(way, divided):
    """Three steps were asked for: the optimizer counts three, for each of exactly the trained parameters."""
    folder = divided(*way)
    assert [checkpoint.name for checkpoint in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    state = torch.load(folder / "checkpoint-3" / "training_state.pt", weights_only=True)
    assert {int(parameter["step"]) for parameter in state["optimizer"].values()} == {3}
    assert state["lr_scheduler"] == 3
    shapes = [tuple(value.shape) for key, value in load_trained(folder).items() if "processor" in key]
    moments = [tuple(parameter["exp_avg"].shape) for parameter in state["optimizer"].values()]
    assert sorted(moments) == sorted([*shapes, (2, 32)])


# A failure of one process


SPOILT = """
import accelerate, torch
reduce, steps = accelerate.Accelerator.reduce, []
def spoil(self, *args, **kwargs):
    steps.append(1)
    if rank == {rank} and len(steps) == 2:
        {what}
    return reduce(self, *args, **kwargs)
accelerate.Accelerator.reduce = spoil
"""
OUT_OF_MEMORY = SPOILT.format(rank=1, what="raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GB')")


@pytest.fixture
def own_pictures(sd1, tmp_path):
    """One concept whose pictures a test may spoil."""
    from conftest import make_picture

    (tmp_path / "mine").mkdir()
    for i in range(4):
        make_picture(i).save(tmp_path / "mine" / f"{i}.png")
    return {
        "pretrained_model_name_or_path": sd1,
        "instance_data_dir": tmp_path / "mine",
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
        "max_train_steps": 200,
    }


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


@pytest.mark.parametrize("workers", [0, 2])
def test_picture_that_goes_bad(workers, own_pictures, tmp_path):
    """During training, in the main process and in data-loader workers: one line that names it."""
    folder = tmp_path / "run"
    spoil = "[file.write_bytes(b'') for file in folder.with_name('mine').iterdir()]"
    prelude = SPOILT.format(rank=0, what=spoil)
    said = finish(start(folder, prelude=prelude, dataloader_num_workers=workers, **own_pictures), folder, status=1)
    line = said.splitlines()[-1]
    assert line.startswith("error: ") and re.search(r"mine/\d.png", line) and "--resume_from_checkpoint" in line
    assert "Traceback" not in said


def test_one_process_out_of_memory(own_pictures, tmp_path):
    """Its message, and an end for all."""
    folder = tmp_path / "run"
    statuses = end_of(start(folder, processes=2, prelude=OUT_OF_MEMORY, **own_pictures))
    assert statuses[1] == 1 and statuses[0] != 0
    said = (tmp_path / "run.log1").read_text()
    assert len(said.splitlines()) == 1 and "out of memory" in said and "--gradient_checkpointing" in said


def test_launcher_ends_when_one_process_fails(own_pictures, tmp_path):
    """torchrun: exit status, the one line, no hang, and a single message for what all processes see."""
    script = tmp_path / "spoilt.py"
    prelude = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nrank = int(os.environ['RANK'])\n{OUT_OF_MEMORY}"
    script.write_text(f"{prelude}\nfrom train_custom_diffusion import main, parse_args\nmain(parse_args())")
    values = FAST | own_pictures | {"output_dir": tmp_path / "run"}
    process = run(*LAUNCHERS["torchrun"], script, *flags(**values))
    assert process.returncode != 0 and process.stderr.count("error: out of memory") == 1


def test_bad_data_is_reported_once(own_pictures, tmp_path):
    """Two launched processes, one message."""
    (tmp_path / "mine" / "2.png").write_bytes(b"no picture")
    values = FAST | own_pictures | {"output_dir": tmp_path / "run"}
    process = run(*LAUNCHERS["torchrun"], ROOT / "train_custom_diffusion.py", *flags(**values))
    assert process.returncode != 0 and process.stderr.count("error: ") == 1 and "2.png" in process.stderr
    assert not (tmp_path / "run").exists()


def test_processes_that_find_different_checkpoints(own_pictures, tmp_path):
    """Machines that do not share a folder would train apart."""
    folder = fork(tmp_path / "run", **own_pictures | {"max_train_steps": 2, "checkpointing_steps": 2})
    elsewhere = "trainer.Checkpoints.list = lambda self: [] if rank else [self.output_dir / 'checkpoint-2']"
    # made by one process; that too is refused, but not what this test is about
    elsewhere += "\nread = trainer.Checkpoints.read\n"
    elsewhere += "def fit(self, folder): return read(self, folder) | {'made_with': self.fixed}\n"
    elsewhere += "trainer.Checkpoints.read = fit"
    children = start(folder, processes=2, prelude=elsewhere, resume_from_checkpoint="latest", **own_pictures)
    assert all(end_of(children))
    assert "different steps, [2, 0]" in (tmp_path / "run.log0").read_text()
