"""scripts/evaluate.py: its pictures against diffusers' own loaders, its measures against NumPy, what it refuses.

The models that judge are small and have random weights, so the numbers mean nothing, but the formulas are the same.
"""

import contextlib
import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from launching import ROOT, flags, fork, fork_script
from original import write_original
from pictures import make_picture
from PIL import Image
from records import copy_result, rename_words, set_record, settings_of

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "examples")]
import before_after  # noqa: E402
import evaluate as script  # noqa: E402

EVALUATE = ROOT / "scripts" / "evaluate.py"
PROMPTS = ["photo of a {}", "a {} on the beach", "a {} at night, 4k"]
FEW = {"num_images": 2, "num_inference_steps": 2, "sample_batch_size": 3}


def words_of(*results, **values):
    """Command-line arguments."""
    return [*map(str, results), *flags(**FEW | values)]


def evaluate(*results, **values):
    """Calls the script's main in this process; returns the content of evaluation.json and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as errors:
        script.main(script.parse_args(words_of(*results, **values)))
    return read(values["output_dir"]), said.getvalue() + errors.getvalue()


def read(folder):
    return json.loads((folder / "evaluation.json").read_text())


def pictures_of(folder, row, kind="samples"):
    """The pictures of a row, by its number."""
    (place,) = (folder / "pictures").glob(f"{row:02} *")
    return [np.asarray(Image.open(file)) for file in sorted((place / kind).iterdir())]


@pytest.fixture(scope="module")
def cat(one_concept, tmp_path_factory):
    """A run of four steps, with a checkpoint of two."""
    values = {"max_train_steps": 4, "learning_rate": 1e-2, "checkpointing_steps": 2}
    return fork(tmp_path_factory.mktemp("evaluated") / "cat", **one_concept | values)


@pytest.fixture(scope="module")
def given(sd1, world, tmp_path_factory):
    """Flags of an evaluation, with a file of prompts."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return {"pretrained_model_name_or_path": sd1, "instance_data_dir": world / "my_cat", "prompts": prompts}


@pytest.fixture(scope="module")
def drawn(cat, given, judges, tmp_path_factory):
    """The script run as a user does: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("drawn") / "evaluation"
    process = fork_script(EVALUATE, *words_of(f"{cat}/", output_dir=folder, **given | judges))
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return folder, process.stdout


# The measures


def squeeze(picture, short, side, mean, deviation):
    """Resizes the shorter side and crops the middle, as the two models' own transforms do."""
    width, height = picture.size
    scale = short / min(width, height)
    picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
    pixels = np.asarray(picture, float)[top : top + side, left : left + side] / 255
    return torch.tensor(((pixels - mean) / deviation).transpose(2, 0, 1)[None]).float()


@pytest.fixture(scope="module")
def judge(judges):
    """Functions that return the unit vectors of a picture by CLIP, by DINO, and of a text by CLIP."""
    from transformers import CLIPModel, CLIPTokenizer, ViTModel

    clip = CLIPModel.from_pretrained(judges["clip_model"]).eval()
    dino = ViTModel.from_pretrained(judges["dino_model"], add_pooling_layer=False).eval()
    tokenizer = CLIPTokenizer.from_pretrained(judges["clip_model"])
    clip_colors = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    dino_colors = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    @torch.no_grad()
    def look(picture, text="x"):
        """The whole model's output, which has both features, normalized."""
        ids = tokenizer(text, return_tensors="pt").input_ids
        found = clip(input_ids=ids, pixel_values=squeeze(picture, 64, 64, *clip_colors))
        return found.image_embeds[0].double().numpy(), found.text_embeds[0].double().numpy()

    @torch.no_grad()
    def dino_look(picture):
        row = dino(squeeze(picture, 64, 56, *dino_colors)).last_hidden_state[0, 0].double().numpy()
        return row / np.sqrt((row**2).sum())

    return lambda picture: look(picture)[0], dino_look, lambda text: look(Image.new("RGB", (64, 64)), text)[1]


def test_measures(drawn, judge, world):
    """Every value of every prompt, their means, and their standard errors."""
    folder, _ = drawn
    of_clip, of_dino, of_text = judge
    instances = [Image.open(world / "my_cat" / f"{i}.png").convert("RGB") for i in range(5)]
    before = [Image.fromarray(picture) for picture in pictures_of(folder, 0)]
    for number, row in enumerate(read(folder)["rows"]):
        samples = [Image.fromarray(picture) for picture in pictures_of(folder, number)]
        plain = [Image.fromarray(picture) for picture in pictures_of(folder, number, "plain")] if number else before
        expected = {name: [] for name in ("CLIP-I", "DINO", "CLIP-T", "likeness", "change", "plain change")}
        for i, prompt in enumerate(PROMPTS):
            found = {name: [] for name in expected}
            for k in (2 * i, 2 * i + 1):
                found["CLIP-I"] += [of_clip(samples[k]) @ of_clip(instance) for instance in instances]
                found["DINO"] += [of_dino(samples[k]) @ of_dino(instance) for instance in instances]
                found["CLIP-T"] += [2.5 * max(of_clip(samples[k]) @ of_text(prompt.format("cat")), 0)]
                found["likeness"] += [of_clip(plain[k]) @ of_clip(before[k])]
                for name, pictures in (("change", samples), ("plain change", plain)):
                    found[name] += [np.abs(np.array(pictures[k], float) - np.array(before[k], float)).mean()]
            for name, values in found.items():
                expected[name].append(sum(values) / len(values))
        for name, values in expected.items():
            mean = sum(values) / 3
            error = math.sqrt(sum((value - mean) ** 2 for value in values) / 2) / math.sqrt(3)
            assert row[name]["by prompt"] == pytest.approx(values, rel=1e-5), name
            assert row[name]["mean"] == pytest.approx(mean, rel=1e-5)
            # A difference of nearly equal cosines keeps fewer digits.
            assert row[name]["standard error"] == pytest.approx(error, rel=1e-2, abs=1e-6)


def test_base_model_is_as_it_is(drawn):
    """Exactly, and the results are not."""
    folder, _ = drawn
    base, *rows = read(folder)["rows"]
    assert base["likeness"]["by prompt"] == [1, 1, 1] and base["plain change"]["by prompt"] == [0, 0, 0]
    assert base["change"]["mean"] == 0 and base["phrase"] == "cat"
    assert all(row["likeness"]["mean"] < 1 and row["plain change"]["mean"] > 0 for row in rows)
    assert all(row["change"]["mean"] > 0 and row["phrase"] == "<new1> cat" for row in rows)


def test_table_and_sheet(drawn, cat):
    """The last checkpoint holds the same as the result, so it has no line of its own."""
    folder, said = drawn
    rows = read(folder)["rows"]
    assert [row["label"] for row in rows] == ["base model", str(cat / "checkpoint-2"), str(cat)]
    assert [row["step"] for row in rows] == [-1, 2, 4]
    text = (folder / "table.md").read_text()
    assert text in said
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    for line, row in zip(lines[2:], rows, strict=False):
        assert line[0] == row["label"]
        for shown, (name, (_, digits)) in zip(line[1:], script.COLUMNS.items(), strict=True):
            assert shown == f"{row[name]['mean']:.{digits}f} ± {row[name]['standard error']:.{digits}f}"
    assert text.splitlines()[-1].startswith("Earliest within one standard error of the best image alignment (DINO): ")
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    height = script.CELL + 16
    top = len(sheet) - 3 * height
    for number in range(3):
        first = Image.fromarray(pictures_of(folder, number)[0]).resize((script.CELL, script.CELL), 3)
        cut = sheet[top + number * height + 16 :][: script.CELL, : script.CELL]
        assert np.abs(cut.astype(int) - np.asarray(first)).mean() < 3


def row_of(step, values):
    """A row whose image alignments by DINO are these, one picture a prompt."""
    return script.Row(str(step), step, "run", "", None, {"DINO": np.array(values)})


def test_earliest():
    """Prompts differ more than rows do, so rows are compared prompt by prompt."""
    args = script.parse_args(["run", *flags(pretrained_model_name_or_path="m", instance_data_dir="d", num_images=1)])
    best = row_of(math.inf, [0.1, 0.5, 0.9])
    worse = row_of(10, [0.08, 0.48, 0.88])  # by the same everywhere: that is no chance
    as_good = row_of(20, [0.12, 0.45, 0.91])  # lost on average .01, with a standard error of .02
    later = row_of(30, [0.1, 0.5, 0.9])
    earliest, found = script.find_earliest([best, worse, later, as_good], args)
    assert (earliest.step, found) == (20, best)
    assert script.find_earliest([best, worse], args)[0] is best


def test_other_judges(judges, tmp_path):
    """A CLIP whose files are in half precision, in which transformers 5 would leave it, and a DINOv2."""
    from transformers import CLIPModel, Dinov2Config, Dinov2Model

    shutil.copytree(judges["clip_model"], tmp_path / "half")
    CLIPModel.from_pretrained(tmp_path / "half").half().save_pretrained(tmp_path / "half")
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    dino = Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **layers)).eval()
    dino.save_pretrained(tmp_path / "dinov2")
    picture = make_picture(0, 120)
    needed = {"pretrained_model_name_or_path": "m", "instance_data_dir": "d"}
    other = {"clip_model": tmp_path / "half", "dino_model": tmp_path / "dinov2"}
    expected, found = (
        script.Judge(script.parse_args(words_of("run", **needed | models)), [picture]).instances
        for models in (judges, other)
    )
    assert np.abs(found["CLIP-I"] - expected["CLIP-I"]).max() < 5e-3
    with torch.no_grad():
        pixels = squeeze(picture, 256, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        row = dino(pixels).last_hidden_state[0, 0].double().numpy()
    assert found["DINO"][0] == pytest.approx(row / np.linalg.norm(row), abs=1e-5)


# The pictures


def by_before_after(model, folder, tokens, phrases, config=None, record=None):
    """The same pictures by the functions of examples/before_after.py, which use diffusers' own loaders."""
    before_after.INFERENCE_STEPS = 2
    record = record or before_after.read_record(folder)
    pipeline = before_after.load_pipeline(model, config, record)
    prompts = [[prompt.replace("{}", phrase) for prompt in PROMPTS] for phrase in phrases]
    skip = record.get("clip_skip") or None
    base = before_after.generate(pipeline, prompts[-1], 0, skip)
    before_after.load_concept(pipeline, folder, tokens)
    return [base, *(before_after.generate(pipeline, texts, 0, skip) for texts in prompts)]


def check_pictures(folder, rows, expected):
    """The base model's pictures, and those of the last row, are the expected ones within rounding."""
    found = [pictures_of(folder, 0), pictures_of(folder, rows), pictures_of(folder, rows, "plain")]
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert np.abs(one.astype(int) - np.asarray(other)).max() <= 2
    assert np.abs(found[1][0].astype(int) - found[0][0]).max() > 10


@pytest.mark.parametrize("kind, values", [
    ("sd1", {}),
    ("sd2", {"clip_skip": 1}),
    ("sdxl", {}),
])  # fmt: skip
def test_pictures_are_those_of_the_loaders(kind, values, request, one_concept, given, tmp_path):
    """Also after another result was drawn with the same pipeline: nothing of it stays. The kinds need no flag."""
    model = request.getfixturevalue(kind)
    training = one_concept | {"pretrained_model_name_or_path": model, "learning_rate": 1e-2} | values
    if kind == "sdxl":
        other = fork(tmp_path / "other", **training, freeze_model="crossattn", max_train_steps=3)
    else:
        words = {"modifier_token": "<other>+<new1>", "instance_prompt": "photo of a <new1> cat <other>"}
        other = fork(tmp_path / "other", **training | words, max_train_steps=3)
    result = fork(tmp_path / "result", **training, max_train_steps=3)
    values = given | {"pretrained_model_name_or_path": model, "num_images": 1, "no_metrics": True}
    evaluate(other, result, output_dir=tmp_path / "drawn", modifier_token="<new1>", **values)
    expected = by_before_after(model, result, ["<new1>"], ["<new1> cat", "cat"])
    check_pictures(tmp_path / "drawn", 2, expected)


def test_one_file(sd1, cat, given, tmp_path):
    """A base model that is one file draws what its folder does."""
    file = write_original(sd1, tmp_path / "model.safetensors")
    paths = {"pretrained_model_name_or_path": file, "config_name_or_path": sd1}
    evaluate(cat / "checkpoint-2", output_dir=tmp_path / "drawn", no_metrics=True, **given | paths)
    evaluate(cat / "checkpoint-2", output_dir=tmp_path / "expected", no_metrics=True, **given)
    for row in (0, 1):
        for ours, theirs in zip(*(pictures_of(tmp_path / name, row) for name in ("drawn", "expected")), strict=True):
            assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_batches_do_not_matter(cat, given, drawn, tmp_path):
    folder, _ = drawn
    evaluate(cat, output_dir=tmp_path, no_metrics=True, **given | {"sample_batch_size": 1})
    for ours, theirs in zip(pictures_of(tmp_path, 2), pictures_of(folder, 2), strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 2
    columns = (tmp_path / "table.md").read_text().splitlines()[0]
    assert columns == "|  | word: pixel change | plain class: pixel change |"


# Which results, which word


def test_runs_in_one_folder(cat, given, tmp_path):
    """Checkpoints of an earlier run, the user's copies, and a run that was stopped before its end."""
    run = tmp_path / "run"
    shutil.copytree(cat, run)
    (run / "checkpoint-4").rename(run / "checkpoint-4-best")
    for step, number in ((1, 2), (2, 1)):
        folder = run / f"checkpoint-{step}"
        shutil.copytree(cat / "checkpoint-2", folder, dirs_exist_ok=True)
        record = json.loads((folder / "checkpoint.json").read_text()) | {"step": step, "run": number}
        (folder / "checkpoint.json").write_text(json.dumps(record))
    assert script.find_sources(str(cat / "checkpoint-2")) == [(2, str(cat / "checkpoint-2"))]
    assert script.find_sources(str(run)) == [(1, str(run / "checkpoint-1")), (math.inf, str(run))]
    set_record(run, settings_of(run) | {"seed": 7})
    assert script.find_sources(str(run)) == [(math.inf, str(run))]
    for file in [*run.glob("*.safetensors"), *run.glob("*.bin")]:
        file.unlink()
    found, said = evaluate(run, output_dir=tmp_path / "drawn", no_metrics=True, **given)
    assert [row["label"] for row in found["rows"]] == ["base model", str(run / "checkpoint-1")]
    assert f"earlier run has left: {run / 'checkpoint-2'}" in said and "no finished result" in said


def test_another_word_and_class(cat, given, tmp_path):
    """A result in which the word has another name is compared by its own; the class may be given."""
    other = rename_words(copy_result(cat, tmp_path / "other"), {"<new1>": "[V]"})
    found, _ = evaluate(cat, other, output_dir=tmp_path / "drawn", class_prompt="kitten", no_metrics=True, **given)
    assert [row["phrase"] for row in found["rows"]] == ["kitten", *2 * ["<new1> kitten"], "[V] kitten"]
    for one, same in zip(*(pictures_of(tmp_path / "drawn", row) for row in (2, 3)), strict=True):
        assert np.abs(one.astype(int) - same).max() <= 1


# The dataset


def test_protocol(cat, given, judges, tmp_path, world):
    """Prompts and class of the dataset; each row's folder is as the dataset's own script reads it."""
    entry = {"instance_data_dir": "./benchmark_dataset/my_cat", "class_prompt": "cat", "prompt_filename": "cat.txt"}
    (tmp_path / "dataset.json").write_text(json.dumps([entry]))
    (tmp_path / "cat.txt").write_text("Photo of a {}. \n{} in {{a box}}.")
    values = given | judges | {"prompts": None, "output_dir": tmp_path / "drawn", "sample_batch_size": 1}
    words = ["--protocol", "customconcept101", str(tmp_path)]
    args = script.parse_args([*words_of(cat, **values | {"num_images": None, "num_inference_steps": None}), *words])
    assert (args.num_images, args.num_inference_steps, args.guidance_scale) == (5, 50, 6)
    with contextlib.redirect_stdout(io.StringIO()):
        script.main(script.parse_args([*words_of(cat, **values), *words]))
    (folder,) = (tmp_path / "drawn" / "pictures").glob("02 *")
    prompts = json.loads((folder / "prompts.json").read_text())
    assert sorted(prompts) == sorted(file.stem for file in (folder / "samples").iterdir())
    assert [prompts[name] for name in sorted(prompts)] == 2 * ["Photo of a cat."] + 2 * ["cat in {{a box}}."]
    # The sampler adds noise, of the same generator as that of the start.
    from diffusers import DDIMScheduler

    pipeline = before_after.load_pipeline(given["pretrained_model_name_or_path"])
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    options = {"num_inference_steps": 2, "guidance_scale": 6.0, "eta": 1.0}
    image = pipeline("Photo of a cat.", generator=torch.Generator().manual_seed(1), **options).images[0]
    assert np.abs(pictures_of(tmp_path / "drawn", 0)[1].astype(int) - np.asarray(image)).max() <= 2
    with pytest.raises(script.Problem, match="no concept with a folder of this name; call it as there, such as my_cat"):
        args.instance_data_dir = world / "my_pot"
        script.find_protocol(args)


# What is refused


def refusal(*results, **values):
    """The line that a run ends with."""
    with pytest.raises(SystemExit) as error, contextlib.redirect_stdout(io.StringIO()):
        script.main(script.parse_args(words_of(*results, **values)))
    return str(error.value)


def test_refusals_of_results(cat, given, tmp_path, world, sd2):
    values = given | {"no_metrics": True, "output_dir": tmp_path / "drawn"}
    assert "my_pot: no pytorch_custom_diffusion_weights" in refusal(world / "my_pot", **values)
    without_class = settings_of(cat) | {"concepts": [["<new1>", 5, 0]], "captions": []}
    result = set_record(copy_result(cat, tmp_path / "result"), without_class)
    assert "does not record the class behind <new1>; give it: --class_prompt cat" in refusal(result, **values)
    skipped = copy_result(cat, tmp_path / "skipped", clip_skip=1)
    assert "skipped: trained with clip_skip 1, as it records" in refusal(cat, skipped, **values)
    told = refusal(cat, **values | {"pretrained_model_name_or_path": sd2})
    assert "give the model that the result was trained on" in told
    shutil.copytree(cat / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-2" / "checkpoint.json").write_text("{")
    assert "checkpoint.json: " in refusal(tmp_path / "run", **values)


def test_refusals_of_words(two_concepts, given, tmp_path, world):
    run = fork(tmp_path / "run", **two_concepts | {"with_prior_preservation": None, "max_train_steps": 1})
    values = given | {"no_metrics": True, "output_dir": tmp_path / "drawn"}
    told = refusal(run, **values, modifier_token="<new1>")
    assert told.endswith("no word <new1> in it; give --modifier_token <New1> or <new2>")
    pot = {"modifier_token": "<new2>", "instance_data_dir": world / "my_pot"}
    found, _ = evaluate(run, **values | pot)
    assert [row["phrase"] for row in found["rows"]] == ["pot", "<new2> pot"]


def test_refusals_of_files(cat, given, tmp_path):
    values = given | {"no_metrics": True, "output_dir": tmp_path / "drawn"}
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    make_picture(0).save(tmp_path / "empty" / "inner" / "0.png")
    told = refusal(cat, **values | {"instance_data_dir": tmp_path / "empty"})
    assert "empty: no pictures in it; give its folder inner" in told
    (tmp_path / "empty" / "0.png").write_bytes(b"no picture")
    assert "0.png: " in refusal(cat, **values | {"instance_data_dir": tmp_path / "empty"})
    assert "No such file" in refusal(cat, **values | {"instance_data_dir": tmp_path / "none"})
    (tmp_path / "prompts.txt").write_text("a {} here\na cat there\n")
    assert "no {} in 'a cat there'" in refusal(cat, **values | {"prompts": tmp_path / "prompts.txt"})
    (tmp_path / "prompts.txt").write_text("\n")
    assert "no prompt in it" in refusal(cat, **values | {"prompts": tmp_path / "prompts.txt"})


@pytest.mark.parametrize("flag, kind, said", [
    ("clip_model", "dino_model", "is not in its files; give a model of the kind CLIPModel"),
    ("dino_model", "clip_model", "give a DINO or DINOv2"),
    ("clip_model", None, "give a folder or a hub id within reach, or add --no_metrics"),
])  # fmt: skip
def test_refusals_of_judges(flag, kind, said, cat, given, judges, tmp_path):
    """Before a picture is drawn; transformers would go on with random weights."""
    wrong = judges[kind] if kind else "openai/clip-vit-base-patch32"
    told = refusal(cat, **given | judges | {flag: wrong, "output_dir": tmp_path / "drawn"})
    assert told.startswith(f"error: --{flag} {wrong}: ") and said in told and "\n" not in told
    assert not (tmp_path / "drawn").exists()


def test_refusals_of_arguments(capsys):
    needed = ["run", *flags(pretrained_model_name_or_path="m", instance_data_dir="d")]
    for words, said in (
        (["--protocol", "another", "folder"], "give customconcept101"),
        (["--protocol", "customconcept101", "folder", "--no_metrics"], "needs the metrics"),
        (["--num_images", "0"], "0 is not above 0"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args([*needed, *words])
        assert said in capsys.readouterr().err
