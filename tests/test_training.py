"""What training computes: the loss, the steps and what they leave alone, against formulas written out here."""

import importlib.util
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from launching import FAST, finish, flags, fork, in_one_process, start, train
from models import EMBEDDED
from observers import record_losses, record_steps, spawn_workers
from reading import (
    base_weights,
    beginning,
    check_loading,
    check_weight_files,
    distance,
    fresh_pipeline,
    load_trained,
    load_weights,
    loaded_pipeline,
    movement,
    same_bits,
    training_state,
)

from train_custom_diffusion import diffusion_loss

RNG = np.random.default_rng(0)


# The loss


class FakeVAE:
    """Encodes to a posterior with given mean and deviation."""

    dtype, config = torch.float32, SimpleNamespace(scaling_factor=0.3)

    def __init__(self, mean, std):
        self.posterior = SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.tensor(mean), std=torch.tensor(std)))

    def encode(self, pixel_values):
        return self.posterior


@pytest.mark.parametrize("cells", [8, 12, 64])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss(prediction_type, prior, cells):
    """Instance part: sum over masked elements / sum of the mask, mean over samples. Prior part: plain mean."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    n = 4
    mean, std, eps, noise, predicted = (RNG.standard_normal((n, 4, cells, cells)).astype(np.float32) for _ in range(5))
    timesteps, mask = np.array([3, 250, 600, 999]), np.zeros((n, 1, cells, cells), np.float32)
    mask[0, 0, 2:5, 1:7], mask[1, 0, -1, 0], mask[2, 0, 3:], mask[3] = 1, 1, 1, 1  # each sample has another sum

    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[timesteps][:, None, None, None]
    latents = (mean + std * eps) * 0.3
    noisy = alphas**0.5 * latents + (1 - alphas) ** 0.5 * noise
    target = noise if prediction_type == "epsilon" else alphas**0.5 * noise - (1 - alphas) ** 0.5 * latents
    error = (predicted - target) ** 2
    instances = 2 if prior else n
    expected = np.mean([(error[i] * mask[i]).sum() / mask[i].sum() for i in range(instances)])
    if prior:
        expected += 0.3 * error[instances:].mean()

    seen = {}

    def model(noisy_latents, timesteps, input_ids):
        seen.update(noisy=noisy_latents, timesteps=timesteps, ids=input_ids)
        return torch.tensor(predicted)

    batch = {
        "pixels": torch.zeros(n, 4, 8 * cells, 8 * cells, dtype=torch.uint8),
        "mask": torch.tensor(mask[:instances]),
        "input_ids": torch.arange(n)[:, None],
        "posterior_noise": torch.tensor(eps),
        "noise": torch.tensor(noise),
        "timesteps": torch.tensor(timesteps),
    }
    found = diffusion_loss(model, FakeVAE(mean, std), scheduler, batch, prior_loss_weight=0.3)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert np.allclose(seen["noisy"], noisy, atol=1e-4)
    assert seen["timesteps"].tolist() == timesteps.tolist() and seen["ids"].flatten().tolist() == [0, 1, 2, 3]


# Real networks, with a learning rate of 0, which leaves them as they were: the batches and losses of each step.
RUNS = {
    "sd1": {"resolution": 64},
    "sd1, bf16": {"resolution": 64, "mixed_precision": "bf16"},
    "sd2": {"resolution": 96},
    "sd2, bf16": {"resolution": 96, "mixed_precision": "bf16"},
    "sd1, large": {"resolution": 256, "train_batch_size": 1, "max_train_steps": 1},
}


@torch.no_grad()
def loss_by_formula(model, batch, v_prediction):
    """The contract's formulas in NumPy around diffusers' networks; <new1> has the embedding of ktn."""
    pipeline, number = loaded_pipeline(model), {key: value.double().numpy() for key, value in batch.items()}
    colours, alpha = batch["pixels"][:, :3].double() / 127.5 - 1, batch["pixels"][:, 3:]
    posterior = pipeline.vae.encode((colours * (alpha == 255)).float()).latent_dist
    latents = posterior.mean.double().numpy() + posterior.std.double().numpy() * number["posterior_noise"]
    latents *= 0.18215
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[batch["timesteps"].numpy()]
    signal, noise = np.sqrt(alphas)[:, None, None, None], np.sqrt(1 - alphas)[:, None, None, None]
    noisy = torch.from_numpy(signal * latents + noise * number["noise"]).float()
    hidden = pipeline.text_encoder(batch["input_ids"].where(batch["input_ids"] != 49408, torch.tensor(42170)))[0]
    predicted = pipeline.unet(noisy, batch["timesteps"], hidden).sample.double().numpy()
    error = (predicted - (signal * number["noise"] - noise * latents if v_prediction else number["noise"])) ** 2
    half, mask = len(error) // 2, number["mask"]
    instance = [(error[i] * mask[i]).sum() / mask[i].sum() for i in range(half)]
    return np.mean(instance) + 0.3 * error[half:].mean()


@pytest.mark.parametrize("name", RUNS)
def test_loss_of_real_networks(name, cat_flags, sd1, sd2, tmp_path):
    """Equal in full precision; in bf16 equal within its 8 bits, and not computed in more."""
    model, sizes = sd2 if "sd2" in name else sd1, set()
    values = {
        "learning_rate": 0,
        "max_train_steps": 3,
        "prior_loss_weight": 0.3,
        "pretrained_model_name_or_path": model,
    }
    children = start(tmp_path / "run", observer=record_losses, **cat_flags | values | RUNS[name])
    finish(children, tmp_path / "run")
    for batch in torch.load(tmp_path / "run.losses", weights_only=True):
        loss = batch.pop("loss").item()
        expected = loss_by_formula(model, batch, "sd2" in name)
        sizes.add(float(batch["mask"].mean()))
        assert loss == pytest.approx(expected, rel=0.02 if "bf16" in name else 1e-4)
        if "bf16" in name:
            assert abs(loss - expected) > 1e-5 * expected
    assert min(sizes) < 1, "some masks leave something out"


# Whole steps


def record(folder, **values):
    """Trains two steps; returns the folder and what they were trained on."""
    values = {
        "noaug": True,
        "center_crop": True,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1,
        "adam_epsilon": 1,  # then a step is nearly the gradient itself, not its sign
    } | values
    finish(start(folder / "run", observer=record_steps, **values), folder / "run")
    return folder / "run", torch.load(folder / "run.steps", weights_only=True)


class FirstTokenDetached:
    """Cross-attention as the paper trains it: softmax(Q K^T / sqrt(d)) V, no gradient through the first token."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        query, key, value = attn.to_q(hidden_states), *(f(encoder_hidden_states) for f in (attn.to_k, attn.to_v))
        key, value = (torch.cat([x[:, :1].detach(), x[:, 1:]], 1) for x in (key, value))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return attn.to_out[0]((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2))


def steps_by_hand(model, record, projections, prior_loss_weight):
    """The recorded steps with diffusers' networks and the formulas of loss, clipping and AdamW written out."""
    pipeline = fresh_pipeline(model)
    unet, text_encoder = pipeline.unet.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
    v_prediction = pipeline.scheduler.config.prediction_type == "v_prediction"
    # the whole table with the new row at its end is a parameter; its gradient is masked
    text_encoder.resize_token_embeddings(49409, mean_resizing=False)
    table = text_encoder.get_input_embeddings().requires_grad_()
    with torch.no_grad():
        table.weight[49408] = table.weight[42170]
    mask = torch.zeros(49409, 1)
    mask[49408] = 1
    parameters = {"table": table.weight}
    for name, attention in unet.named_modules():
        if name.endswith("attn2"):
            attention.set_processor(FirstTokenDetached())
            for projection in projections:
                layer, _, part = projection.partition(".")
                key = f"{name}.processor.{layer}_custom_diffusion.{part}"
                parameters[key] = attention.get_parameter(projection).requires_grad_()
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in parameters.items()}

    for step, ((latents, noise, timesteps), ids) in enumerate(zip(record["noised"], record["ids"], strict=True), 1):
        a = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * latents if v_prediction else noise
        error = (unet(noisy, timesteps, text_encoder(ids)[0]).sample - target) ** 2
        instances = len(error) // 2
        inner = error[:instances, :, 1:-1, 1:-1]  # whole square pictures: the mask leaves out a cell at each border
        loss = inner.sum((1, 2, 3)).mean() / 36 + prior_loss_weight * error[instances:].mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        gradients["table"] = gradients["table"] * mask
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        with torch.no_grad():
            for name, unclipped in gradients.items():
                gradient = unclipped * min(1, 1 / (norm + 1e-6))
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                where = mask if name == "table" else 1
                parameters[name].mul_(1 - 1 * 0.01 * where)  # learning rate x weight decay
                parameters[name].sub_((first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1))
    return {name: p.detach() for name, p in parameters.items() if name != "table"} | {
        "<new1>": table.weight[49408].detach()
    }


@pytest.fixture(scope="module")
def recorded_sd1(cat_flags, tmp_path_factory):
    return record(tmp_path_factory.mktemp("sd1"), **cat_flags | {"max_train_steps": 2, "prior_loss_weight": 0.7})


@pytest.fixture(scope="module")
def recorded_sd2(sd2, cat_flags, tmp_path_factory):
    flags = cat_flags | {"max_train_steps": 2, "pretrained_model_name_or_path": sd2, "freeze_model": "crossattn"}
    return record(tmp_path_factory.mktemp("sd2"), **flags, seed=7)


def test_steps_match_the_formulas(recorded_sd1, sd1):
    """Noise prediction, keys and values."""
    folder, found = recorded_sd1
    trained, expected = load_trained(folder), steps_by_hand(sd1, found, ("to_k.weight", "to_v.weight"), 0.7)
    assert distance(trained, expected) < 1e-3 * movement(sd1, trained)


def test_steps_match_the_formulas_sd2(recorded_sd2, sd2):
    """Velocity prediction, linear projections, queries and outputs trained too."""
    folder, found = recorded_sd2
    projections = ("to_k.weight", "to_v.weight", "to_q.weight", "to_out.0.weight", "to_out.0.bias")
    trained, expected = load_trained(folder), steps_by_hand(sd2, found, projections, 1.0)
    assert distance(trained, expected) < 1e-3 * movement(sd2, trained)


def test_sd2_loads_with_diffusers(recorded_sd2, sd2):
    folder, _ = recorded_sd2
    projections = ("to_k.weight", "to_v.weight", "to_q.weight", "to_out.0.weight", "to_out.0.bias")
    check_weight_files(sd2, folder, ["<new1>"], projections)
    check_loading(sd2, folder, "<new1>", "photo of a <new1> cat")


def test_trained_on_the_right_words(recorded_sd1, sd1):
    """The new word is the first id after CLIP's vocabulary; class pictures come with the captions of caption.txt."""
    tokenizer = fresh_pipeline(sd1).tokenizer
    instance = tokenizer("photo of a zebra cat", padding="max_length", max_length=77).input_ids
    zebra = tokenizer.convert_tokens_to_ids("zebra</w>")
    instance = [49408 if token == zebra else token for token in instance]
    captions = [tokenizer(f"a cat, number {i}", padding="max_length", max_length=77).input_ids for i in range(5)]
    for ids in recorded_sd1[1]["ids"]:
        assert ids[:2].tolist() == [instance, instance]
        assert all(caption in captions for caption in ids[2:].tolist())


def test_noise_is_normal_and_timesteps_spread(recorded_sd1, recorded_sd2):
    noise = torch.cat([step[1].flatten() for _, found in (recorded_sd1, recorded_sd2) for step in found["noised"]])
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    assert not torch.equal(recorded_sd1[1]["noised"][0][1], recorded_sd2[1]["noised"][0][1])  # another seed
    timesteps = torch.cat([step[2] for step in recorded_sd1[1]["noised"]])
    assert len(timesteps.unique()) == len(timesteps) and timesteps.min() >= 0 and timesteps.max() < 1000


@pytest.fixture(scope="module")
def recorded_hard(two_real_concepts, tmp_path_factory):
    """Two words, a learning rate and a weight decay that move all that they touch."""
    flags = two_real_concepts | {
        "learning_rate": 1,
        "adam_epsilon": 1e-8,
        "adam_weight_decay": 0.5,
    }
    return record(tmp_path_factory.mktemp("hard"), **flags | {"checkpointing_steps": 2, "max_train_steps": 2})


@pytest.mark.parametrize(
    "recorded, model", [("recorded_sd1", "sd1"), ("recorded_sd2", "sd2"), ("recorded_hard", "sd1")]
)
def test_frozen_things_keep_their_bits(recorded, model, request):
    """Every number of the base UNet, VAE and text encoder, the whole embedding table too, is still there unchanged."""
    (_, found), model = request.getfixturevalue(recorded), request.getfixturevalue(model)
    pipeline = fresh_pipeline(model)
    parts = {
        "UNet2DConditionModel": pipeline.unet,
        "CLIPTextModel": pipeline.text_encoder,
        "AutoencoderKL": pipeline.vae,
    }
    for name, base in parts.items():
        state = found["models"][name]
        for key, value in base.state_dict().items():
            kept = state[key] if key in state else state[key.replace(".weight", ".table.weight")]
            assert torch.equal(kept[: len(value)], value), key  # after the table, the proof has put the words


def test_all_that_is_trained_moves(recorded_hard, sd1):
    """Every projection and both words, so that what is frozen had every occasion to move."""
    trained = load_trained(recorded_hard[0])
    begin = beginning(sd1, trained)
    assert begin.keys() == trained.keys()
    assert all((trained[key] - begin[key]).abs().mean() > 0.1 for key in trained)


def test_optimizer_holds_what_is_trained(recorded_hard):
    """Adam's moments have the shapes of the trained parameters and of nothing else."""
    folder, _ = recorded_hard
    state = training_state(folder / "checkpoint-2")["optimizer"]
    shapes = [tuple(value.shape) for value in load_weights(folder).values()] + [(2, 32)]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert sorted(tuple(parameter[moment].shape) for parameter in state.values()) == sorted(shapes)


# What must not change the result


@pytest.fixture(scope="module")
def plain(plain_flags, tmp_path_factory):
    """`trained` again without validation, checkpoints, trackers and worker processes."""
    return fork(tmp_path_factory.mktemp("runs") / "plain", **plain_flags)


def test_same_seed_same_bits(trained, plain):
    """With and without validation, checkpoints, trackers and worker processes."""
    assert same_bits(load_trained(trained), load_trained(plain))


def test_workers_of_other_systems(plain, plain_flags, tmp_path):
    """A worker that does not share the memory of the main process gets the data set by pickling."""
    folder = fork(tmp_path / "run", observer=spawn_workers, **plain_flags | {"dataloader_num_workers": 1})
    assert same_bits(load_trained(folder), load_trained(plain))


def test_no_clipping(plain, plain_flags, tmp_path):
    """--max_grad_norm=0 trains as with a limit that nothing reaches, which is not what clipping at 1 gives."""
    off, unreached = (fork(tmp_path / str(limit), **plain_flags, max_grad_norm=limit) for limit in (0, 1e9))
    assert same_bits(load_trained(off), load_trained(unreached))
    assert not same_bits(load_trained(off), load_trained(plain))


def test_accumulation_of_another_projects_configuration(plain, plain_flags, tmp_path):
    """The flag's value holds, not the variable that `accelerate launch` sets from its configuration."""
    folder = fork(tmp_path / "run", env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, **plain_flags)
    assert same_bits(load_trained(folder), load_trained(plain))


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
def test_bf16(freeze_model, cat_flags, sd1, tmp_path):
    """Mixed precision trains in float32 and goes where full precision goes, within bf16's rounding."""
    flags = cat_flags | {"max_train_steps": 2, "freeze_model": freeze_model, "adam_epsilon": 1, "learning_rate": 1}
    folder = fork(tmp_path / "run", mixed_precision="bf16", **flags)
    trained = load_trained(folder)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    # numbers that only float32 can hold: training did not go through bf16 storage
    assert any(not torch.equal(value, value.bfloat16().float()) for value in trained.values())
    assert ("to_q" in " ".join(trained)) == (freeze_model == "crossattn")
    assert all(torch.isfinite(value).all() for value in trained.values())
    moved = load_weights(folder)
    assert distance(moved, base_weights(sd1, moved)) > 1e-3


# Initializers: with a learning rate of 0 the saved rows are what they started from


INITIALIZERS = {
    "defaults": ("<a>+<b>+<c>", None, [42170, 47629, 44746]),
    "words": ("<a>+<b>", "cat+pll", [2368, 25266]),
    "a piece that is no word": ("<a>", "ktn", [42170]),
    "words beside defaults": ("<a>+<b>+<c>", "ucd+dog+ktn", [43514, 1929, 42170]),
}


@pytest.fixture(scope="module")
def notebook(one_concept, tmp_path_factory):
    """One process in which main runs again and again, as in a notebook: {case: output_dir}."""
    folder, calls = tmp_path_factory.mktemp("notebook"), {}
    for case, (words, initializers, _) in INITIALIZERS.items():
        values = one_concept | {
            "output_dir": folder / case,
            "instance_prompt": f"photo of {words.replace('+', ' ')} cat",
            "modifier_token": words,
            "initializer_token": initializers,
            "max_train_steps": 1,
            "learning_rate": 0,
        }
        calls[case] = folder, flags(**FAST | values)
    answers = in_one_process(calls)
    assert {answer["ended"] for answer in answers.values()} == {"went on"}, answers
    return {case: folder / case for case in INITIALIZERS}


@pytest.mark.parametrize("case", INITIALIZERS)
def test_initializers(case, notebook, sd1):
    words, _, rows = INITIALIZERS[case]
    table = fresh_pipeline(sd1).text_encoder.get_input_embeddings().weight
    trained = load_trained(notebook[case])
    for word, row in zip(words.split("+"), rows, strict=True):
        assert torch.equal(trained[word], table[row]), (word, row)
    assert same_bits(load_weights(notebook[case]), base_weights(sd1, trained))


def test_vocabulary_has_these_ids():
    """The ids that the tests above write out, looked up in the vocabulary file itself."""
    ids = json.loads((EMBEDDED / "tokenizer" / "vocab.json").read_text())
    pieces = {"ktn": 42170, "pll": 47629, "ucd": 44746, "cat</w>": 2368, "pll</w>": 25266, "ucd</w>": 43514}
    assert {piece: ids[piece] for piece in pieces} == pieces


# On a GPU


@pytest.mark.parametrize(
    "values, is_told",
    [({"lr_scheduler": "cosine"}, True), ({"lr_scheduler": "cosine", "lr_warmup_steps": 1}, False), ({}, False)],
)
def test_warm_up_that_is_longer_than_the_run(values, is_told, one_concept, tmp_path):
    """The guide's default is 500 steps; a constant rate has none."""
    fork(tmp_path / "run", max_train_steps=2, **one_concept | values)
    said = (tmp_path / "run.log").read_text()
    assert ("The learning rate warms up for 500 steps, longer than the run" in said) == is_told


@pytest.mark.parametrize("more, numbers", [({}, 3), ({"keep_apart": True}, 5)])
def test_memory_is_told(more, numbers, one_concept, tmp_path):
    """The base model, what is trained, and besides of each trained number a gradient, two means, and what is kept."""
    values = one_concept | {"pretrained_model_name_or_path": EMBEDDED, "max_train_steps": 1} | more
    folder = fork(tmp_path / "run", **values)
    pipeline = fresh_pipeline(EMBEDDED)
    base = sum(p.numel() for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters())
    trained = sum(value.numel() for value in load_trained(folder).values())
    told = re.search("Memory: ([0-9,]+) MB for weights", (tmp_path / "run.log").read_text())[1]
    assert abs(int(told.replace(",", "")) - 4 * (base + trained * (1 + numbers)) / 1e6) < 0.51


def check_trained_on_a_gpu(folder):
    """What was trained is float32, finite and elsewhere than it began, and diffusers loads it."""
    trained = load_trained(folder)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in trained.values())
    assert movement(EMBEDDED, trained) > 0
    check_loading(EMBEDDED, folder, "<new1>", "photo of a <new1> cat")


@pytest.fixture
def gpu_flags(one_real_concept):
    """The trained model of the repository at its own resolution, with class pictures."""
    return one_real_concept | {
        "pretrained_model_name_or_path": EMBEDDED,
        "resolution": 128,
        "train_batch_size": 2,
        "max_train_steps": 12,  # fp16's gradient scaler skips the first ones
        "learning_rate": 1e-2,
    }


@pytest.mark.gpu
@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu(precision, freeze_model, gpu_flags, tmp_path):
    values = {"mixed_precision": precision, "freeze_model": freeze_model}
    folder = train(tmp_path / "run", **gpu_flags | values)
    assert "cuda" in (folder / "stdout.txt").read_text()
    check_trained_on_a_gpu(folder)


@pytest.mark.gpu
def test_fp16_goes_on_from_another_precision_on_a_gpu(gpu_flags, tmp_path):
    """A checkpoint that was made without a gradient scaler has no state for it."""
    train(tmp_path / "run", **gpu_flags | {"max_train_steps": 2, "checkpointing_steps": 2})
    values = {"mixed_precision": "fp16", "resume_from_checkpoint": "latest", "checkpointing_steps": 6}
    for steps in (6, 12):
        folder = train(tmp_path / "run", **gpu_flags | values | {"max_train_steps": steps})
    assert "checkpoint-6, step 6" in (folder / "stdout.txt").read_text()
    check_trained_on_a_gpu(folder)


@pytest.mark.gpu
def test_8bit_adam_on_a_gpu(gpu_flags, tmp_path):
    if not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("needs bitsandbytes")
    check_trained_on_a_gpu(train(tmp_path / "run", use_8bit_adam=True, **gpu_flags))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_xformers_on_a_gpu(precision, gpu_flags, tmp_path):
    if not importlib.util.find_spec("xformers"):
        pytest.skip("needs xformers")
    values = {"enable_xformers_memory_efficient_attention": True, "mixed_precision": precision}
    check_trained_on_a_gpu(train(tmp_path / "run", **gpu_flags | values))
