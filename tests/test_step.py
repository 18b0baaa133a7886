"""What a step does not do (wait for the device), and ways of doing it that must not change the result."""

import json
import os
import re
import sys

import pytest
from conftest import (
    EMBEDDED,
    LAUNCHERS,
    ROOT,
    SCRIPT,
    distance,
    finish,
    flags,
    fork,
    load_trained,
    movement,
    run,
    start,
)

# Counts, in the training steps, what makes the host wait for a device, and forward passes of the networks' layers.
WATCH = """
import json
import diffusers.models.attention, torch, transformers.models.clip.modeling_clip
from torch.utils._python_dispatch import TorchDispatchMode
found = {"waits": [], "FeedForward": 0, "CLIPMLP": 0}
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"):
            found["waits"].append(str(func))
        return func(*args, **(kwargs or {}))
def count(cls):
    forward = cls.forward
    def counted(self, *args, **kwargs):
        found[cls.__name__] += self.training
        return forward(self, *args, **kwargs)
    cls.forward = counted
count(diffusers.models.attention.FeedForward)
count(transformers.models.clip.modeling_clip.CLIPMLP)
step = trainer.training_step
def watched(*args):
    with Watch():
        loss = step(*args)
    folder.with_name(folder.name + ".json").write_text(json.dumps(found))
    return loss
trainer.training_step = watched
"""
STEPS = 3


@pytest.fixture(scope="module")
def common(two_real_concepts):
    """Two concepts, prior preservation; a step is nearly the gradient itself, not its sign."""
    return two_real_concepts | {
        "train_batch_size": 2,
        "max_train_steps": STEPS,
        "learning_rate": 1,
        "adam_epsilon": 1,
    }


@pytest.fixture(scope="module")
def watched(common, tmp_path_factory):
    """Trains in a way; returns the weights and what was counted."""
    runs = {}

    def get(**way):
        key = str(way)
        if key not in runs:
            folder = tmp_path_factory.mktemp("runs") / "run"
            finish(start(folder, prelude=WATCH, **common | way), folder)
            runs[key] = load_trained(folder), json.loads(folder.with_name("run.json").read_text())
        return runs[key]

    return get


WAYS = {
    "plain": {},
    "bf16": {"mixed_precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "cached": {"cache_latents": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_host_waits_for_nothing(way, watched):
    _, found = watched(**WAYS[way])
    assert found["FeedForward"] and found["waits"] == []


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing(precision, watched, sd1):
    """Each layer of UNet and text encoder runs twice, and nothing changes."""
    plain, once = watched(mixed_precision=precision)
    checkpointed, twice = watched(mixed_precision=precision, gradient_checkpointing=True)
    for layer in ("FeedForward", "CLIPMLP"):
        assert twice[layer] == 2 * once[layer] > 0
    assert distance(checkpointed, plain) < 1e-4 * movement(sd1, plain)


def test_frees_gradients(watched, sd1):
    plain, _ = watched()
    freed, _ = watched(set_grads_to_none=True)
    assert distance(freed, plain) == 0 < movement(sd1, plain)


COMPILED = {"resolution": 128, "train_batch_size": 2, "max_train_steps": STEPS, "learning_rate": 1, "adam_epsilon": 1}


@pytest.mark.slow
def test_compiled(one_concept, tmp_path):
    """`accelerate launch --dynamo_backend inductor`: compiled kernels, the same training."""
    common = one_concept | COMPILED | {"pretrained_model_name_or_path": EMBEDDED}
    launcher = [*LAUNCHERS["accelerate"], "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=inductor"]
    words = flags(output_dir=tmp_path / "compiled", report_to="none", dataloader_num_workers=0, **common)
    process = run(*launcher, SCRIPT, *words, env=os.environ | {"TORCH_LOGS": "graph_code"})
    assert process.returncode == 0, process.stderr[-3000:]
    assert "===== __compiled_fn_" in process.stderr
    compiled, plain = load_trained(tmp_path / "compiled"), load_trained(fork(tmp_path / "plain", **common))
    assert distance(compiled, plain) < 0.01 * movement(EMBEDDED, plain)


WRONG = """
import os, torch
os.environ["ACCELERATE_DYNAMO_BACKEND"] = "EAGER"  # as accelerate launch --dynamo_backend does
forward = trainer.DenoisingModel.forward
def wrong(self, *args):
    prediction = forward(self, *args)
    return (prediction + prediction.detach()) / 2 if torch.compiler.is_compiling() else prediction  # half the gradient
trainer.DenoisingModel.forward = wrong
"""


@pytest.mark.slow
def test_wrong_compiler_is_refused(common, tmp_path):
    """Gradients of the compiled model that are not the model's end the run before it starts."""
    folder = tmp_path / "run"
    said = finish(start(folder, prelude=WRONG, **common), folder, status=1)
    line = said.splitlines()[-1]
    assert re.fullmatch(r"error: --dynamo_backend: .* eager makes wrong gradients of this model; leave it out", line)
    assert not folder.exists() and "Traceback" not in said


@pytest.mark.slow
def test_benchmark():
    """The benchmark's usual step does the work of the exact one; cached, the VAE's share of it is gone."""
    script = ROOT / "benchmarks" / "step.py"
    process = run(sys.executable, script, "--size=tiny", "--rounds=2", "--only=fp32$")
    assert process.returncode == 0, process.stderr[-3000:]
    rows = json.loads((ROOT / "results" / "step" / "tiny.json").read_text())["tables"]["variants"]
    usual, exact, cached = rows
    assert usual["name"] == "usual fp32" and exact["name"] == "exact fp32" and cached["name"] == "cached fp32"
    assert usual["flops"] == exact["flops"] > cached["flops"] > 0
    assert "VAE" in exact["parts"] and "VAE" not in cached["parts"]
    for row in rows:
        assert len(row["times"]) == 2 and min(row["times"]) > 0
        assert min(row["parts"].values()) >= 0 and row["parts"]["rest"] > 0  # the parts are no more than the whole
        assert f"| {row['name']} |" in process.stdout
