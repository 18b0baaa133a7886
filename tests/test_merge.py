"""scripts/merge.py: its weights against the formulas, solved here by NumPy on features that diffusers' pipeline makes.

Two results of one model are merged, a cat's and a pot's, which both call their word <new1>.
"""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from launching import ROOT, flags, fork, run
from reading import (
    WEIGHTS,
    check_weight_files,
    load_as_a_user,
    load_trained,
    load_weights,
    loaded_pipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "scripts"))
import merge as script  # noqa: E402

MERGE = ROOT / "scripts" / "merge.py"
TEMPLATES = [opening + ending for opening in script.OPENINGS for ending in script.ENDINGS]
CAPTIONS = ["a red fish on the beach", "two dogs", "photo of a house at night", "a very old and blue car, striped"] * 2


@pytest.fixture(scope="module")
def results(one_concept, world, tmp_path_factory):
    """Folders of a cat and of a pot."""
    folder = tmp_path_factory.mktemp("merge")
    pot = {"instance_data_dir": world / "my_pot", "instance_prompt": "photo of a <new1> pot"}
    values = {"max_train_steps": 4, "learning_rate": 1e-2}
    return {name: fork(folder / name, **one_concept | values | more) for name, more in (("cat", {}), ("pot", pot))}


def words_of(*results, model, output_dir, rename=(), concepts=(), **values):
    """Command-line arguments."""
    lists = {"--rename": rename, "--concepts": concepts}
    words = [word for name, given in lists.items() if given for word in (name, *given)]
    words += flags(pretrained_model_name_or_path=model, output_dir=output_dir, **values)
    return [*map(str, results), *map(str, words)]


def merge(*results, **values):
    """Runs the script as a user does; returns what it printed."""
    process = run(sys.executable, MERGE, *words_of(*results, **values))
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def joined(results, sd1, tmp_path_factory):
    """Cat and pot joined, with captions of our own: the new result, and what was printed."""
    folder = tmp_path_factory.mktemp("joined")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    pot = results["pot"]
    options = {"rename": [f"{pot}:<new1>=<new2>"], "weight": 5, "class_weight": 3, "ridge": 1e-3}
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


def test_least_squares(joined, results, sd1, features):
    """The rows of one overdetermined system, weighted by the square roots of the weights, solved by numpy."""
    rest, concepts = features(CAPTIONS), parts_of(features, ["<new1> cat", "<new2> pot"])
    classes = parts_of(features, ["cat", "pot"], first=0)
    found = load_weights(joined[0])
    for key, (own, ours) in trained_weights(results, sd1).items():
        ridge = (1e-3 * np.square(rest).mean()) ** 0.5
        rows, values = [np.eye(len(own.T)) * ridge], [own.T * ridge]
        kept = [(rest, 1, own), *((part, 3, own) for part in classes)]
        for part, weight, target in [
            *kept,
            *((part, 5, weights) for part, weights in zip(concepts, ours, strict=True)),
        ]:
            scale = (weight / len(part)) ** 0.5
            rows.append(scale * part)
            values.append(scale * part @ target.T)
        solution = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)[0].T
        assert np.abs(found[key].numpy() - solution).max() < 2e-5 * np.abs(solution).max(), key
        assert np.abs(solution - own).max() > 1e-3, "the concepts are there"


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
    process = run(sys.executable, MERGE, *words)
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
    assert run(sys.executable, ROOT / "scripts" / "export.py", tmp_path / "again", *words).returncode == 0


@pytest.mark.parametrize("more", [{}, {"no_safe_serialization": True}])
def test_flag_of_the_trainer(more, results, one_concept, sd1, tmp_path):
    """--keep_apart saves the same training's result as this script makes it, and proves that it loads."""
    values = {"max_train_steps": 4, "learning_rate": 1e-2, "keep_apart": True}
    fork(tmp_path / "run", **one_concept | values | more)
    assert "<new1> cat: " in (tmp_path / "run.log").read_text() and not list((tmp_path / "run").glob("tmp*"))
    merge(results["cat"], model=sd1, output_dir=tmp_path / "merged")
    for name in (WEIGHTS, "<new1>"):
        found, expected = (torch.load(tmp_path / run / f"{name}.bin") for run in ("run", "merged"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items() if len(value)), name


def test_result_without_settings(results, sd1, tmp_path):
    """Without the settings that the trainer records, the prompt has to be given; nothing else differs."""
    old = shutil.copytree(results["cat"], tmp_path / "old")
    save_file(load_file(old / f"{WEIGHTS}.safetensors"), old / f"{WEIGHTS}.safetensors", {"format": "pt"})
    line = refusal(old, model=sd1, output_dir=tmp_path / "run")
    assert line.startswith("error: word <new1>: ") and "--concepts '<new1> " in line and not (tmp_path / "run").exists()
    merge(old, model=sd1, output_dir=tmp_path / "run", concepts=["<new1> cat"])
    merge(results["cat"], model=sd1, output_dir=tmp_path / "new")
    found, expected = load_trained(tmp_path / "run"), load_trained(tmp_path / "new")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# What is refused


def refusal(*results, **values):
    """The line with which the script ends."""
    with pytest.raises(SystemExit) as ended:
        script.main(script.parse_args(words_of(*results, **values)))
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
    for file in bins.glob("*.safetensors"):
        file.unlink()
    file = other / f"{WEIGHTS}.safetensors"
    with safe_open(file, "pt") as content:
        settings = json.loads(content.metadata()["settings"]) | {"base_model": "another"}
    save_file(load_file(file), file, {"settings": json.dumps(settings)})
    (tmp_path / "empty").mkdir()
    return {
        "queries": ([crossattn], {}, ["crossattn"]),
        "truncated": ([truncated], {}, ["corrupt"]),
        "pickled": ([bins], {}, [".bin"]),
        "empty": ([tmp_path / "empty"], {}, ["empty", f"no {WEIGHTS}"]),
        "one word twice": ([cat, pot], {}, [str(pot), "<new1>", "--rename"]),
        "word that is not there": ([cat], {"rename": [f"{cat}:<new3>=<new4>"]}, ["--rename", "<new3>"]),
        "rename without a result": ([cat], {"rename": ["<new1>=<new4>"]}, ["--rename", "RESULT:OLD=NEW"]),
        "other base models": ([cat, other], {"rename": [f"{other}:<new1>=<new2>"]}, ["different base models"]),
        "other shapes": ([cat], {"model": ROOT / "assets" / "model"}, ["is (", "in this model"]),
        "no captions": ([cat], {"captions": tmp_path / "gone.txt"}, ["--captions", "gone.txt"]),
    }


def test_refused(results, sd1, tmp_path):
    """One line that names the flag or folder, and nothing written."""
    for case, (given, values, words) in broken(results, sd1, tmp_path).items():
        line = refusal(*given, output_dir=tmp_path / "out", **{"model": sd1} | values)
        assert line.startswith("error: ") and "\n" not in line, case + line
        assert [word for word in words if word not in line] == [], case + line
        assert not (tmp_path / "out").exists(), case
