"""What training computes, against the same steps written out here, and what must not change it."""

import json
import math

import pytest
import torch
from conftest import (
    EMBEDDED,
    base_weights,
    beginning,
    distance,
    fresh_pipeline,
    load_trained,
    load_weights,
    movement,
    python,
    same_bits,
    train,
)

# The trainer in a notebook, with the library calls recorded that say what was trained on: latents, noise, timesteps
# and token ids of every step, and the models as they are in the end.
RECORDER = """
import sys, torch, accelerate
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel
from train_custom_diffusion import main, parse_args

record, models = {"noised": [], "ids": []}, {}
add_noise, forward = DDPMScheduler.add_noise, CLIPTextModel.forward
def recorded_add_noise(self, latents, noise, timesteps):
    record["noised"].append([latents.clone(), noise.clone(), timesteps.clone()])
    return add_noise(self, latents, noise, timesteps)
def recorded_forward(self, input_ids=None, *args, **kwargs):
    if torch.is_grad_enabled():
        record["ids"].append(input_ids.clone())
    return forward(self, input_ids, *args, **kwargs)
def keep(cls):
    load = cls.from_pretrained
    def loader(*args, **kwargs):
        loaded = load(*args, **kwargs)
        models.setdefault(cls.__name__, loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded
    cls.from_pretrained = loader
DDPMScheduler.add_noise, CLIPTextModel.forward = recorded_add_noise, recorded_forward
keep(UNet2DConditionModel), keep(CLIPTextModel), keep(AutoencoderKL)

accelerate.notebook_launcher(main, (parse_args(sys.argv[2:]),), num_processes=1)
record["models"] = {name: dict(model.state_dict()) for name, model in models.items()}
torch.save(record, sys.argv[1])
"""


def record(folder, **values):
    """Trains two steps in a notebook; returns its folder and the record."""
    from conftest import flags

    values = {
        "output_dir": folder / "run",
        "resolution": 64,
        "noaug": True,
        "center_crop": True,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1,
        "adam_epsilon": 1,  # then a step is nearly the gradient itself, not its sign
    } | values
    cwd = values.pop("cwd")
    python(RECORDER, folder / "record.pt", *flags(**values), cwd=cwd)
    return folder / "run", torch.load(folder / "record.pt", weights_only=True)


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
            for name, gradient in gradients.items():
                gradient = gradient * min(1, 1 / (norm + 1e-6))
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
    from test_outputs import check_loading, check_weight_files

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
    assert len(timesteps.unique()) == len(timesteps) and 0 <= timesteps.min() and timesteps.max() < 1000


@pytest.fixture(scope="module")
def recorded_hard(two_real_concepts, tmp_path_factory):
    """Two words, a learning rate and a weight decay that move all that they touch."""
    flags = two_real_concepts | {
        "learning_rate": 1,
        "adam_epsilon": 1e-8,
        "adam_weight_decay": 0.5,
        "cwd": None,
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
            assert torch.equal(kept, value), key


def test_all_that_is_trained_moves(recorded_hard, sd1):
    """Every projection and both words, so that what is frozen had every occasion to move."""
    trained = load_trained(recorded_hard[0])
    begin = beginning(sd1, trained)
    assert begin.keys() == trained.keys()
    assert all((trained[key] - begin[key]).abs().mean() > 0.1 for key in trained)


def test_optimizer_holds_what_is_trained(recorded_hard):
    """Adam's moments have the shapes of the trained parameters and of nothing else."""
    folder, _ = recorded_hard
    state = torch.load(folder / "checkpoint-2" / "training_state.pt", weights_only=True)["optimizer"]
    shapes = [tuple(value.shape) for value in load_weights(folder).values()] + [(2, 32)]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert sorted(tuple(parameter[moment].shape) for parameter in state.values()) == sorted(shapes)


# What must not change the result


@pytest.fixture(scope="module")
def plain(plain_flags, tmp_path_factory):
    """`trained` again without validation, checkpoints, trackers and worker processes."""
    return train(tmp_path_factory.mktemp("runs") / "plain", **plain_flags)


def test_same_seed_same_bits(trained, plain):
    """With and without validation, checkpoints, trackers and worker processes."""
    assert same_bits(load_trained(trained), load_trained(plain))


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
def test_bf16(freeze_model, cat_flags, sd1, tmp_path):
    """Mixed precision trains in float32 and goes where full precision goes, within bf16's rounding."""
    flags = cat_flags | {"max_train_steps": 2, "freeze_model": freeze_model, "adam_epsilon": 1, "learning_rate": 1}
    folder = train(tmp_path / "run", launcher="accelerate", mixed_precision="bf16", **flags)
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


@pytest.mark.parametrize("case", INITIALIZERS)
def test_initializers(case, notebook, sd1):
    """A notebook trained each of these with a learning rate of 0."""
    words, _, rows = INITIALIZERS[case]
    table = fresh_pipeline(sd1).text_encoder.get_input_embeddings().weight
    trained = load_trained(notebook[case])
    for word, row in zip(words.split("+"), rows, strict=True):
        assert torch.equal(trained[word], table[row]), (word, row)
    assert same_bits(load_weights(notebook[case]), base_weights(sd1, trained))


@pytest.fixture(scope="module")
def notebook(cat_flags, sd1, world, tmp_path_factory):
    """One notebook in which main runs again and again: {case: output_dir}."""
    from conftest import flags

    folder = tmp_path_factory.mktemp("notebook")
    calls = []
    for case, (words, initializers, _) in INITIALIZERS.items():
        values = {
            "pretrained_model_name_or_path": sd1,
            "output_dir": folder / case,
            "instance_data_dir": world / "my_cat",
            "instance_prompt": f"photo of {words.replace('+', ' ')} cat",
            "modifier_token": words,
            "initializer_token": initializers,
            "resolution": 64,
            "train_batch_size": 1,
            "max_train_steps": 1,
            "learning_rate": 0,
            "report_to": "none",
            "dataloader_num_workers": 0,
        }
        calls.append(flags(**values))
    code = "import json, sys\nfrom train_custom_diffusion import main, parse_args\n"
    code += "for call in json.loads(sys.argv[1]): main(parse_args(call))"
    python(code, json.dumps(calls))
    return {case: folder / case for case in INITIALIZERS}


def test_vocabulary_has_these_ids():
    """The ids that the tests above write out, looked up in the vocabulary file itself."""
    ids = json.loads((EMBEDDED / "tokenizer" / "vocab.json").read_text())
    pieces = {"ktn": 42170, "pll": 47629, "ucd": 44746, "cat</w>": 2368, "pll</w>": 25266, "ucd</w>": 43514}
    assert {piece: ids[piece] for piece in pieces} == pieces
