"""Ways to take the same step: what must not change its result, and that the host waits for no device.

Gradient checkpointing, freed gradients, compilation and cached latents.
"""

import json
import os
import re

import pytest
import torch
from launching import FAST, LAUNCHERS, SCRIPT, finish, flags, fork, run, start, train
from observers import compile_wrongly, record_batches, watch_steps
from PIL import Image
from reading import base_weights, distance, fresh_pipeline, load_trained, movement, same_bits

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
            finish(start(folder, observer=watch_steps, **common | way), folder)
            runs[key] = load_trained(folder), json.loads(folder.with_name("run.json").read_text())
        return runs[key]

    return get


WAYS = {
    "plain": {},
    "bf16": {"mixed_precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "cached": {"cache_latents": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "channels_last": {"channels_last": True},
    "kept apart": {"keep_apart": True},
}
COMPILERS = ("inductor", "cudagraphs")


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


@pytest.mark.parametrize("precision, rounding", [("no", 1e-4), ("bf16", 0.05)])
def test_channels_last(precision, rounding, watched, sd1):
    """The UNet's convolutions get and give channels_last; what is learned is the same but for rounding."""
    plain, contiguous = watched(mixed_precision=precision)
    learned, last = watched(mixed_precision=precision, channels_last=True)
    assert contiguous["channels_last"] == 0 < last["channels_last"]
    assert distance(learned, plain) < rounding * movement(sd1, plain)


def test_frees_gradients(watched, sd1):
    plain, _ = watched()
    freed, _ = watched(set_grads_to_none=True)
    assert distance(freed, plain) == 0 < movement(sd1, plain)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize("backend", ["aot_eager", *(pytest.param(b, marks=pytest.mark.gpu) for b in COMPILERS)])
def test_compiled(backend, model, one_concept, request, tmp_path):
    """`accelerate launch --dynamo_backend`: the same training. Inductor's kernels take minutes to make on a CPU."""
    one_concept = one_concept | {"pretrained_model_name_or_path": request.getfixturevalue(model)}
    values = FAST | one_concept | {"train_batch_size": 2, "max_train_steps": STEPS}
    values |= {"learning_rate": 1, "adam_epsilon": 1, "set_grads_to_none": backend == "cudagraphs"}
    launcher = [*LAUNCHERS["accelerate"], "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    words = flags(**values | {"output_dir": tmp_path / "compiled"})
    environment = os.environ | {"TORCH_LOGS": "graph_code,recompiles"}
    process = run(*launcher, f"--dynamo_backend={backend}", SCRIPT, *words, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    # one graph: its shapes are static, and nothing in it needs Python, so a GPU can capture it
    assert process.stderr.count("===== __compiled_fn_") == 1 and "Recompiling" not in process.stderr
    compiled, plain = load_trained(tmp_path / "compiled"), load_trained(train(tmp_path / "plain", **values))
    base = base_weights(one_concept["pretrained_model_name_or_path"], plain)
    moved = distance({key: plain[key] for key in base}, base)
    assert distance(compiled, plain) < 0.01 * moved


GRAPHS = {  # what CUDA graphs can't do: flags, what accelerate's configuration says, and the answer
    "kept gradients": ({}, {"BACKEND": "CUDAGRAPHS"}, "error: --dynamo_backend: .*--set_grads_to_none"),
    "by the compiler's mode": ({}, {"BACKEND": "INDUCTOR", "MODE": "reduce-overhead"}, "error: --dynamo_backend: "),
    "accumulation": (
        {"set_grads_to_none": True, "gradient_accumulation_steps": 2},
        {"BACKEND": "CUDAGRAPHS"},
        "error: --gradient_accumulation_steps: CUDA graphs",
    ),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_gradients_in_a_graph(case, common, tmp_path):
    """A graph of CUDA's overwrites gradients that are kept; refused before the models are loaded."""
    values, chosen, answer = GRAPHS[case]
    environment = {f"ACCELERATE_DYNAMO_{name}": value for name, value in chosen.items()}
    folder = tmp_path / "run"
    said = finish(start(folder, env=environment, **common | values), folder, status=1)
    assert re.match(answer, said.splitlines()[-1]) and "Traceback" not in said, said


@pytest.mark.slow
def test_wrong_compiler_is_refused(common, tmp_path):
    """A compiled model that gives no gradients, as torch 2.13 makes them on a CPU, ends the run before it starts."""
    folder = tmp_path / "run"
    said = finish(start(folder, observer=compile_wrongly, **common), folder, status=1)
    assert re.match(r"error: --dynamo_backend: .*gradients", said.splitlines()[-1])
    assert not folder.exists() and "Traceback" not in said


# Cached latents: what is encoded once, and what is trained on


K = 3
INSTANCES, CLASSES = 5, 4


@pytest.fixture(scope="module")
def cached(one_real_concept):
    """Flags: augmentation, a learning rate that moves."""
    return one_real_concept | {
        "num_class_images": CLASSES,
        "train_batch_size": 2,
        "max_train_steps": 8,
        "checkpointing_steps": 4,
        "sample_batch_size": 5,  # does not divide the 27 augmentations
        "cache_latents": K,
        # a step is nearly the gradient itself, not its sign
        "learning_rate": 1,
        "adam_epsilon": 1,
    }


@pytest.fixture(scope="module")
def recorded(cached, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "run"
    finish(start(folder, observer=record_batches, **cached), folder)
    return folder, torch.load(f"{folder}.batches0", weights_only=True)


def test_each_augmentation_is_encoded_once(recorded):
    _, record = recorded
    pixels = torch.cat(record["pixels"])
    assert len(pixels) == K * (INSTANCES + CLASSES) and record["encoded_in_training"] == 0
    assert len({image.numpy().tobytes() for image in pixels}) > K * INSTANCES  # augmented, each in its own way


def test_trains_on_samples_of_the_vaes_posterior(recorded, sd1):
    """Mean and deviation are those that diffusers' VAE gives; the sample is another at each draw."""
    _, record = recorded
    vae = fresh_pipeline(sd1).vae
    with torch.no_grad():
        posterior = vae.encode(torch.cat(record["pixels"])).latent_dist
    drawn, noises = set(), []
    for batch, latents in zip(record["batches"], record["latents"], strict=True):
        for i, (mean, std) in enumerate(zip(batch["mean"], batch["std"], strict=True)):
            row = int((posterior.mean - mean).abs().amax((1, 2, 3)).argmin())
            assert torch.allclose(mean, posterior.mean[row], rtol=0, atol=1e-5 * float(posterior.mean.abs().max()))
            assert torch.allclose(std, posterior.std[row], rtol=1e-5)
            assert (row < K * INSTANCES) == (i < 2)  # instances first, then classes
            expected = (mean + std * batch["posterior_noise"][i]) * vae.config.scaling_factor
            assert torch.allclose(latents[i], expected, rtol=1e-5, atol=1e-6)
            drawn.add(row)
            noises.append(batch["posterior_noise"][i])
    assert len(drawn) > INSTANCES + CLASSES  # more than one augmentation of a picture is used
    noises = torch.stack(noises)
    assert len({noise.numpy().tobytes() for noise in noises}) == len(noises) == 32
    assert abs(noises.mean()) < 0.1 and abs(noises.std() - 1) < 0.1


def test_mask_and_words_are_the_augmentations(recorded, sd1):
    """Where the canvas around an instance picture is empty, the loss is masked; far ones say so."""
    _, record = recorded
    pixels, tokenizer = torch.cat(record["pixels"]), fresh_pipeline(sd1).tokenizer
    with torch.no_grad():
        means = fresh_pipeline(sd1).vae.encode(pixels).latent_dist.mean
    prefixes = [tokenizer(prefix, add_special_tokens=False).input_ids for prefix in ("a far away", "very small")]
    prefixed = 0
    for batch in record["batches"]:
        for mean, mask, ids in zip(batch["mean"][:2], batch["mask"], batch["input_ids"][:2], strict=True):
            image = pixels[int((means - mean).abs().amax((1, 2, 3)).argmin())]
            filled = (image != 0).any(0)
            assert filled.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).all(2)[mask[0] == 1].all()
            far = max(filled.any(0).sum(), filled.any(1).sum()) < 0.6 * 64  # its longer side
            assert far == any(ids[1 : len(prefix) + 1].tolist() == prefix for prefix in prefixes)
            prefixed += far
    assert prefixed


def test_same_bits_with_workers_validation_and_resuming(recorded, cached, tmp_path):
    around = {"dataloader_num_workers": 2, "validation_prompt": "a <new1> cat", "validation_steps": 3}
    around["num_validation_images"] = 1
    folder = fork(tmp_path / "run", **cached | around | {"max_train_steps": 4})
    fork(folder, **cached | around, resume_from_checkpoint="latest")
    assert same_bits(load_trained(folder), load_trained(recorded[0]))
    steps = sorted(int(file.stem.removeprefix("step-")) for file in (folder / "validation").iterdir())
    assert steps == [0, 3, 4, 6, 8]
    assert Image.open(folder / "steps.png").size == (
        4 * 64,
        16 + 2 * (16 + 64),
    )  # 0, 3, 6, 8: from before the resuming, too


def test_processes_share_the_work(recorded, cached, sd1, tmp_path):
    """Each encodes half, and trains as one process with all: the difference is the order of sums."""
    folder = tmp_path / "run"
    values = cached | {"train_batch_size": 1}
    finish(start(folder, processes=2, observer=record_batches, **values), folder)
    records = [torch.load(f"{folder}.batches{rank}", weights_only=True) for rank in (0, 1)]
    shares = [len(torch.cat(record["pixels"])) for record in records]
    assert abs(shares[0] - shares[1]) <= 5 and 27 <= sum(shares) < 27 + 2 * 5
    expected = load_trained(recorded[0])
    assert distance(load_trained(folder), expected) < 0.01 * movement(sd1, expected)


def test_other_number_on_resuming_is_refused(recorded, cached, tmp_path):
    values = cached | {"cache_latents": 2, "resume_from_checkpoint": recorded[0] / "checkpoint-4"}
    fork(tmp_path / "run", status=1, **values)
    line = (tmp_path / "run.log").read_text().splitlines()[-1]
    assert line.startswith("error: --resume_from_checkpoint") and "cache_latents 3" in line and "2" in line
