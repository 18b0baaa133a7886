"""Class pictures: generated ones, real ones as retrieve.py leaves them, and plain folders."""

import os
import shlex
import sys

import numpy as np
import pytest
from conftest import LAUNCHERS, ROOT, SCRIPT, flags, fresh_pipeline, load_trained, make_picture, run, train
from PIL import Image

# The trainer as a process that writes down which prompts and seeds the base model drew, one file a process.
GENERATING = """
import json, os, sys
sys.path.insert(0, {root!r})
from diffusers import StableDiffusionPipeline
from train_custom_diffusion import main, parse_args

call = StableDiffusionPipeline.__call__
def recorded(self, prompt, *args, generator, **kwargs):
    with open(f"{{sys.argv[1]}}/drawn-by-{{os.environ.get('RANK', '0')}}.txt", "a") as file:
        file.writelines(f"{{p}} {{g.initial_seed()}}\\n" for p, g in zip(prompt, generator, strict=True))
    return call(self, prompt, *args, generator=generator, **kwargs)
StableDiffusionPipeline.__call__ = recorded
main(parse_args(sys.argv[2:]))
"""


def generate(launcher, folder, notes, **values):
    """Trains with generated class pictures; returns (prompt, seed) of all that each process drew."""
    notes.mkdir()
    script = notes / "notebook.py"
    script.write_text(GENERATING.format(root=str(ROOT)))
    values = {"output_dir": folder, "resolution": 64, "train_batch_size": 1, "max_train_steps": 2} | values
    values |= {"report_to": "none", "dataloader_num_workers": 0, "learning_rate": 1e-2, "sample_batch_size": 2}
    process = run(*LAUNCHERS[launcher], script, notes, *flags(**values))
    assert process.returncode == 0, process.stderr[-5000:]
    lines = {file.name: file.read_text().splitlines() for file in notes.glob("drawn-by-*")}
    return {name: [line.split(" ") for line in drawn] for name, drawn in lines.items()}


@pytest.fixture(scope="module")
def concepts(two_concepts):
    return two_concepts | {"freeze_model": "crossattn", "num_class_images": 3}


@pytest.fixture(scope="module")
def generated(concepts, tmp_path_factory):
    """Two concepts, two processes, three class pictures each: the run's folder and who drew what."""
    folder = tmp_path_factory.mktemp("runs") / "generated"
    return folder, generate("torchrun", folder, tmp_path_factory.mktemp("notes") / "first", **concepts)


def test_processes_share_the_generation(generated):
    drawn = generated[1]
    assert {name: len(pictures) for name, pictures in drawn.items()} == {"drawn-by-0.txt": 3, "drawn-by-1.txt": 3}
    assert sorted(prompt for prompt, _ in sum(drawn.values(), [])) == ["cat"] * 3 + ["pot"] * 3


def test_generated_pictures(generated, world):
    """As many as asked for, of the resolution, no two alike."""
    pictures = []
    for name in ("cat", "pot"):
        files = list((world / f"generated_{name}").iterdir())
        assert len(files) == 3
        pictures += [np.asarray(Image.open(file)) for file in files]
    assert all(picture.shape == (64, 64, 3) for picture in pictures)
    assert all((a != b).any() for i, a in enumerate(pictures) for b in pictures[:i])


def test_generated_pictures_are_the_base_model_s(generated, world, sd1):
    """Drawn again here with diffusers alone, from the prompts and seeds that the processes wrote down."""
    import torch

    for prompt, seed in generated[1]["drawn-by-1.txt"]:
        generator = torch.Generator().manual_seed(int(seed))
        expected = np.asarray(fresh_pipeline(sd1)(prompt, height=64, width=64, generator=generator).images[0], int)
        pictures = [np.asarray(Image.open(file), int) for file in (world / f"generated_{prompt}").glob("*.png")]
        assert min(np.abs(picture - expected).max() for picture in pictures) <= 2


def test_two_concepts_load_with_diffusers(generated, sd1):
    """Queries and outputs trained too; two words, one of them with a capital; the same as copying by hand."""
    import torch
    from test_outputs import check_loading, check_weight_files, load_as_a_user

    projections = ("to_k.weight", "to_v.weight", "to_q.weight", "to_out.0.weight", "to_out.0.bias")
    check_weight_files(sd1, generated[0], ["<New1>", "<new2>"], projections)
    for word in ("<New1>", "<new2>"):
        check_loading(sd1, generated[0], word, f"photo of a {word} cat")
    pipeline = load_as_a_user(sd1, generated[0], ["<New1>", "<new2>"], "safetensors")
    table, trained = pipeline.text_encoder.get_input_embeddings().weight, load_trained(generated[0])
    for word, first in (("<New1>", 42170), ("<new2>", 47629)):
        row = table[pipeline.tokenizer.convert_tokens_to_ids(word)]
        assert torch.equal(row, trained[word])
        assert not torch.equal(row, table[first])


def test_generation_goes_on_and_overwrites_nothing(generated, concepts, world, tmp_path):
    """One is missing or unfinished, the user added a photo and a text: two are made, the rest stays."""
    folder = world / "generated_cat"
    files = sorted(folder.iterdir())
    (folder / f".{files[1].name}").write_bytes(files[1].read_bytes()[:100])
    files[1].unlink()
    make_picture(900).save(folder / "a_photo_of_mine.jpg")
    (folder / "notes.txt").write_text("not a picture")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("[!.]*")}
    drawn = generate("python", tmp_path / "run", tmp_path / "notes", **concepts | {"num_class_images": 4})
    assert sorted(prompt for prompt, _ in drawn["drawn-by-0.txt"]) == ["cat", "pot"]
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    pictures = [file for file in folder.glob("[!.]*") if file.suffix in (".png", ".jpg")]
    assert len(pictures) == 4
    assert all(Image.open(file).convert("RGB").getbbox() for file in pictures)


# Real pictures


def real_flags(sd1, world, **values):
    return {
        "pretrained_model_name_or_path": sd1,
        "instance_data_dir": world / "my_cat",
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
        "class_prompt": "cat",
        "with_prior_preservation": True,
        "real_prior": True,
        "report_to": "none",
        "resolution": 64,
    } | values


def read(flags_list, cwd):
    """Captions and files of the class pictures that the trainer finds, as a notebook sees them."""
    from train_custom_diffusion import parse_args, read_concepts

    here = os.getcwd()
    os.chdir(cwd)
    try:
        (concept,) = read_concepts(parse_args(flags_list))
        return [
            (caption, file.resolve())
            for caption, file in zip(concept.class_captions, concept.class_pictures, strict=True)
        ]
    finally:
        os.chdir(here)


def test_retrieved_pictures(sd1, world):
    """Lines of images.txt that are absolute, relative to the working folder, relative to class_data_dir."""
    found = read(flags(**real_flags(sd1, world, class_data_dir="retrieved")), world)
    images = world / "retrieved" / "images"
    assert found == [(f"a cat, number {i}", (images / f"{i}.png").resolve()) for i in range(6)]


def test_run_on_retrieved_pictures_counts_them(trained):
    """`--real_prior=True`, as the guide writes it, with --num_class_images=5 of six."""
    assert "5 pictures, 5 class pictures" in (trained / "stdout.txt").read_text()


def test_plain_folder_of_real_pictures(sd1, world):
    """class_prompt is every caption."""
    found = read(flags(**real_flags(sd1, world, class_data_dir=world / "cats")), world)
    assert found == [("cat", (world / "cats" / f"{i}.png").resolve()) for i in range(6)]


@pytest.mark.parametrize("name", ["missing", "empty", "with a space"])
def test_missing_real_pictures_name_the_command(name, sd1, world, tmp_path):
    """The error ends in the retrieve.py command that fetches them, ready to be pasted into a shell."""
    folder = tmp_path / name
    if name == "empty":
        (folder / "images").mkdir(parents=True)
    values = real_flags(sd1, world, class_data_dir=folder, class_prompt="tabby cat", num_class_images=7)
    process = run(sys.executable, SCRIPT, *flags(**values, output_dir=tmp_path / "run"))
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    words = shlex.split(line[line.index("python retrieve.py") :])
    expected = ["--class_prompt", "tabby cat", "--class_data_dir", str(folder), "--num_class_images", "7"]
    assert words == ["python", "retrieve.py", *expected]
    assert not (tmp_path / "run").exists()


def test_real_prior_can_be_switched_off(sd1, world, tmp_path):
    """--real_prior=False is no --real_prior: existing pictures are used, none is asked of retrieve.py."""
    values = real_flags(sd1, world, class_data_dir=world / "cats", real_prior="False", num_class_images=6)
    folder = train(tmp_path / "run", **values | {"max_train_steps": 1})
    assert "6 class pictures" in (folder / "stdout.txt").read_text()
    assert len(list((world / "cats").iterdir())) == 6
