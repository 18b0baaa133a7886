"""Odd numbers, JSON, prompts and picture files by the hundred: each is taken, or refused with one line."""

import contextlib
import copy
import io
import itertools
import json
import os
import sys
import warnings

import numpy as np
import pytest
from conftest import EMBEDDED, SCRIPT, flags, make_picture, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import train_custom_diffusion as trainer

# the same examples in every run; max_examples can be raised to look for more
QUICK = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
NUMBER = itertools.count()


def outcome(function, *arguments):
    """What a function returns, or None if it ends the run as it should: with one line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            return function(*arguments)
        except SystemExit as end:
            line = said.getvalue().removesuffix("\n") if end.code == 2 else end.code
    assert isinstance(line, str) and "error: " in line and line.isprintable(), line
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    for name in ("cat", "class"):
        (folder / name).mkdir()
        make_picture(0).save(folder / name / "0.png")
    return folder


def words(folder, **values):
    return flags(
        **{
            "pretrained_model_name_or_path": "model",
            "instance_data_dir": folder / "cat",
            "instance_prompt": "a <new1> cat",
            "modifier_token": "<new1>",
            "class_data_dir": folder / "class",
            "class_prompt": "cat",
            "num_class_images": 1,
            "output_dir": folder / "run",
            "report_to": "none",
        }
        | values
    )


# Numbers

NUMERIC = """prior_loss_weight num_class_images sample_batch_size resolution train_batch_size seed learning_rate
    gradient_accumulation_steps num_train_epochs max_train_steps dataloader_num_workers lr_warmup_steps adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm num_validation_images validation_steps checkpointing_steps
    checkpoints_total_limit local_rank""".split()


@settings(max_examples=200, **QUICK)
@given(st.sampled_from(NUMERIC), st.one_of(st.integers(), st.floats(), st.text(max_size=9), st.just("9" * 4400)))
def test_numbers(name, value):
    """A number that is taken is finite, fits into 64 bits and, but for the process's, is not negative."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # which the parser may set
        args = outcome(trainer.parse_args, flags(**dict.fromkeys(["instance_data_dir", "instance_prompt"], "x")) + [
            "--pretrained_model_name_or_path=m", f"--{name}={value}"
        ])  # fmt: skip
    if args and name != "local_rank":
        assert 0 <= getattr(args, name) < 2**63


# Lists of concepts

ODD_CHARACTERS = st.one_of(st.characters(exclude_categories=()), st.sampled_from("\0\n\ud800\u2028\x1b/é"))
ANY_TEXT = st.text(ODD_CHARACTERS, max_size=20)


def right_concept(folder):
    values = ["a <new1> cat", str(folder / "cat"), "cat", str(folder / "class")]
    return dict(zip(["instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir"], values, strict=True))


@st.composite
def concepts(draw, folder):
    """A right concept in which often one thing is odd: a value, some letters of it, or a key."""
    concept = right_concept(folder)
    key = draw(st.sampled_from(list(concept)))
    change = draw(st.sampled_from(["nothing", "letters", "letters", "value", "key"]))
    if change == "letters":
        place = draw(st.integers(0, len(concept[key])))
        concept[key] = concept[key][:place] + draw(ANY_TEXT) + concept[key][place:]
    elif change == "value":
        values = st.one_of(ANY_TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(st.none()))
        concept[key] = draw(values)
    elif change == "key":
        concept[draw(ANY_TEXT)] = concept.pop(key)
    return concept


def documents(folder):
    """JSON that is nearly or quite a list of concepts, in several encodings; other JSON; such text damaged; bytes."""
    lists = st.lists(concepts(folder), min_size=1, max_size=2)
    other = st.recursive(
        st.one_of(st.none(), st.floats(), ANY_TEXT), lambda v: st.one_of(st.lists(v), st.dictionaries(ANY_TEXT, v))
    )
    text = st.builds(
        lambda v, only_ascii: json.dumps(v, ensure_ascii=only_ascii), st.one_of(lists, lists, other), st.booleans()
    )
    encodings = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"])
    encoded = st.builds(lambda t, encoding: t.encode(encoding, "surrogatepass"), text, encodings)
    right = json.dumps([right_concept(folder)]).encode()
    return st.one_of(encoded, encoded, damaged(st.just(right)), st.binary(max_size=50))


@st.composite
def damaged(draw, contents):
    """Bytes of which some are replaced, left out or added, or that end too early."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        content[start : start + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def read_list(folder, content, prior):
    (folder / "list.json").write_bytes(content)
    values = {"concepts_list": folder / "list.json", "with_prior_preservation": str(prior)}
    return trainer.read_concepts(trainer.parse_args(words(folder, **values)))


@settings(max_examples=150, **QUICK)
@given(st.data(), st.booleans())
def test_lists_of_concepts(folder, data, prior):
    concepts = outcome(read_list, folder, data.draw(documents(folder)), prior)
    for concept in concepts or ():
        assert "<new1>" in concept.instance_prompt and concept.instance_pictures
        assert len(concept.class_pictures) == len(concept.class_captions) <= prior
    assert not (folder / "run").exists()


@settings(max_examples=8, **QUICK)
@given(st.data())
def test_lists_of_concepts_as_processes(folder, light_python, data):
    """The list is refused with one line, or the script goes on to import torch, which is not there."""
    (folder / "list.json").write_bytes(data.draw(documents(folder)))
    process = run(sys.executable, SCRIPT, *words(folder, concepts_list=folder / "list.json"), env=light_python)
    lines = process.stderr.splitlines()
    assert process.returncode == 1 and process.stdout == ""
    assert (len(lines) == 1 and "error: " in lines[0]) or lines[-1].startswith("ModuleNotFoundError: import of")


# Prompts and words


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")


def take_prompt(folder, tokenizer, values):
    args = trainer.parse_args(words(folder, **values))
    concepts = trainer.read_concepts(args)
    token_ids, _ = trainer.add_modifier_tokens(tokenizer, args)
    trainer.check_instance_prompts(tokenizer, concepts, token_ids, args)
    return token_ids, trainer.tokenize_prompts(tokenizer, concepts, args), args.instance_prompt


WORD = st.one_of(
    st.just("<new1>"), st.sampled_from(["cat", "<NEW 1>", "a'b", "<|endoftext|>", "é", "\ud800", "n" * 250]), ANY_TEXT
)


@settings(max_examples=40, **QUICK)
@given(st.lists(WORD, min_size=1, max_size=3), st.lists(WORD, max_size=4), st.one_of(st.just("ktn+pll+ucd"), WORD))
def test_prompts_and_words(folder, tokenizer, tokens, others, initializer):
    """Whatever is taken is read whole, with every new word as its one new id."""
    prompt = " ".join([*others, *tokens])
    values = {"instance_prompt": prompt, "modifier_token": "+".join(tokens), "initializer_token": initializer}
    taken = outcome(take_prompt, folder, copy.deepcopy(tokenizer), values)
    if taken:
        token_ids, input_ids, prompt = taken
        assert set(token_ids) <= set(input_ids[prompt].tolist()) and len(set(token_ids)) == len(token_ids)
        assert all(ids.shape == (77,) and ids.max() < len(tokenizer) + len(token_ids) for ids in input_ids.values())


# Picture files


def picture_files():
    """Small whole files of the usual kinds."""
    options = {"png": {}, "jpg": {}, "gif": {}, "webp": {}, "bmp": {}, "tif": {"compression": "tiff_lzw"}, "ppm": {}}
    for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1", "I;16", "F", "LA"):
        for ending, more in options.items():
            content = io.BytesIO()
            image = make_picture(0, 9, 7)
            image = Image.new(mode, (9, 7)) if mode in ("I;16", "F") else image.convert(mode)
            with contextlib.suppress(OSError, KeyError, ValueError):  # not every format has every mode
                exif = Image.Exif()
                exif[0x0112] = 5
                image.save(content, Image.registered_extensions()[f".{ending}"], exif=exif, **more)
                yield content.getvalue()


@settings(max_examples=200, **QUICK)
@given(damaged(st.sampled_from(list(picture_files()))), st.sampled_from(["png", "jpg", "tif", "JPEG"]))
def test_picture_files(folder, content, ending):
    """What is taken is RGB and can be put on the canvas; nothing else is said but the one line."""
    file = folder / f"{next(NUMBER)}.{ending}"
    file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # a damaged size makes a large picture, which takes long
        refused = outcome(lambda: trainer.check_picture(file) or True) is None
    assert warned == []
    if not refused:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = trainer.load_picture(file)
        assert image.mode == "RGB"
        for scale in (21, 64, 80):
            pixels, mask = trainer.place_instance(image, scale, 64, 8, np.random.default_rng(0))
            assert np.abs(pixels).max() <= 1 and pixels.shape == (64, 64, 3) and mask.any()
    os.remove(file)


@settings(max_examples=60, **QUICK)
@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([64, 96]), st.integers(0, 2**32))
def test_sizes(width, height, size, seed):
    """Any size and shape of picture has a canvas full of numbers and a mask that is not empty."""
    rng = np.random.default_rng(seed)
    scale = trainer.draw_scale(size, rng)
    pixels, mask = trainer.place_instance(Image.new("RGB", (width, height)), scale, size, 8, rng)
    assert pixels.shape == (size, size, 3) and set(np.unique(pixels)) <= {-1, 0} and mask.any()
    assert (pixels[mask.repeat(8, 0).repeat(8, 1) > 0] == -1).any(), "the mask is on the picture"
