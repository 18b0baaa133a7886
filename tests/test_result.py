"""What a run leaves, opened with diffusers itself: weights in both formats, pictures, and the lines that load them.

The run proves that its files load. Other parts of diffusers take the weights, too: merged into the UNet, for pictures
made from pictures, for inpainting, offloaded and compiled.
"""

import argparse
import copy
import importlib.util
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from launching import FAST, ROOT, finish, flags, fork, fork_code, fork_script, python, secrets_in, start, train
from models import EMBEDDED
from observers import (
    change_a_number,
    change_the_unet,
    disk_of_windows,
    drop_a_layer,
    few_open_files,
    find_another_word,
    load_no_embedding,
    load_nothing,
    load_nothing_in_the_trial,
    no_memory_for_final_pictures,
    no_memory_for_pictures,
    no_memory_for_the_proof,
    truncate_weights,
    watch_final_pictures,
    watch_precision,
)
from PIL import Image
from reading import (
    RARE,
    WEIGHTS,
    base_weights,
    check_loading,
    check_weight_files,
    distance,
    fresh_pipeline,
    load_as_a_user,
    load_trained,
    load_weights,
    prediction,
    same_bits,
)
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "scripts"))
import results  # noqa: E402

KV = ("to_k.weight", "to_v.weight")


def test_weight_files(trained, sd1):
    check_weight_files(sd1, trained, ["<new1>"], KV)


def test_weights_load_with_diffusers(trained, sd1):
    assert importlib.util.find_spec("peft"), "with peft installed another loader of diffusers could step in"
    check_loading(sd1, trained, "<new1>", "photo of a <new1> cat")


def test_every_checkpoint_loads_like_the_result(trained, sd1):
    """In the format that it has, with the same names and shapes."""
    checkpoint = trained / "checkpoint-4"
    assert not list(checkpoint.glob("*.bin"))
    check_loading(sd1, checkpoint, "<new1>", "photo of a <new1> cat", suffixes=["safetensors"])
    for name in (f"{WEIGHTS}.safetensors", "<new1>.safetensors"):
        found, expected = load_file(checkpoint / name), load_file(trained / name)
        assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in expected.items()}


def test_parts_that_are_not_needed(sd1, one_concept, tmp_path):
    """A model whose index names a feature extractor and a safety checker that are not there is trained all the same."""
    model = shutil.copytree(sd1, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (model / "model_index.json").write_text(json.dumps(index))
    folder = fork(tmp_path / "run", **one_concept | {"pretrained_model_name_or_path": model, "max_train_steps": 1})
    assert (folder / "<new1>.safetensors").is_file()


def test_last_checkpoint_is_the_result(trained):
    assert distance(load_trained(trained), load_trained(trained / "checkpoint-6")) == 0
    assert distance(load_trained(trained), load_trained(trained / "checkpoint-4")) > 0


def test_everything_trained_moves(trained, sd1):
    """Each of the attention weights and the new word's row."""
    weights = load_weights(trained)
    for key, value in base_weights(sd1, weights).items():
        assert not torch.equal(value, weights[key]), key
    rows = fresh_pipeline(sd1).text_encoder.get_input_embeddings().weight
    assert not torch.equal(load_file(trained / "<new1>.safetensors")["<new1>"], rows[42170])


def test_checkpoint_is_small(trained, sd1):
    """It holds what is trained, not the text encoder: less than a third of the embedding table."""
    size = sum(file.stat().st_size for file in (trained / "checkpoint-6").rglob("*") if file.is_file())
    assert size < 49408 * 32 * 4 / 3


SIDE = 64  # pixels
LABEL = 16  # pixels of a line of text above pictures of this side


def validation_grids(folder):
    """The validation's files by step, in order."""
    files = sorted((folder / "validation").iterdir())
    return {int(re.fullmatch(r"step-(\d+)\.png", file.name)[1]): np.asarray(Image.open(file), int) for file in files}


DRAWN = ["a <new1> cat in a bucket", "a cat in a bucket", "a pot"]  # given, without its word, given


def rows_of(grid, side=SIDE):
    """The rows of pictures, and the lines of text above each of them, of a sheet with a line of text above all."""
    rows = [grid[top : top + LABEL + side] for top in range(LABEL, len(grid), LABEL + side)]
    return np.stack(rows)[:, LABEL:], np.stack(rows)[:, :LABEL]


def is_text(line):
    """Whether it is dark on white."""
    return line.min() < 50 and np.median(line) == 255


def test_validation_pictures(trained):
    """Before, at step 3 and at the end: a line with the step; below it for each prompt a line and two pictures."""
    grids = validation_grids(trained)
    assert list(grids) == [0, 3, 6]
    assert all(grid.shape == (LABEL + 3 * (LABEL + SIDE), 2 * SIDE, 3) for grid in grids.values())
    headings = [grid[:LABEL] for grid in grids.values()]
    pictures, prompts = zip(*(rows_of(grid) for grid in grids.values()), strict=True)
    assert all(map(is_text, [*headings, *prompts[0]]))
    for parts in (headings, pictures):
        assert (parts[0] != parts[1]).any() and (parts[1] != parts[2]).any()
    assert np.array_equal(prompts[0], prompts[1]) and np.array_equal(prompts[1], prompts[2])
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert (prompts[0][left] != prompts[0][right]).any()
        assert (pictures[0][left] != pictures[0][right]).any()
    said = (trained / "stdout.txt").read_text()
    assert f"  Pictures every 3 steps, 2 each: {', '.join(map(repr, DRAWN))}\n" in said


def test_sheets_that_compare_steps(trained):
    """before_after.png: all pictures of the first step beside those of the last; steps.png: the first of each step."""
    before, middle, after = (rows_of(grid)[0] for grid in validation_grids(trained).values())
    expected = {
        "before_after": np.concatenate([before, after], 2),
        "steps": np.concatenate([rows[:, :, :SIDE] for rows in (before, middle, after)], 2),
    }
    for name, rows in expected.items():
        sheet = np.asarray(Image.open(trained / f"{name}.png"), int)
        pictures, prompts = rows_of(sheet)
        assert np.array_equal(pictures, rows), name
        columns = np.split(sheet[:LABEL], len(sheet[0]) // (2 * SIDE if name == "before_after" else SIDE), 1)
        assert all(map(is_text, [*columns, *prompts])), name


def test_sheets_of_other_prompts(tmp_path):
    """An earlier run may have left them in the folder: they are not taken for this run's."""
    import train_custom_diffusion as trainer

    values = {"output_dir": tmp_path, "validation_prompt": ["a <new1> cat", "a dog"], "modifier_token": "<new1>"}
    args = argparse.Namespace(**values, num_validation_images=2, resolution=SIDE)
    colors = {"a <new1> cat": ["red", "blue"], "a cat": ["green", "white"], "a dog": ["black", "gray"]}
    rows = {prompt: [Image.new("RGB", (SIDE, SIDE), name) for name in names] for prompt, names in colors.items()}
    trainer.write_sheet(args, rows, 3)
    found = trainer.read_sheet(args, 3)
    for prompt, images in rows.items():
        assert [image.tobytes() for image in found.pop(prompt)] == [image.tobytes() for image in images]
    assert found == {}
    assert trainer.read_sheet(args, 4) is None
    for name, value in {
        "validation_prompt": ["a <new1> cat", "a fox"],
        "num_validation_images": 1,
        "resolution": 128,
        "modifier_token": "<new2>",
    }.items():
        assert trainer.read_sheet(argparse.Namespace(**vars(args) | {name: value}), 3) is None, name


def test_first_validation_shows_the_base_model(trained, sd1):
    """Made here with diffusers alone: the word's row is the initializer's, DPM-Solver++ takes 25 steps.

    Every prompt starts from the same noise.
    """
    pipeline = fresh_pipeline(sd1)
    row = pipeline.tokenizer.convert_tokens_to_ids(RARE + "</w>")
    table = pipeline.text_encoder.get_input_embeddings().weight.data
    table[row] = table[42170]
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    settings = {"num_images_per_prompt": 2, "num_inference_steps": 25, "height": SIDE, "width": SIDE}
    rows, _ = rows_of(validation_grids(trained)[0])
    for row, prompt in zip(rows, DRAWN, strict=True):
        generator = torch.Generator().manual_seed(42)
        pictures = pipeline(prompt.replace("<new1>", RARE), generator=generator, **settings).images
        expected = np.concatenate([np.asarray(picture, int) for picture in pictures], 1)
        assert np.abs(row - expected).max() <= 2, prompt


def test_final_pictures(trained):
    """Two of each prompt that was given, in order: those of the last validation, here from the files on disk."""
    pictures = [np.asarray(Image.open(trained / f"image_{i}.png"), int) for i in range(4)]
    of_the_word, _, of_a_pot = rows_of(validation_grids(trained)[6])[0]
    assert np.array_equal(np.concatenate(pictures, 1), np.concatenate([of_the_word, of_a_pot], 1))
    assert not (trained / "image_4.png").exists()


def test_secrets_are_in_no_file(trained):
    """Tokens of the hub and of trackers, as a flag and in the environment."""
    assert len(list(trained.rglob("*"))) > 10
    assert secrets_in(trained) == []


@pytest.fixture(scope="session")
def bin_only(cat_flags, tmp_path_factory):
    """No new word, class pictures of a plain folder, only .bin files."""
    flags = cat_flags | {
        "modifier_token": None,
        "instance_prompt": "photo of a cat",
        "class_data_dir": cat_flags["cwd"] / "cats",
        "no_safe_serialization": True,
        "max_train_steps": 2,
        "checkpointing_steps": 2,
    }
    return train(tmp_path_factory.mktemp("runs") / "bin_only", **flags)


def test_earlier_safetensors_do_not_outlive_bin_alone(one_concept, tmp_path):
    """Every tool would prefer them to the .bin files of the later run."""
    folder = fork(tmp_path / "run", max_train_steps=1, **one_concept)
    (folder / "<other>.safetensors").write_bytes(b"of another word")
    fork(folder, max_train_steps=1, no_safe_serialization=True, **one_concept)
    assert {file.name for file in folder.glob("*.safetensors")} == {"<other>.safetensors"}


def test_bin_only(bin_only, sd1):
    """No .safetensors anywhere, no embedding file; the one weight file loads and differs from the base model."""
    assert not list(bin_only.rglob("*.safetensors"))
    assert {file.name for file in bin_only.glob("*.bin")} == {f"{WEIGHTS}.bin"}
    weights = torch.load(bin_only / f"{WEIGHTS}.bin", weights_only=True)
    pipeline = fresh_pipeline(sd1)
    base = prediction(pipeline, "photo of a cat")
    own = pipeline.unet.state_dict()
    for key, value in weights.items():
        if len(value):
            own[key.replace("processor.", "").replace("_custom_diffusion", "")].copy_(value)
    expected = prediction(pipeline, "photo of a cat")
    assert (expected - base).abs().max() > 1e-3
    for folder in (bin_only, bin_only / "checkpoint-2"):
        found = prediction(load_as_a_user(sd1, folder, [], "bin"), "photo of a cat")
        assert (found - expected).abs().max() < 1e-5


@pytest.fixture(scope="session")
def embedded(world, tmp_path_factory):
    """The embedded model at its own resolution."""
    return train(
        tmp_path_factory.mktemp("runs") / "embedded",
        pretrained_model_name_or_path=EMBEDDED,
        instance_data_dir=world / "my_cat",
        instance_prompt="photo of a <new1> cat",
        modifier_token="<new1>",
        initializer_token="cat",
        validation_prompt="photo of a <new1> cat",
        num_validation_images=1,
        resolution=128,
        max_train_steps=3,
        learning_rate=5e-3,
    )


def test_embedded_model(embedded):
    check_weight_files(EMBEDDED, embedded, ["<new1>"], KV)
    check_loading(EMBEDDED, embedded, "<new1>", "photo of a <new1> cat")


def test_embedded_model_changes_the_picture(embedded):
    """The picture before the first step against the final one."""
    (before, _), _ = rows_of(validation_grids(embedded)[0], 128)
    after = np.asarray(Image.open(embedded / "image_0.png"), int)
    assert before.shape == after.shape == (128, 128, 3)
    assert np.abs(before - after).mean() > 2


def test_printed_snippet_works(embedded, tmp_path):
    """The last lines of a run say how to use it; they run as printed."""
    printed = (embedded / "stdout.txt").read_text()
    _, _, snippet = printed.partition("To use it:\n")
    assert "load_attn_procs" in snippet
    fork_code(snippet, cwd=tmp_path)
    (picture,) = tmp_path.glob("*.png")
    assert Image.open(picture).size == (128, 128)


def test_validation_in_batches(one_concept, tmp_path):
    """--num_validation_images are drawn --sample_batch_size at a time, from the same noise."""
    values = one_concept | {"validation_prompt": "a <new1> cat", "num_validation_images": 5, "max_train_steps": 1}
    left, right = (fork(tmp_path / f"by {n}", sample_batch_size=n, **values) for n in (2, 5))
    for i in range(5):
        pictures = [np.asarray(Image.open(folder / f"image_{i}.png"), int) for folder in (left, right)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 2
    assert not (left / "image_5.png").exists()


def test_final_pictures_take_little_memory(one_concept, tmp_path):
    """They are drawn with torch's fused attention: none holds a number for each pair of pixel and word."""
    folder = tmp_path / "run"
    fork(folder, observer=watch_final_pictures, validation_prompt="a <new1> cat", max_train_steps=1, **one_concept)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["convolution"] and [name for name in found if "scaled_dot_product" in name]
    assert not [name for name in found if "softmax" in name or "baddbmm" in name]


def test_final_pictures_that_fail(one_concept, tmp_path):
    """What fails after the save costs only itself: a warning, and everything else is there."""
    folder = tmp_path / "run"
    values = one_concept | {"validation_prompt": "a <new1> cat", "max_train_steps": 1}
    said = finish(start(folder, observer=no_memory_for_final_pictures, **values), folder)
    assert re.search("^warning: .*CUDA out of memory", said, re.MULTILINE) and "Saved to" in said
    assert load_trained(folder) and not (folder / "image_0.png").exists()


def test_validation_that_fails(one_concept, tmp_path):
    """Memory that is missing for pictures before and between the steps costs these alone, and no other memory."""
    values = one_concept | {"max_train_steps": 3, "cache_latents": 1}
    plain = fork(tmp_path / "plain", **values)
    values |= {"validation_prompt": "a <new1> cat", "validation_steps": 1, "num_validation_images": 1}
    folder = tmp_path / "run"
    said = finish(start(folder, observer=no_memory_for_pictures, **values), folder)
    left_out = re.findall("^warning: .* left out: .*$", said, re.MULTILINE)
    line = "warning: validation pictures of step {} left out: CUDA out of memory. Tried to allocate 2 GB"
    assert left_out == [line.format(0), line.format(1)]
    assert {file.name for file in (folder / "validation").iterdir()} == {f"step-{step:06d}.png" for step in (2, 3)}
    assert same_bits(load_trained(folder), load_trained(plain))
    assert json.loads((tmp_path / "run.json").read_text()) == ["cpu"]  # the next step may need the VAE's room


def test_proof_that_fails(one_concept, tmp_path):
    """Memory that is missing after the save costs the proof and the pictures, which a warning names."""
    folder = tmp_path / "run"
    values = one_concept | {"validation_prompt": "a <new1> cat", "max_train_steps": 1}
    said = finish(start(folder, observer=no_memory_for_the_proof, **values), folder)
    assert re.search("^warning: proof .*final pictures left out: CUDA out of memory", said, re.MULTILINE), said
    assert f"Saved to {folder}. To use it" in said and "checked" not in said
    assert load_trained(folder) and not (folder / "image_0.png").exists()


def test_more_validations_than_files_may_be_open(one_concept, tmp_path):
    """Every sheet is shown that is asked for; the others stay closed."""
    folder = tmp_path / "run"
    values = one_concept | {"validation_prompt": "a cat", "validation_steps": 1, "num_validation_images": 1}
    said = finish(start(folder, observer=few_open_files, max_train_steps=45, **values), folder)
    assert "warning" not in said and len(list((folder / "validation").iterdir())) == 46
    assert Image.open(folder / "steps.png").size == (8 * SIDE, 2 * LABEL + SIDE)
    grids = validation_grids(folder)
    (found,), _ = rows_of(np.asarray(Image.open(folder / "before_after.png")))
    assert np.array_equal(found, np.concatenate([rows_of(grids[step])[0][0] for step in (0, 45)], 1))


MERGE_LINE = re.compile(r"^To keep what else .*: (python scripts/merge\.py .*)$", re.MULTILINE)


def test_closing_lines_name_what_keeps_it_apart(one_concept, one_real_concept, tmp_path):
    """Without class pictures: the command, which works as printed. With them it would take too much."""
    folder = tmp_path / "my run"
    said = finish(start(folder, max_train_steps=1, **one_concept), folder)
    (line,) = MERGE_LINE.findall(said)
    process = fork_script(*shlex.split(line)[1:], cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert load_trained(tmp_path / "my run-apart").keys() == load_trained(folder).keys()
    for name, values in {
        "class pictures": one_real_concept,
        "no word": one_concept | {"modifier_token": None},
        "crossattn": one_concept | {"freeze_model": "crossattn"},
    }.items():
        said = finish(start(tmp_path / name, max_train_steps=1, **values), tmp_path / name)
        assert not MERGE_LINE.findall(said)


@pytest.mark.gpu
def test_memory_of_final_pictures_on_a_gpu(one_concept, tmp_path):
    """At 1024 pixels in float32 the scores of unfused attention alone would take 4 GiB; the whole run takes less."""
    values = one_concept | {"resolution": 1024, "validation_prompt": "a <new1> cat", "max_train_steps": 1}
    code = f"""
import torch
from train_custom_diffusion import main, parse_args

main(parse_args({flags(**FAST | values | {"resolution": 1024, "output_dir": str(tmp_path / "run")})}))
print(torch.cuda.max_memory_allocated())
"""
    assert int(python(code).stdout.splitlines()[-1]) < 4 * 2**30


@pytest.mark.gpu
def test_validation_on_a_gpu(one_concept, tmp_path):
    """Grids before, between and after, final pictures from the reloaded files, and none of them black."""
    values = {"mixed_precision": "fp16", "validation_prompt": "a <new1> cat", "validation_steps": 2}
    values |= {"pretrained_model_name_or_path": EMBEDDED, "resolution": 128, "max_train_steps": 4}
    folder = train(tmp_path / "run", **one_concept | values)
    grids = validation_grids(folder)
    assert list(grids) == [0, 2, 4]
    finals = [np.asarray(Image.open(folder / f"image_{i}.png")) for i in range(2)]
    assert all(picture[-128:].std() > 1 for picture in [*grids.values(), *finals])


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTATION = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_documented_snippets_load_the_weights():
    """Every documented line that loads attention weights gives the pipeline, too: without it nothing loads."""
    lines = [line for line in DOCUMENTATION.splitlines() if "load_attn_procs(" in line]
    calls = [line for line in lines if not line.lstrip().startswith(("#", "-", "|", ">"))]
    assert calls
    assert [line for line in calls if "weight_name" in line and "_pipeline=" not in line] == []


# The save proves itself


@pytest.fixture(scope="module")
def proof_flags(one_concept):
    """Two steps, and a final picture."""
    values = {"max_train_steps": 2, "learning_rate": 1e-2, "validation_steps": 100, "num_validation_images": 1}
    return one_concept | values | {"validation_prompt": "a <new1> cat"}


@pytest.fixture(scope="module")
def saved(proof_flags, tmp_path_factory):
    """Such a run with nothing happening to it."""
    return fork(tmp_path_factory.mktemp("runs") / "run", **proof_flags)


SABOTAGES = [
    truncate_weights, change_a_number, drop_a_layer, load_nothing, change_the_unet, load_no_embedding,
    find_another_word,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda function: function.__name__)
def test_save_proves_itself(sabotage, proof_flags, saved, tmp_path):
    """Fails with one line, without final pictures, and what was trained is still there."""
    folder = tmp_path / "run"
    said = finish(start(folder, observer=sabotage, **proof_flags), folder, status=1)
    assert said.splitlines()[-1].startswith("error: ") and str(folder) in said.splitlines()[-1], said
    assert "Traceback" not in said and "Saved to" not in said
    if sabotage is find_another_word:
        assert said.splitlines()[-1].endswith("another text of 'photo of a <new1> cat'")
    assert not list(folder.glob("image_*.png"))
    for name in (f"{WEIGHTS}.bin", "<new1>.bin"):
        assert (folder / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.slow
def test_trial_before_the_training(proof_flags, tmp_path):
    """A diffusers that does not install such weights is found out before the first step, and nothing is left."""
    folder = tmp_path / "run"
    said = finish(start(folder, observer=load_nothing_in_the_trial, **proof_flags), folder, status=1)
    assert said.splitlines()[-1].startswith(f"error: --output_dir {folder}: ") and "Training" not in said
    assert [file.name for file in folder.iterdir()] == [".lock"]


@pytest.mark.slow
def test_word_that_is_no_file_name(proof_flags, tmp_path):
    """Some file systems do not take "<"; every one has a limit of length. The run ends before the first step."""
    folder, word = tmp_path / "run", "w" * 300
    flags = proof_flags | {"modifier_token": word, "instance_prompt": f"photo of a {word} cat"}
    said = finish(start(folder, **flags), folder, status=1)
    assert re.match(f"error: --output_dir {folder}: .*File name too long", said.splitlines()[-1]), said[-600:]
    assert "Training" not in said and [file.name for file in folder.iterdir()] == [".lock"]


def names_in(folder):
    """The files of a run and of its checkpoints."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*.*") if file.name[0] != "."}


def words_with_plain_names(folder):
    """Renames the words' files of a run as somebody does who copies them to Windows."""
    for file in folder.rglob("<*"):
        file.replace(file.with_name(re.sub("[<>]", "", file.name)))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_disk_that_refuses_signs(kind, request, one_concept, tmp_path):
    """There the word's files have its plain name; the printed lines and the scripts read them, and so do other disks.

    A checkpoint that was copied from one disk to the other goes on there to the same bits.
    """
    values = one_concept | {"pretrained_model_name_or_path": request.getfixturevalue(kind), "learning_rate": 1e-2}
    values |= {"max_train_steps": 2, "checkpointing_steps": 1}
    there, here = tmp_path / "there", fork(tmp_path / "here", **values)
    said = finish(start(there, observer=disk_of_windows, **values), there)
    assert names_in(there) == {name.replace("<new1>", "new1") for name in names_in(here)}
    found, expected = (results.read_result(str(folder)) for folder in (there, here))
    assert list(found.words) == ["<new1>"] and same_bits(found.words["<new1>"], expected.words["<new1>"])
    lines = said.partition("To use it:\n")[2].replace("steps=100", "steps=2").replace("eta=1.0", "height=64, width=64")
    fork_code(f"{lines}\nassert '<new1>' in pipeline.tokenizer.tokenize('a <new1>')", cwd=tmp_path)

    # Each kind of model goes one way.
    folder, observer, name = there, None, "<new1>"
    if kind == "sdxl":
        folder, observer, name = here, disk_of_windows, "new1"
        words_with_plain_names(here)
    shutil.rmtree(folder / "checkpoint-2")
    said = finish(start(folder, observer=observer, **values, resume_from_checkpoint="latest"), folder)
    assert f"Resuming from {folder / 'checkpoint-1'}" in said
    resumed = results.read_result(str(folder / "checkpoint-2"))
    assert resumed.files[1].name == f"{name}.safetensors"
    assert same_bits(resumed.words["<new1>"] | resumed.weights, expected.words["<new1>"] | expected.weights)


def test_scripts_on_a_disk_that_refuses_signs(saved, monkeypatch, tmp_path):
    """What merge.py writes there is read; so is what has no record; words without names of their own are refused."""

    def refuse(**options):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(results.tempfile, "NamedTemporaryFile", refuse)
    result = results.read_result(str(saved))
    results.write_result(tmp_path / "merged", result.weights, result.words, result.settings)
    results.write_result(tmp_path / "no record", result.weights, result.words, {})
    for name in ("merged", "no record"):
        assert names_in(tmp_path / name) == {
            f"{stem}.{end}" for stem in (WEIGHTS, "new1") for end in ("bin", "safetensors")
        }
        found = results.read_result(str(tmp_path / name))
        assert list(found.words) == ["<new1>"] and same_bits(found.words["<new1>"], result.words["<new1>"])
    row = result.words["<new1>"]
    for words in (["<new1>", "[new1]"], ["<>"]):
        with pytest.raises(results.Problem, match="no signs in names of files"):
            results.write_result(tmp_path / "refused", result.weights, dict.fromkeys(words, row), {})
    (file,) = (tmp_path / "no record").glob("new1.safetensors")
    file.replace(file.with_name("cat.safetensors"))
    (tmp_path / "no record" / "new1.bin").unlink()
    assert results.read_result(str(tmp_path / "no record")).words == {}, "another word's name"


def test_tf32_is_off_for_the_proof(proof_flags, tmp_path):
    """Its rounding would pass for a difference; everything else uses it where --allow_tf32 says so."""
    folder = tmp_path / "run"
    fork(folder, observer=watch_precision, **proof_flags | {"allow_tf32": True, "validation_prompt": None})
    found = json.loads((tmp_path / "run.json").read_text())
    assert found == [[False, True, True]] * 2 + [[True, False, False]] * 2


@pytest.mark.gpu
def test_proof_with_tf32_on_a_gpu(proof_flags, tmp_path):
    values = proof_flags | {"pretrained_model_name_or_path": EMBEDDED, "resolution": 128, "allow_tf32": True}
    train(tmp_path / "run", **values)


# Other parts of diffusers


PROMPT = "photo of a <new1> cat on the beach"
PICTURE = ROOT / "assets" / "instance" / "pot" / "0.png"
MERGING = re.search(r"^for name, value in load_file.*?(?=^pipeline\.)", DOCUMENTATION, re.DOTALL | re.MULTILINE)[0]


@pytest.fixture(scope="module", params=["crossattn_kv", "crossattn"])
def weights(request, tmp_path_factory):
    """A run of the embedded model that moved the weights far."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    values = {"freeze_model": request.param, "resolution": 128, "learning_rate": 1e-2, "max_train_steps": 3}
    values |= {"instance_prompt": "photo of a <new1> cat", "modifier_token": "<new1>", "initializer_token": "yellow"}
    pictures = ROOT / "assets" / "instance" / "cat"
    return fork(folder, pretrained_model_name_or_path=EMBEDDED, instance_data_dir=pictures, **values)


@pytest.fixture(scope="module")
def loaded(weights):
    """As the documentation loads them."""
    pipeline = fresh_pipeline(EMBEDDED)
    pipeline.unet.load_attn_procs(weights, weight_name=f"{WEIGHTS}.safetensors", _pipeline=pipeline)
    pipeline.load_textual_inversion(weights, weight_name="<new1>.safetensors")
    return with_quick_sampler(pipeline)


@pytest.fixture(scope="module")
def merged(weights):
    """As the documented lines merge them."""
    pipeline = fresh_pipeline(EMBEDDED)
    exec(MERGING, {"pipeline": pipeline, "weights": str(weights), "load_file": load_file})
    pipeline.load_textual_inversion(weights, weight_name="<new1>.safetensors")
    return with_quick_sampler(pipeline)


def with_quick_sampler(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def draw(pipeline, **options):
    """One picture of the prompt in a few steps, as an array."""
    options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)} | options
    return np.asarray(pipeline(PROMPT, **options).images[0], int)


def test_merged_is_exact(weights, loaded, merged):
    """Every number is in its place, none other has changed, and the prediction is the same."""
    base, found = fresh_pipeline(EMBEDDED).unet.state_dict(), merged.unet.state_dict()
    trained = {key: value for key, value in load_file(weights / f"{WEIGHTS}.safetensors").items() if value.numel()}
    changed = {key for key in base if not torch.equal(base[key], found[key])}
    expected = {re.sub(r"\.processor\.(to_\w+)_custom_diffusion", r".\1", key): key for key in trained}
    assert changed == expected.keys() and len(changed) == len(trained)
    assert all(torch.equal(found[own], trained[key]) for own, key in expected.items())
    of_merged, of_loaded, of_base = (prediction(p, PROMPT) for p in (merged, loaded, fresh_pipeline(EMBEDDED)))
    assert (of_merged - of_loaded).abs().max() < 1e-5 < (of_merged - of_base).abs().max()


def test_merged_is_a_plain_model(merged, tmp_path):
    """It has diffusers' own attention, and saved it loads as a model that knows the word."""
    assert {type(processor).__name__ for processor in merged.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    merged.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert (draw(again) == draw(merged)).all()


@pytest.mark.parametrize("change", ["enable_attention_slicing", "fuse_qkv_projections"])
def test_what_drops_the_loaded_weights(change, weights, loaded, merged):
    """As the documentation warns: the attention is the base model's again, without a word. Merged weights stay."""
    untrained = fresh_pipeline(EMBEDDED)
    untrained.load_textual_inversion(weights, weight_name="<new1>.safetensors")
    expected, base = prediction(merged, PROMPT), prediction(untrained, PROMPT)
    dropped, kept = copy.deepcopy(loaded), copy.deepcopy(merged)
    getattr(dropped, change)(), getattr(kept, change)()
    assert (prediction(dropped, PROMPT) - base).abs().max() < 1e-4 < (expected - base).abs().max()
    assert (prediction(kept, PROMPT) - expected).abs().max() < 1e-4


def test_other_pipelines(loaded, merged):
    """Image to image and inpainting from the same components: the trained networks draw, in the places they should."""
    picture, mask = Image.open(PICTURE).convert("RGB"), Image.new("L", (128, 128), 0)
    mask.paste(255, (0, 0, 128, 64))
    base = with_quick_sampler(fresh_pipeline(EMBEDDED))
    for other, options in (
        (AutoPipelineForImage2Image, {"image": picture, "strength": 0.8}),
        (AutoPipelineForInpainting, {"image": picture, "mask_image": mask}),
    ):
        pipelines = [other.from_pipe(pipeline) for pipeline in (loaded, merged, base)]
        assert pipelines[0].unet is loaded.unet
        for pipeline in pipelines:
            pipeline.set_progress_bar_config(disable=True)
        found, same, before = (draw(pipeline, **options) for pipeline in pipelines)
        assert np.abs(found - same).max() <= 2  # the attention kernels round differently
        assert np.abs(found - before).mean() > 2
    assert np.abs(found - np.asarray(picture))[72:].mean() < 10 < np.abs(found - np.asarray(picture))[:56].mean()


def test_model_offload(loaded):
    """Its hooks, here with a CPU in the GPU's place, take the trained weights along; without a GPU it is refused."""
    pipeline = copy.deepcopy(loaded)
    with pytest.raises(RuntimeError, match="requires accelerator"):
        pipeline.enable_model_cpu_offload()
    pipeline.enable_model_cpu_offload(device="cpu")
    assert (draw(pipeline) == draw(loaded)).all()


def test_merged_compiles(merged):
    """torch.compile takes the merged UNet in one graph, and it predicts the same; without the generation of code."""
    expected = prediction(merged, PROMPT)
    compiled = copy.copy(merged)
    compiled.unet = torch.compile(merged.unet, fullgraph=True, backend="aot_eager")
    assert (prediction(compiled, PROMPT) - expected).abs().max() < 1e-4
