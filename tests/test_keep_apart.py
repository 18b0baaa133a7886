"""--keep_apart: what a step changes, against the formula worked out here; resuming, processes, and what is refused."""

import re
import shutil

import numpy as np
import pytest
import torch
from launching import FAST, ROOT, finish, flags, fork, in_one_process, start
from observers import record_files_and_weights
from reading import distance, fresh_pipeline, load_as_a_user, load_trained, load_weights, movement, same_bits
from safetensors.torch import load_file, save_file
from test_sdxl import fresh
from test_sdxl import load_as_a_user as load_xl

CAPTIONS = ["a red fish on the beach", "two dogs", "photo of a house at night", "a very old and blue car, striped"]
TEMPLATES = (ROOT / "scripts" / "templates.txt").read_text().splitlines()
PADDING = 10  # tokens after the end of a prompt that count
# A step changes weights by the gradient itself: AdamW divides it by epsilon and itself.
GRADIENT = {"learning_rate": 1e4, "adam_epsilon": 1e4, "adam_weight_decay": 0, "max_train_steps": 1}
GRADIENT |= {"initializer_token": "zebra"}


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A file of captions as users make them: empty lines, spaces, Windows' line ends, one with the new word."""
    file = tmp_path_factory.mktemp("captions") / "captions.txt"
    file.write_text("\r\n".join(["", *(f"  {caption} " for caption in CAPTIONS), "a <new1> cat"]), encoding="utf-16")
    return file


@torch.no_grad()
def text_features(pipeline, prompt, word=None):
    """(tokens, dim), float64: the word's alone, or from the start to the padding that counts."""
    tokens = pipeline.tokenizer(prompt).input_ids
    begin, end = 0, len(tokens) + PADDING
    if word:
        begin = tokens.index(pipeline.tokenizer(word).input_ids[1])
        end = begin + 1
    if hasattr(pipeline, "text_encoder_2"):
        features, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    else:
        ids = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        (features,) = pipeline.text_encoder(ids, return_dict=False)[:1]
    return features[0, begin:end].double().numpy()


def all_features(pipeline, things, word=None):
    """Those of every template with every one of the things, in rows."""
    return np.concatenate([text_features(pipeline, text.format(thing), word) for thing in things for text in TEMPLATES])


def mean_product(features):
    return features.T @ features / len(features)


def products_of_others(pipeline, captions, starts, classes):
    """R (dim, dim): of what is to stay. `starts` are the words of the vocabulary from which the new ones start."""
    rest = np.concatenate([text_features(pipeline, caption) for caption in captions])
    products = mean_product(rest) + 0.01 * np.square(rest).mean() * np.eye(rest.shape[1])
    for name in classes:
        products += 16 * mean_product(all_features(pipeline, [name]))
    for word in starts:
        products += 4 * mean_product(all_features(pipeline, [word], word))
    return products


def filter_of(pipeline, words, others):
    """F (dim, dim) = w C (R + w C)^-1 for the features C of the words, with w = 1."""
    wanted = sum(mean_product(all_features(pipeline, [word], word)) for word in words)
    return np.linalg.solve(others + wanted, wanted).T


def check_change(apart, plain, base, before, after):
    """A step on U in W = W0 + U F, then F for the word as it is now: where W would change by D, it does by D F^T F."""
    for key, own in base.items():
        expected = (plain[key] - own).double().numpy() @ before.T @ after
        found = (apart[key] - own).double().numpy()
        assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max(), key
        assert np.abs(found).max() > 1e-6


def check_run(folder, load, base_pipeline, prompts, starts, classes, **values):
    """Takes a step with and without --keep_apart, and checks the first by the second."""
    plain, apart = folder / "plain", folder / "apart"
    fork(plain, **values)
    fork(apart, keep_apart=True, **values)
    others = products_of_others(base_pipeline, prompts, starts, classes)
    before = filter_of(base_pipeline, starts, others)
    words = values["modifier_token"].split("+")
    after = filter_of(load(apart, words), words, others)
    weights = load_weights(apart)
    own = base_pipeline.unet.state_dict()
    base = {key: own[key.replace("processor.", "").replace("_custom_diffusion", "")] for key in weights}
    check_change(weights, load_weights(plain), base, before, after)
    assert np.abs(after - before).max() > 1e-4, "the word has moved"


def loader(model):
    """Loads a result into the base model with its words."""
    return lambda folder, words: load_as_a_user(model, folder, words, "safetensors")


def test_a_step(one_concept, captions, sd1, tmp_path):
    """The word's embedding learns as it would."""
    values = one_concept | GRADIENT | {"captions": captions}
    check_run(tmp_path, loader(sd1), fresh_pipeline(sd1), CAPTIONS, ["zebra"], ["cat"], **values)
    assert same_bits(*(load_file(tmp_path / name / "<new1>.safetensors") for name in ("plain", "apart")))


def test_several_steps(one_concept, captions, sd1, tmp_path):
    """What all steps have trained is filtered once, for the word as it is now: W = W0 + U F."""
    values = one_concept | GRADIENT | {"captions": captions, "keep_apart": True}
    fork(tmp_path / "run", **values | {"max_train_steps": 3, "checkpointing_steps": 3})
    checkpoint = tmp_path / "run" / "checkpoint-3"
    states = torch.load(checkpoint / "training_state.pt", weights_only=True)["optimizer"].values()
    unfiltered = [state["unfiltered"] for state in states if "unfiltered" in state]
    base_pipeline = fresh_pipeline(sd1)
    others = products_of_others(base_pipeline, CAPTIONS, ["zebra"], ["cat"])
    now = torch.from_numpy(filter_of(loader(sd1)(checkpoint, ["<new1>"]), ["<new1>"], others))
    own = base_pipeline.unet.state_dict()
    for key, weight in load_weights(checkpoint).items():
        base = own[key.replace("processor.", "").replace("_custom_diffusion", "")].double()
        trained = [each.double() for each in unfiltered if each.shape == base.shape]
        differences = [float((weight - base - (each - base) @ now).abs().max()) for each in trained]
        assert min(differences) < 1e-3 * float((weight - base).abs().max()), key


def test_a_step_of_sdxl(two_concepts, world, captions, sdxl, tmp_path):
    """Features of both text encoders side by side; two words in one prompt."""
    values = two_concepts | GRADIENT | {"pretrained_model_name_or_path": sdxl, "with_prior_preservation": None}
    values |= {"concepts_list": None, "instance_data_dir": world / "my_cat", "initializer_token": "zebra+red"}
    values |= {"instance_prompt": "photo of a <New1> cat on a <new2> pot", "captions": captions}
    prompts = [*CAPTIONS, "a <new1> cat"]  # other capitals, so not the word
    check_run(
        tmp_path,
        lambda folder, words: load_xl(sdxl, folder, "safetensors"),
        fresh(sdxl),
        prompts,
        ["zebra", "red"],
        ["cat on a pot"],
        **values,
    )


def test_class_before_the_word(one_concept, captions, sd1, tmp_path):
    values = one_concept | GRADIENT | {"instance_prompt": "a cat named <new1>", "captions": captions}
    check_run(tmp_path, loader(sd1), fresh_pipeline(sd1), CAPTIONS, ["zebra"], ["a cat named"], **values)


def test_several_concepts(two_concepts, captions, sd1, tmp_path):
    """Every word, and the class of every concept."""
    values = two_concepts | GRADIENT | {"with_prior_preservation": None, "captions": captions}
    values |= {"train_batch_size": 2, "initializer_token": "zebra+red"}
    prompts = [*CAPTIONS, "a <new1> cat"]
    check_run(tmp_path, loader(sd1), fresh_pipeline(sd1), prompts, ["zebra", "red"], ["cat", "pot"], **values)


WAYS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"mixed_precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "class pictures": {"with_prior_preservation": True, "real_prior": True, "class_prompt": "cat"},
    "freed gradients": {"set_grads_to_none": True, "max_grad_norm": 0},
}


@pytest.mark.parametrize("way", WAYS)
def test_resumes_to_the_bit(way, one_concept, world, tmp_path):
    """A run that stopped in the middle ends with the weights of one that did not, with the captions of the script."""
    values = one_concept | WAYS[way] | {"keep_apart": True, "max_train_steps": 4, "checkpointing_steps": 2}
    values |= {"class_data_dir": world / "cats"} if "class_prompt" in values else {}
    whole = load_trained(fork(tmp_path / "whole", **values))
    first = fork(tmp_path / "resumed", **values | {"max_train_steps": 2})
    assert not same_bits(load_trained(first), whole)
    fork(first, **values, resume_from_checkpoint="latest")
    assert same_bits(load_trained(first), whole)


@pytest.mark.slow
def test_processes_stay_equal(one_concept, captions, sd1, tmp_path):
    """Two processes hold the same bits, and what one process learns from as many pictures."""
    values = one_concept | {"keep_apart": True, "captions": captions, "max_train_steps": 3}
    values |= {"learning_rate": 1, "adam_epsilon": 1}
    fork(tmp_path / "two", processes=2, observer=record_files_and_weights, **values)
    weights = [torch.load(tmp_path / f"two.files{rank}.pt")[0] for rank in (0, 1)]
    assert same_bits(*weights)
    one, two = load_trained(fork(tmp_path / "one", **values, train_batch_size=2)), load_trained(tmp_path / "two")
    assert distance(one, two) < 1e-4 * movement(sd1, one)


def test_model_that_is_not_finite(one_concept, sd1, tmp_path):
    """In one line, before the first step."""
    model = shutil.copytree(sd1, tmp_path / "model")
    file = model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    (name,) = [name for name in weights if name.endswith("layers.0.mlp.fc1.bias")]
    save_file(weights | {name: weights[name] + torch.inf}, file, {"format": "pt"})
    values = one_concept | {"pretrained_model_name_or_path": model, "keep_apart": True}
    said = finish(start(tmp_path / "run", **values), tmp_path / "run", status=1)
    assert re.match(
        "error: --keep_apart: the text features are not finite; take another base model", said.splitlines()[-1]
    ), said[-2000:]
    assert "Traceback" not in said


REFUSED = {
    "no word": ({"modifier_token": None}, "--keep_apart needs --modifier_token"),
    "queries": ({"freeze_model": "crossattn"}, "--keep_apart needs .*--freeze_model crossattn_kv"),
    "no file": ({"captions": "/nowhere/captions.txt"}, "no file /nowhere/captions.txt; "),
    "empty file": ({"captions": "{folder}/empty.txt"}, "empty.txt: no prompt in it; give a text file"),
    "no text": ({"captions": "{folder}/picture.txt"}, "picture.txt: .*; give a text file"),
    "word alone": ({"captions": "{folder}/word.txt"}, "word.txt: no prompt in it without <new1>"),
}


def test_refused(one_concept, world, tmp_path):
    """In one line, before any step."""
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "word.txt").write_text("a <new1> cat")
    (tmp_path / "picture.txt").write_bytes((world / "my_cat" / "0.png").read_bytes())
    calls = {}
    for case, (more, _) in REFUSED.items():
        values = one_concept | {"keep_apart": True, "output_dir": tmp_path / case, "max_train_steps": 1} | more
        if "captions" in values:
            values["captions"] = values["captions"].format(folder=tmp_path)
        calls[case] = flags(**FAST | values)
    for case, answer in in_one_process({case: (tmp_path, words) for case, words in calls.items()}).items():
        assert answer["ended"] != "went on" and "Traceback" not in answer["printed"], answer
        said = f"{answer['printed']}{answer['ended']}"
        assert re.search(f"error: .*{REFUSED[case][1]}", said), (case, said)
        assert not (tmp_path / case).exists() or not list((tmp_path / case).glob("*.bin"))
