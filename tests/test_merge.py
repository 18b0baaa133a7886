"""scripts/merge.py: its weights against the formulas, solved here by NumPy on features that diffusers' pipeline makes.

Two results of one model are merged, a cat's and a pot's, which both call their word <new1>.
"""

import contextlib
import io
import os
import re
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from launching import ROOT, flags, fork, fork_script, run
from reading import (
    WEIGHTS,
    check_weight_files,
    load_as_a_user,
    load_trained,
    load_weights,
    loaded_pipeline,
)
from records import base_digest, copy_result, moved_model, only_bin, rename_words, set_record, settings_of
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "scripts"))
import merge as script  # noqa: E402
from results import Problem  # noqa: E402

MERGE = ROOT / "scripts" / "merge.py"
TEMPLATES = script.TEMPLATES.read_text().splitlines()
CAPTIONS = ["a red fish on the beach", "two dogs", "photo of a house at night", "a very old and blue car, striped"] * 2


@pytest.fixture(scope="module")
def results(one_concept, world, tmp_path_factory):
    """Folders of a cat and of a pot."""
    folder = tmp_path_factory.mktemp("merge")
    pot = {"instance_data_dir": world / "my_pot", "instance_prompt": "photo of a <new1> pot"}
    values = {"max_train_steps": 4, "learning_rate": 1e-2, "checkpointing_steps": 4}
    return {name: fork(folder / name, **one_concept | values | more) for name, more in (("cat", {}), ("pot", pot))}


def words_of(*results, model, output_dir, rename=(), concepts=(), **values):
    """Command-line arguments."""
    lists = {"--rename": rename, "--concepts": concepts}
    words = [word for name, given in lists.items() if given for word in (name, *given)]
    words += flags(pretrained_model_name_or_path=model, output_dir=output_dir, **values)
    return [*map(str, results), *map(str, words)]


def merge(*results, **values):
    """Runs the script as a user does; returns what it printed."""
    return merge_with_warnings(*results, **values)[0]


def merge_with_warnings(*results, **values):
    """Runs the script as a user does; returns what it printed, and its lines of warning."""
    process = fork_script(MERGE, *words_of(*results, **values))
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout, warnings_in(process.stderr)


def merge_here(*results, **values):
    """The same by calling the script's main in this process, which has torch already."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as errors:
        script.main(script.parse_args(words_of(*results, **values)))
    return said.getvalue(), warnings_in(errors.getvalue())


def warnings_in(text):
    """Its lines, which are all warnings."""
    lines = text.splitlines()
    assert all(line.startswith("warning: ") for line in lines), text
    return lines


@pytest.fixture(scope="module")
def joined(results, sd1, tmp_path_factory):
    """Cat and pot joined, with captions of our own: the new result, and what was printed."""
    folder = tmp_path_factory.mktemp("joined")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    pot = results["pot"]
    # the slash is what shells complete
    options = {"rename": [f"{pot}/:<new1>=<new2>"], "weight": 5, "class_weight": 3, "ridge": 1e-3}
    said = merge(*results.values(), model=sd1, output_dir=folder / "run", captions=folder / "captions.txt", **options)
    return folder / "run", said


# The formulas


def layer(key):
    return key.replace("processor.", "").replace("_custom_diffusion", "")


@pytest.fixture(scope="module")
def features(results, sd1):
    """Text features of prompts, from token `first` to ten tokens after the end of each: float64 (n, dim)."""
    pipeline = load_as_a_user(sd1, results["cat"], ["<new1>"], "safetensors")
    row = load_trained(results["pot"])["<new1>"]
    pipeline.load_textual_inversion({"<new2>": row}, token="<new2>")

    def encode(prompts, first=0):
        found = []
        for start in range(0, len(prompts), 50):
            options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
            ids = pipeline.tokenizer(prompts[start : start + 50], **options).input_ids
            with torch.no_grad():
                rows = pipeline.text_encoder(ids)[0].double().numpy()
            ends = [row.index(pipeline.tokenizer.eos_token_id) for row in ids.tolist()]
            found += [row[first : end + 11] for row, end in zip(rows, ends, strict=True)]
        return np.concatenate(found)

    return encode


def parts_of(features, things, first=1):
    return [features([template.format(thing) for template in TEMPLATES], first) for thing in things]


def trained_weights(results, sd1):
    """{key: (W0, [W of the cat, W of the pot])} in float64."""
    base = loaded_pipeline(sd1).unet.state_dict()
    tables = [load_weights(folder) for folder in results.values()]
    return {k: (base[layer(k)].double().numpy(), [table[k].double().numpy() for table in tables]) for k in tables[0]}


def check_least_squares(found, results, sd1, features, concepts, weights):
    """The rows of one overdetermined system, weighted by the square roots of the weights, solved by numpy."""
    concept_weight, class_weight, ridge_weight = weights
    rest, classes = features(CAPTIONS), parts_of(features, ["cat", "pot"], first=0)
    for key, (own, ours) in trained_weights(results, sd1).items():
        ridge = (ridge_weight * np.square(rest).mean()) ** 0.5
        rows, values = [np.eye(len(own.T)) * ridge], [own.T * ridge]
        kept = [(rest, 1, own), *((part, class_weight, own) for part in classes)]
        for part, weight, target in [
            *kept,
            *((part, concept_weight, weights) for part, weights in zip(concepts, ours, strict=True)),
        ]:
            scale = (weight / len(part)) ** 0.5
            rows.append(scale * part)
            values.append(scale * part @ target.T)
        solution = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)[0].T
        assert np.abs(found[key].numpy() - solution).max() < 2e-5 * np.abs(solution).max(), key
        assert np.abs(solution - own).max() > 1e-3, "the concepts are there"


def test_least_squares(joined, results, sd1, features):
    """The features of the whole phrases are to stay."""
    concepts = parts_of(features, ["<new1> cat", "<new2> pot"])
    check_least_squares(load_weights(joined[0]), results, sd1, features, concepts, (5, 3, 1e-3))


APART_CASES = {  # what was trained with --keep_apart, flags, and the weights of concepts, classes and ridge
    "one of two": (["cat"], {}, (10, 4, 1e-2)),
    "all": (["cat", "pot"], {}, (0.3, 16, 1e-2)),
    "all, with a weight": (["cat", "pot"], {"weight": 2}, (2, 16, 1e-2)),
    "all, without classes": (["cat", "pot"], {"class_weight": 0}, (0.3, 0, 1e-2)),
}


@pytest.mark.parametrize("case", APART_CASES)
def test_trained_apart(case, results, sd1, features, tmp_path):
    """Of a result of --keep_apart, the features of the word alone are to stay; if all are such, they count less."""
    apart, flags, weights = APART_CASES[case]
    folders = dict(results)
    for name in apart:
        folders[name] = copy_result(results[name], tmp_path / name, keep_apart=True)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    options = {"rename": [f"{folders['pot']}:<new1>=<new2>"], "captions": tmp_path / "captions.txt"} | flags
    merge(*folders.values(), model=sd1, output_dir=tmp_path / "run", **options)
    things = {"cat": "<new1> cat", "pot": "<new2> pot"}
    wanted = dict(zip(things, parts_of(features, things.values()), strict=True))
    for name in apart:
        word = features_of_the_word(features, loaded_pipeline(sd1).tokenizer, things[name])
        assert len(word) < len(wanted[name])
        wanted[name] = word
    check_least_squares(load_weights(tmp_path / "run"), results, sd1, features, wanted.values(), weights)
    assert settings_of(tmp_path / "run")["keep_apart"] is (len(apart) == len(folders))


def features_of_the_word(features, tokenizer, thing):
    """The text features of a phrase's first token in all templates: (templates, dim)."""
    rows = []
    for template in TEMPLATES:
        position = len(tokenizer(template.partition("{}")[0]).input_ids) - 1
        rows.append(features([template.format(thing)])[position])
    return np.stack(rows)


def test_clip_skip(results, sd1, tmp_path):
    """Merging sees the layer of the text encoder with which the training was done, and the new result names it."""
    cat = copy_result(results["cat"], tmp_path / "cat", clip_skip=1)
    pipeline, seen = loaded_pipeline(sd1), []
    encoder = pipeline.text_encoder
    norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
    prompts = ["photo of a cat", "two dogs"]
    for prompt in prompts:
        ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            rows = norm(encoder(ids, output_hidden_states=True).hidden_states[-2])[0].double()
        seen.append(rows[: len(prompt.split()) + 2 + 10])
    found = script.encode([(pipeline.tokenizer, encoder)], prompts, clip_skip=1)
    assert torch.equal(found, torch.cat(seen))
    assert not torch.allclose(found, script.encode([(pipeline.tokenizer, encoder)], prompts, clip_skip=0))
    merge_here(cat, model=sd1, output_dir=tmp_path / "run")
    merge_here(results["cat"], model=sd1, output_dir=tmp_path / "plain")
    assert settings_of(tmp_path / "run")["clip_skip"] == 1
    assert not same_weights(tmp_path / "run", tmp_path / "plain")
    options = {"rename": [f"{results['pot']}:<new1>=<new2>"]}
    line = refusal(cat, results["pot"], model=sd1, output_dir=tmp_path / "no", **options)
    assert line.startswith("error: results: trained with --clip_skip 0 and 1")


def test_the_paper_s_form(results, sd1, features, tmp_path):
    """W = W0 + v^T d with d = C (R^T R)^-1 and v^T = (V - W0 C^T) (d C^T)^-1, softened by the ridge."""
    merge(results["cat"], model=sd1, output_dir=tmp_path / "run", method="paper", ridge=1e-2)
    rest = features((ROOT / "scripts" / "captions.txt").read_text().splitlines())
    (targets,) = parts_of(features, ["<new1> cat"])
    d = targets @ np.linalg.inv(rest.T @ rest / len(rest) + 1e-6 * np.eye(rest.shape[1]))
    inverse = np.linalg.inv(d @ targets.T + 1e-2 * np.eye(len(d)))
    found = load_weights(tmp_path / "run")
    for key, (own, (trained, _)) in trained_weights(results, sd1).items():
        v = (trained - own) @ targets.T @ inverse
        seen = np.concatenate([rest[:500], targets]).T  # nothing else reaches the weights
        expected = v @ d @ seen
        assert np.abs((found[key].numpy() - own) @ seen - expected).max() < 1e-3 * np.abs(expected).max(), key


def test_what_is_printed(joined, results, sd1, features):
    """How much of the trained change is kept on its prompts, and by how much other keys and values move."""
    found = {key: value.double().numpy() for key, value in load_weights(joined[0]).items()}
    rest, concepts = features(CAPTIONS), parts_of(features, ["<new1> cat", "<new2> pot"])
    trained, expected = trained_weights(results, sd1), []
    for i, (thing, part) in enumerate(zip(("<new1> cat", "<new2> pot"), concepts, strict=True)):
        lost = norm((found[key] - ours[i]) @ part.T for key, (_, ours) in trained.items())
        lost /= norm((ours[i] - own) @ part.T for own, ours in trained.values())
        expected.append((thing, f"{100 * (1 - lost):.0f}"))
    assert re.findall("^(.+): (.+) % of what was trained is kept$", joined[1], re.MULTILINE) == expected
    moved = 100 * norm((found[k] - own) @ rest.T for k, (own, _) in trained.items())
    moved /= norm(own @ rest.T for own, _ in trained.values())
    assert f"of {len(CAPTIONS)} other captions move by {moved:.2g} %" in joined[1]


def norm(arrays):
    return sum(float(np.square(array).sum()) for array in arrays) ** 0.5


@pytest.mark.parametrize("weight, warns", [(1e-3, True), (1e6, False)])
def test_warns_where_little_is_kept(weight, warns, results, sd1, tmp_path):
    words = words_of(results["cat"], model=sd1, output_dir=tmp_path / "run", weight=weight)
    process = fork_script(MERGE, *words)
    assert process.returncode == 0
    assert ("warning: <new1> will be weaker" in process.stderr) == warns
    assert (int(re.search(r"(-?\d+) % of what was trained is kept", process.stdout)[1]) < 60) == warns


# The result


def test_result_is_like_the_trainer_s(joined, results, sd1):
    """Files, names, shapes and types; the words are those that were trained; diffusers loads it."""
    folder, _ = joined
    check_weight_files(sd1, folder, ["<new1>", "<new2>"], ("to_k.weight", "to_v.weight"))
    for word, name in (("<new1>", "cat"), ("<new2>", "pot")):
        assert torch.equal(load_trained(folder)[word], load_trained(results[name])["<new1>"])
    for suffix in ("safetensors", "bin"):
        state = load_as_a_user(sd1, folder, ["<new1>", "<new2>"], suffix).unet.state_dict()
        assert all(torch.equal(state[key], value) for key, value in load_weights(folder).items())


def test_result_is_taken_as_an_input(joined, sd1, tmp_path):
    """By merge.py, which knows its words' prompts, and by export.py."""
    said = merge(joined[0], model=sd1, output_dir=tmp_path / "again")
    assert "<new1> cat: " in said and "<new2> pot: " in said
    words = flags(pretrained_model_name_or_path=sd1, output=tmp_path / "lora.safetensors")
    assert fork_script(ROOT / "scripts" / "export.py", tmp_path / "again", *words).returncode == 0


@pytest.mark.parametrize("kind", ["of --no_safe_serialization", "of diffusers' script", "checkpoint", "on a GPU"])
def test_result_in_bin_alone(kind, results, sd1, tmp_path):
    """It gives the same as the result in .safetensors; of these a checkpoint alone has a record of its prompts."""
    bare = only_bin(copy_result(results["cat"], tmp_path / "bare"))
    if kind == "of diffusers' script":
        file = bare / f"{WEIGHTS}.bin"
        table = torch.load(file)
        assert {} in table.values()
        parameters = {key: torch.nn.Parameter(value) if len(value) else value for key, value in table.items()}
        torch.save(parameters, file)
    elif kind == "checkpoint":
        bare = only_bin(shutil.copytree(results["cat"] / "checkpoint-4", tmp_path / "checkpoint-4"))
    given = {} if kind == "checkpoint" else {"concepts": ["<new1> cat"]}
    merge_here(bare, model=sd1, output_dir=tmp_path / "run", **given)
    merge_here(results["cat"], model=sd1, output_dir=tmp_path / "same")
    found, expected = load_trained(tmp_path / "run"), load_trained(tmp_path / "same")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def same_weights(left, right):
    """Whether two folders have the same trained weights and words."""
    found, expected = load_trained(left), load_trained(right)
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_result_without_settings(results, sd1, tmp_path):
    """Without the settings that the trainer records, the prompt has to be given; nothing else differs."""
    old = set_record(shutil.copytree(results["cat"], tmp_path / "old"), None)
    line = refusal(old, model=sd1, output_dir=tmp_path / "run")
    assert line.startswith("error: word <new1>: ") and "--concepts '<new1> " in line and not (tmp_path / "run").exists()
    merge(old, model=sd1, output_dir=tmp_path / "run", concepts=["<new1> cat"])
    merge(results["cat"], model=sd1, output_dir=tmp_path / "new")
    assert same_weights(tmp_path / "run", tmp_path / "new")


def test_another_tokenizer(results, sd1, tmp_path):
    """--tokenizer_name replaces the model's own, as in the trainer, and is read without the model's revision."""
    other = shutil.copytree(sd1, tmp_path / "model")
    shutil.move(other / "tokenizer", tmp_path / "tokenizer")
    options = {"tokenizer_name": tmp_path / "tokenizer", "revision": "main"}
    merge_here(results["cat"], model=other, output_dir=tmp_path / "run", **options)
    merge_here(results["cat"], model=sd1, output_dir=tmp_path / "same")
    assert same_weights(tmp_path / "run", tmp_path / "same")
    line = refusal(results["cat"], model=other, output_dir=tmp_path / "no", tokenizer_name=tmp_path / "gone")
    assert line.startswith(f"error: --tokenizer_name {tmp_path / 'gone'}: no such folder") and "\n" not in line


# Words and phrases


def phrases(*results, concepts=()):
    """{word: (phrase, the same without the new words)} that the script finds."""
    args = script.parse_args(words_of(*results, model="any", output_dir="any", concepts=concepts))
    found = script.read_concepts(args, script.read_inputs(args))
    return {concept.word: (concept.phrase, concept.plain) for concept in found}


@pytest.fixture
def recorded(results, tmp_path):
    """Makes a result of one or two words whose record has these prompts and captions."""

    def make(words, prompts=(), captions=()):
        folder = copy_result(
            results["cat"],
            tmp_path / "-".join(words),
            modifier_token="+".join(words),
            concepts=[[prompt, 5, 0] for prompt in prompts],
            captions=list(captions),
        )
        row = load_file(folder / "<new1>.safetensors")["<new1>"]
        for word in words:
            save_file({word: row}, folder / f"{word}.safetensors")
        return folder

    return make


@pytest.mark.parametrize("words, prompts, expected", [
    (["<new1>"], ["photo of a <new1> cat"], {"<new1>": ("<new1> cat", "cat")}),
    (["<new1>"], ["photo of a<new1>cat"], {"<new1>": ("<new1>cat", "cat")}),
    (["<new1>"], ["一只<new1>猫"], {"<new1>": ("<new1>猫", "猫")}),
    (["<new1>"], ["in the style of <new1>."], {"<new1>": ("<new1>", "")}),
    (["my1", "my10"], ["a my10 pot", "a my1 cat"], {"my1": ("my1 cat", "cat"), "my10": ("my10 pot", "pot")}),
    (["my1"], ["a my10 cat"], {"my1": ("my10 cat", "0 cat")}),  # as the tokenizer finds it, where my10 is no word
    (["Max"], ["a maximal photo of Max dog"], {"Max": ("Max dog", "dog")}),
    (["<new1>", "<new2>"], ["photo of a <new1> cat next to a <new2> pot"],
     {"<new1>": ("<new1> cat", "cat"), "<new2>": ("<new2> pot", "pot")}),
    (["<new1>", "<new2>"], ["a <new1> cat, <new2> pot and <new1> dog"],
     {"<new1>": ("<new1> cat", "cat"), "<new2>": ("<new2> pot", "pot")}),
    (["<new1>", "<new2>"], ["photo of <new1> <new2> cat"],
     {"<new1>": ("<new1>", ""), "<new2>": ("<new2> cat", "cat")}),
])  # fmt: skip
def test_phrases_of_prompts(words, prompts, expected, recorded):
    """A phrase goes from a word, wherever the tokenizer finds it, to the next one; its class has no word in it."""
    assert phrases(recorded(words, prompts)) == expected


@pytest.mark.parametrize("captions, expected", [
    (["photo of a <new2> pot on a table", "my <new2> pot on the grass, in May"], ("<new2> pot", "pot")),
    (["photo of a <new2> pot, red", "a <new2> pot, blue"], ("<new2> pot", "pot")),
    (["photo of a<new2>pot here", "the<new2>pot there"], ("<new2>pot", "pot")),
    (["a <new2> pot beside a <new1> cat", "a <new2> pot"], ("<new2> pot", "pot")),
    (["a <new2> flower pot", "<new2> flowers"], ("<new2>", "")),
    (["a <new2> pot in a tree"], ("<new2> pot in a tree", "pot in a tree")),
])  # fmt: skip
def test_phrases_of_captions(captions, expected, recorded):
    """A word that stands in no prompt takes its phrase from the words that all of its captions share."""
    folder = recorded(["<new1>", "<new2>"], ["photo of a <new1> cat"], ["no word", *captions])
    assert phrases(folder) == {"<new1>": ("<new1> cat", "cat"), "<new2>": expected}


def test_phrases_that_are_given(recorded):
    """--concepts finds words as the tokenizer does, and keeps a phrase of one word whole."""
    folder = recorded(["my1", "my10"], ["a my1 cat", "a my10 dog"])
    found = phrases(folder, concepts=["my10 pot"])
    assert found == {"my1": ("my1 cat", "cat"), "my10": ("my10 pot", "pot")}
    found = phrases(folder, concepts=["small my1 cat", "dog my10"])
    assert found == {"my1": ("small my1 cat", "small cat"), "my10": ("dog my10", "dog")}
    found = phrases(folder, concepts=["my1 cat and my10 pot"])
    assert found == {"my1": ("my1 cat", "cat"), "my10": ("my10 pot", "pot")}


def test_class_of_several_words_in_one_prompt(recorded, sd1, tmp_path):
    """Neither word reaches the prompts of the other's class: one prompt gives the weights of two."""
    one = recorded(["<new1>", "<new2>"], ["a <new1> cat beside a <new2> pot"])
    merge_here(one, model=sd1, output_dir=tmp_path / "one")
    set_record(one, settings_of(one) | {"concepts": [["a <new1> cat", 5, 0], ["a <new2> pot", 5, 0]]})
    merge_here(one, model=sd1, output_dir=tmp_path / "two")
    assert same_weights(tmp_path / "one", tmp_path / "two")


def test_words_of_the_record(results, sd1, tmp_path):
    """A word that an earlier run left in the folder is none of the result's; those of the record keep their order."""
    folder = copy_result(results["cat"], tmp_path / "cat")
    shutil.copy(results["pot"] / "<new1>.safetensors", folder / "<new2>.safetensors")
    said, _ = merge_here(folder, model=sd1, output_dir=tmp_path / "run")
    assert "<new2>" not in said and settings_of(tmp_path / "run")["modifier_token"] == "<new1>"
    pot = rename_words(copy_result(results["pot"], tmp_path / "pot"), {"<new1>": "aardvark1"})
    merge_here(folder, pot, model=sd1, output_dir=tmp_path / "both")
    assert settings_of(tmp_path / "both")["modifier_token"] == "<new1>+aardvark1"
    shutil.copy(tmp_path / "both" / "aardvark1.bin", tmp_path / "both" / "0.bin")
    said, _ = merge_here(tmp_path / "both", model=sd1, output_dir=tmp_path / "again")
    assert said.index("<new1> cat: ") < said.index("aardvark1 pot: ")
    assert settings_of(tmp_path / "again")["modifier_token"] == "<new1>+aardvark1"
    assert not (tmp_path / "again" / "0.bin").exists()


def test_captions_with_a_new_word_do_not_count(results, sd1, tmp_path):
    """What is to stay as it was can't be what the word has learned."""
    lines = ["a red fish", "two dogs on the beach"]
    (tmp_path / "plain.txt").write_text("\n".join(lines))
    # with the mark that some editors put at the beginning of a text
    (tmp_path / "mixed.txt").write_bytes("\ufeff{}\r\n\r\na <new1> cat\r\n{}".format(*lines).encode())
    for name in ("plain", "mixed"):
        said, _ = merge_here(results["cat"], model=sd1, output_dir=tmp_path / name, captions=tmp_path / f"{name}.txt")
        assert "of 2 other captions" in said
    assert same_weights(tmp_path / "plain", tmp_path / "mixed")


# What is warned of


def test_kept_apart_before(results, sd1, tmp_path):
    """A result that was kept apart says so, when it is put through again and when it is joined."""
    cat, warnings = merge_here(results["cat"], model=sd1, output_dir=tmp_path / "once")
    assert not warnings and settings_of(tmp_path / "once")["kept_apart"] is True
    for others, options in (([], {}), ([results["pot"]], {"rename": [f"{results['pot']}:<new1>=<new2>"]})):
        output = tmp_path / f"again{len(others)}"
        _, warnings = merge_here(tmp_path / "once", *others, model=sd1, output_dir=output, **options)
        assert len(warnings) == 1 and str(tmp_path / "once") in warnings[0] and "before" in warnings[0]
        assert settings_of(output)["kept_apart"] is True


@pytest.mark.parametrize("joined_with", [[], ["pot"]])
def test_trained_with_class_pictures(joined_with, results, sd1, tmp_path):
    """Either class pictures or keeping apart: one line for a single result, none where results are joined."""
    cat = copy_result(results["cat"], tmp_path / "cat", with_prior_preservation=True)
    others = [results[name] for name in joined_with]
    renames = [f"{folder}:<new1>=<new2>" for folder in others]
    _, warnings = merge_here(cat, *others, model=sd1, output_dir=tmp_path / "run", rename=renames)
    assert len(warnings) == (not joined_with)
    assert joined_with or ("class pictures" in warnings[0] and str(cat) in warnings[0])
    assert settings_of(tmp_path / "run")["kept_apart"] == (not joined_with)


BASES = {  # how the base model is recorded, which files are given: words of the one line, if there is one
    "the same": ("base_model_fp16", torch.float32, torch.float32, 0, None),
    "the same in fp16": ("base_model_fp16", torch.float32, torch.float16, 0, None),
    "recorded from fp16": ("base_model_fp16", torch.float16, torch.float32, 0, None),
    "in bf16": ("base_model_fp16", torch.float32, torch.bfloat16, 0, "another precision"),
    "another": ("base_model_fp16", torch.float32, torch.float32, 1e-3, "another model"),
    "another in fp16": ("base_model_fp16", torch.float32, torch.float16, 1e-2, "another model"),
    "old record": ("base_model", torch.float32, torch.float32, 0, None),
    "old record, fp16": ("base_model", torch.float32, torch.float16, 0, "another precision"),
    "old record of fp16": ("base_model", torch.float16, torch.float32, 0, None),
    "old record, another": ("base_model", torch.float32, torch.float32, 1e-3, "another model"),
}


@pytest.mark.parametrize("name", BASES)
def test_model_of_the_record(name, results, sd1, tmp_path):
    """Another model of the same shapes is told in one line; the same in half precision is the same."""
    key, trained_in, given_in, step, words = BASES[name]
    source = sd1 if trained_in == torch.float32 else moved_model(sd1, tmp_path / "half", trained_in)
    stored = torch.float16 if key == "base_model_fp16" else torch.float32
    records = {"base_model": None, "base_model_fp16": None, key: base_digest(source, results["cat"], stored)}
    cat = copy_result(results["cat"], tmp_path / "cat", **records)
    model = moved_model(sd1, tmp_path / "model", given_in, step)
    _, warnings = merge_here(cat, model=model, output_dir=tmp_path / "run")
    assert len(warnings) == bool(words)
    assert not words or all(text in warnings[0] for text in (words, str(cat), str(model)))
    expected = base_digest(model, cat, torch.float16)  # that is what the new result fits
    assert settings_of(tmp_path / "run")["base_model_fp16"] == expected


def test_results_of_one_other_model(results, sd1, tmp_path):
    """Results that agree on their model are joined, with a line for each."""
    folders = [copy_result(results[name], tmp_path / name, base_model="ab", base_model_fp16="cd") for name in results]
    rename = [f"{folders[1]}:<new1>=<new2>"]
    _, warnings = merge_here(*folders, model=sd1, output_dir=tmp_path / "run", rename=rename)
    assert len(warnings) == 2 and all("another model" in line for line in warnings)


# What is refused


def refusal(*results, **values):
    """The line with which the script ends."""
    with pytest.raises(SystemExit) as ended:
        script.main(script.parse_args(words_of(*results, **values)))
    assert isinstance(ended.value.code, str), ended.value.code
    return str(ended.value)


def broken(results, sd1, tmp_path):
    """{case: (results, flags, words of the line)}."""
    cat, pot = results["cat"], results["pot"]
    crossattn, truncated, bins, other = (shutil.copytree(cat, tmp_path / n) for n in ("a", "b", "c", "other"))
    file = crossattn / f"{WEIGHTS}.safetensors"
    table = load_file(file)
    key = next(key for key in table if "to_k" in key)
    save_file(table | {key.replace("to_k", "to_q"): table[key].clone()}, file)
    file = truncated / f"{WEIGHTS}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (only_bin(bins) / f"{WEIGHTS}.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    set_record(other, settings_of(other) | {"base_model": "another", "base_model_fp16": "another"})
    wordless, incomplete, linked = (tmp_path / name for name in ("wordless", "incomplete", "linked"))
    copy_result(cat, wordless, modifier_token="")
    (copy_result(cat, incomplete, modifier_token="<new1>+<new2>") / "<new1>.bin").unlink()
    linked.symlink_to(cat)
    for name, text in (("blank.txt", " \n\n"), ("words.txt", "a <new1> cat\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "utf16.txt").write_text("a red fish", "utf-16")
    (tmp_path / "empty").mkdir()
    return {
        "queries": ([crossattn], {}, ["crossattn"]),
        "truncated": ([truncated], {}, ["corrupt"]),
        "pickled": ([bins], {}, [f"{WEIGHTS}.bin", "corrupt"]),
        "without a word": ([wordless], {}, ["wordless", "no word"]),
        "second without a word": ([cat, wordless], {}, ["wordless", "no word"]),
        "word of the record is gone": ([incomplete], {}, ["<new2>.safetensors", "missing"]),
        "output is the input": ([cat], {"output_dir": cat}, ["--output_dir", str(cat), "another folder"]),
        "output is the second input": ([pot, cat], {"output_dir": cat}, ["--output_dir", str(cat)]),
        "output by another path": ([cat], {"output_dir": cat / "logs" / ".."}, ["--output_dir", "another folder"]),
        "output is a link": ([cat], {"output_dir": linked}, ["--output_dir", "another folder"]),
        "input is a link": ([linked], {"output_dir": cat}, ["--output_dir", "another folder"]),
        "output is a checkpoint": ([cat], {"output_dir": cat / "checkpoint-4"}, ["--output_dir", "checkpoint-4"]),
        "input is a checkpoint": ([cat / "checkpoint-4"], {"output_dir": cat}, ["--output_dir", str(cat)]),
        "phrase without a word": ([cat], {"concepts": ["<new9> dog"]}, ["--concepts", "<new9> dog", "<new1>"]),
        "two phrases": ([cat], {"concepts": ["<new1> dog", "<new1> cat"]}, ["--concepts '<new1> cat'", "<new1> dog"]),
        "rename to a path": ([cat], {"rename": [f"{cat}:<new1>=a/b"]}, ["--rename", "slashes"]),
        "rename to a known word": ([cat], {"rename": [f"{cat}:<new1>=cat"]}, ["vocabulary has cat", "another word"]),
        "output is a file": ([cat], {"output_dir": tmp_path / "words.txt"}, ["--output_dir", "is a file"]),
        "rename to two words": ([cat], {"rename": [f"{cat}:<new1>=a+b"]}, ["--rename", "'+'"]),
        "blank captions": ([cat], {"captions": tmp_path / "blank.txt"}, ["--captions", "blank.txt", "no caption"]),
        "new words alone": ([cat], {"captions": tmp_path / "words.txt"}, ["--captions", "words.txt", "no caption"]),
        "captions in UTF-16": ([cat], {"captions": tmp_path / "utf16.txt"}, ["--captions", "UTF-8"]),
        "captions are a folder": ([cat], {"captions": tmp_path}, ["--captions", "UTF-8"]),
        "weight without measure": ([cat], {"weight": 1e308}, ["--weight", "finite"]),
        "empty": ([tmp_path / "empty"], {}, ["empty", f"no {WEIGHTS}"]),
        "one word twice": ([cat, pot], {}, [str(pot), "<new1>", "--rename"]),
        "word that is not there": ([cat], {"rename": [f"{cat}:<new3>=<new4>"]}, ["--rename", "<new3>"]),
        "rename without a result": ([cat], {"rename": ["<new1>=<new4>"]}, ["--rename", "RESULT:OLD=NEW"]),
        "other base models": ([cat, other], {"rename": [f"{other}:<new1>=<new2>"]}, ["different base models"]),
        "other shapes": ([cat], {"model": ROOT / "assets" / "model"}, ["is (", "in this model"]),
        "no captions": ([cat], {"captions": tmp_path / "gone.txt"}, ["--captions", "gone.txt"]),
        "no such model": ([cat], {"model": tmp_path / "gone"}, ["--pretrained_model_name_or_path", "no such folder"]),
        "no such folder or repository": ([cat], {"model": "models/sd"}, ["models/sd", "there is no such folder"]),
    }


def test_refused(results, sd1, tmp_path):
    """One line that names the flag or folder, and nothing written."""
    cases = broken(results, sd1, tmp_path)
    folders = [results["cat"], results["cat"] / "checkpoint-4"]
    before = {file: file.read_bytes() for folder in folders for file in folder.glob("*.*") if file.is_file()}
    for case, (given, values, words) in cases.items():
        line = refusal(*given, **{"model": sd1, "output_dir": tmp_path / "out"} | values)
        assert line.startswith("error: ") and "\n" not in line, case + line
        assert [word for word in words if word not in line] == [], case + line
        assert not (tmp_path / "out").exists(), case
        assert {file: file.read_bytes() for file in before} == before, case


@pytest.mark.parametrize("flag", ["weight=nan", "weight=inf", "weight=0", "weight=-5", "weight=ten", "class_weight=-1",
                                  "class_weight=nan", "ridge=-1e-3", "ridge=inf", "method=fast"])  # fmt: skip
def test_numbers(flag, results, sd1, tmp_path, capsys):
    """Argparse's status, and one line that names the flag."""
    words = [*words_of(results["cat"], model=sd1, output_dir=tmp_path / "out"), f"--{flag}"]
    with pytest.raises(SystemExit) as ended:
        script.parse_args(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and f"--{flag.partition('=')[0]}" in line


@pytest.mark.parametrize("method", ["paper", "least_squares"])
def test_no_ridge(method, results, sd1, tmp_path):
    """The features of this model's text encoder have the mean 0, so without a ridge the equations are singular."""
    (tmp_path / "captions.txt").write_text("two dogs\na fish\na house")
    options = {"method": method, "ridge": 0, "captions": tmp_path / "captions.txt"}
    line = refusal(results["cat"], model=sd1, output_dir=tmp_path / "run", **options)
    assert line == "error: --ridge: too small: the equations have no single solution; raise it"
    assert not (tmp_path / "run").exists()


def test_equations_without_a_single_solution():
    """Fewer features than their numbers, and nothing else that says what the weights are to be."""
    features = torch.randn(3, 8, dtype=torch.double)
    with pytest.raises(Problem, match="^--ridge: too small: .* raise it$"):
        script.exact_filters([features], features, ridge=0)
    with pytest.raises(Problem, match="^--ridge: "):
        script.filters([features], [features], features, weight=1, class_weight=1, ridge=0)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_ridge_follows_the_features_size(factor):
    """Of both forms: features of other text encoders are of another size, and the same numbers do the same."""
    torch.manual_seed(0)
    concept, plain, captions = torch.randn(3, 20, 8, dtype=torch.double) * torch.logspace(0, -4, 8)
    calls = {
        "least squares": lambda scale: script.filters(
            [scale * concept], [scale * plain], scale * captions, 10, 4, 1e-2
        ),
        "paper": lambda scale: script.exact_filters([scale * concept], scale * captions, 1e-2),
    }
    for name, call in calls.items():
        assert torch.allclose(call(factor)[0], call(1)[0], rtol=1e-6, atol=1e-9), name


# The machine


def both_scripts(result, model, folder):
    """{name: command} of merge.py, and of export.py for a whole model."""
    export = ROOT / "scripts" / "export.py"
    to_model = flags(pretrained_model_name_or_path=model, output=folder / "export", format="model")
    return {
        "merge": [MERGE, *words_of(result, model=model, output_dir=folder / "merge", weight=1e-3)],  # with a warning
        "export": [export, result, *to_model],
    }


@pytest.mark.parametrize("name, kind", [("merge", "broken pipe"), ("export", "full disk"), ("merge", "closed")])
def test_output_that_cannot_be_written(name, kind, results, sd1, tmp_path):
    """The result is written all the same: stdout and stderr are no part of it."""
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        options = {"stdout": writer, "stderr": writer}
        if kind == "full disk":
            options = {"stdout": full, "stderr": full}
        elif kind == "closed":
            options = {"stdout": None, "stderr": None, "preexec_fn": lambda: os.closerange(1, 3)}
        command = both_scripts(results["cat"], sd1, tmp_path)[name]
        process = run(sys.executable, *command, capture_output=False, **options)
    os.close(writer)
    assert process.returncode == 0
    (file,) = tmp_path.glob(f"merge/{WEIGHTS}.safetensors" if name == "merge" else "export/unet/*.safetensors")
    assert load_file(file)


def test_letters_that_the_output_lacks(results, sd1, tmp_path):
    """A word in another script, on a console that has no letters for it."""
    cat = rename_words(copy_result(results["cat"], tmp_path / "cat"), {"<new1>": "<猫>"})
    command = both_scripts(cat, sd1, tmp_path)["merge"]
    process = run(sys.executable, *command, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and "<\\u732b>" in process.stdout, process.stderr
    assert (tmp_path / "merge" / "<猫>.safetensors").exists()


@pytest.mark.parametrize("name", ["merge", "export"])
def test_ways_to_start_python(name):
    script = ROOT / "scripts" / f"{name}.py"
    for words in (["-m", f"scripts.{name}"], ["-P", script], ["-I", script], ["-OO", script]):
        # -P is of Python 3.11
        if words[0] != "-P" or sys.version_info >= (3, 11):
            process = run(sys.executable, *words, "--help", cwd=ROOT)
            assert process.returncode == 0 and "--pretrained_model_name_or_path" in process.stdout, process.stderr


@pytest.mark.parametrize("name", ["merge", "export"])
def test_broken_package(name, results, sd1, tmp_path):
    """It is named, and not what was being read; or it does not matter to this version of transformers."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-99.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 99.0\n"
    (tmp_path / "torchvision-99.0.dist-info" / "METADATA").write_text(metadata)
    command = both_scripts(results["cat"], sd1, tmp_path)[name]
    process = run(sys.executable, *command, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    if process.returncode:
        (line,) = process.stderr.splitlines()
        assert line.startswith("error: packages: torchvision: operator torchvision::nms") and "pip install" in line


@pytest.mark.parametrize("file", ["unet/config.json", "model_index.json", "unet/diffusion_pytorch_model.safetensors",
                                  "tokenizer/vocab.json", "text_encoder/model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("kind", ["pointer", "link"])
def test_content_that_was_left_elsewhere(kind, file, results, sd1, tmp_path):
    """A model cloned without Git LFS, or copied without what its links stand for: the line names the file."""
    model = shutil.copytree(sd1, tmp_path / "model")
    (model / file).unlink()
    if kind == "pointer":
        (model / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n")
    else:
        (model / file).symlink_to("../../blobs/gone")
    remedy = "run git lfs pull" if kind == "pointer" else "cp -rL"
    for command in both_scripts(results["cat"], model, tmp_path).values():
        process = fork_script(*command)
        lines = [line for line in process.stderr.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith(f"error: {model / file}: ") and remedy in lines[0], lines


def test_without_torch(results, tmp_path):
    """One line, as for the trainer."""
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    code += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    for name, output in (("merge.py", "output_dir"), ("export.py", "output")):
        words = flags(pretrained_model_name_or_path="any", **{output: tmp_path / "out.safetensors"})
        process = run(sys.executable, "-c", code, ROOT / "scripts" / name, results["cat"], *words)
        assert process.returncode == 1 and len(process.stderr.splitlines()) == 1, process.stderr
        assert process.stderr.startswith("error: packages: ") and "pip install" in process.stderr


def test_pickle_runs_no_code(results, sd1, tmp_path):
    """A .bin that would write a file when it is unpickled; a word's is left out, as no record names it."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name in (WEIGHTS, "<new1>"):
        folder = only_bin(copy_result(results["cat"], tmp_path / name))
        torch.save({"<new1>": Bomb()}, folder / f"{name}.bin")
        line = refusal(folder, model=sd1, output_dir=tmp_path / "run", concepts=["<new1> cat"])
        subject = folder / f"{WEIGHTS}.bin" if name == WEIGHTS else folder
        assert line.startswith(f"error: {subject}: ") and "\n" not in line and "weights_only" not in line
    assert not (tmp_path / "exploded").exists()


def test_full_disk(results, sd1, tmp_path):
    """One line, and nothing half-written."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # noqa: E731
    words = words_of(results["cat"], model=sd1, output_dir=tmp_path / "run")
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    process = run(sys.executable, MERGE, *words, preexec_fn=limit, env=env)
    assert process.returncode == 1 and len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith(f"error: {tmp_path}") and "disk" in process.stderr
    assert not list((tmp_path / "run").glob(".*")) and not (tmp_path / "run" / f"{WEIGHTS}.bin").exists()


def test_what_a_killed_run_left(results, sd1, tmp_path):
    """It is gone after the next run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".<new9>.safetensors.unfinished").write_bytes(b"half a file")
    merge(results["cat"], model=sd1, output_dir=tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


def test_errors_of_an_importer(results, sd1, tmp_path):
    """Whoever calls merge gets an exception that is none of the interpreter's exits."""
    args = script.parse_args(words_of(tmp_path, model=sd1, output_dir=tmp_path / "run"))
    with pytest.raises(Problem, match=WEIGHTS):
        script.merge(args)
