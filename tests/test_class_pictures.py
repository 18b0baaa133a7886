"""Class pictures: generated ones, real ones as retrieve.py leaves them, and plain folders."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from launching import SCRIPT, finish, flags, fork, fork_script, start, train
from observers import record_generation
from pictures import make_picture
from PIL import Image
from reading import check_loading, check_weight_files, fresh_pipeline, load_as_a_user, load_trained
from safetensors.torch import load_file, save_file


def generate(folder, processes=1, **values):
    """Trains with generated class pictures; returns (prompt, seed) of all that each process drew."""
    values = {"sample_batch_size": 2, "max_train_steps": 2, "learning_rate": 1e-2} | values
    finish(start(folder, processes, observer=record_generation, **values), folder)
    files = sorted(folder.parent.glob(f"{folder.name}.drawn*"))
    return [[line.split(" ") for line in file.read_text().splitlines()] for file in files]


@pytest.fixture(scope="module")
def concepts(two_concepts):
    return two_concepts | {"freeze_model": "crossattn", "num_class_images": 3}


@pytest.fixture(scope="module")
def generated(concepts, tmp_path_factory):
    """Two concepts, two processes, three class pictures each: the run's folder and who drew what."""
    folder = tmp_path_factory.mktemp("runs") / "generated"
    return folder, generate(folder, processes=2, **concepts)


def test_processes_share_the_generation(generated):
    drawn = generated[1]
    assert [len(pictures) for pictures in drawn] == [3, 3]
    assert sorted(prompt for prompt, _ in drawn[0] + drawn[1]) == ["cat"] * 3 + ["pot"] * 3


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
    pipeline = fresh_pipeline(sd1)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline.scheduler = DPMSolverMultistepScheduler(**betas, timestep_spacing="leading")
    for prompt, seed in generated[1][1]:
        generator = torch.Generator().manual_seed(int(seed))
        expected = np.asarray(pipeline(prompt, height=64, width=64, generator=generator).images[0], int)
        pictures = [np.asarray(Image.open(file), int) for file in (world / f"generated_{prompt}").glob("*.png")]
        assert min(np.abs(picture - expected).max() for picture in pictures) <= 2


def test_two_concepts_load_with_diffusers(generated, sd1):
    """Queries and outputs trained too; two words, one of them with a capital; the same as copying by hand."""
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
    (drawn,) = generate(tmp_path / "run", **concepts | {"num_class_images": 4})
    assert sorted(prompt for prompt, _ in drawn) == ["cat", "pot"]
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    pictures = [file for file in folder.glob("[!.]*") if file.suffix in (".png", ".jpg")]
    assert len(pictures) == 4
    assert all(Image.open(file).convert("RGB").getbbox() for file in pictures)


@pytest.mark.gpu
def test_pictures_are_generated_in_fp16_on_a_gpu(one_concept, tmp_path):
    """fp16 is the default on a GPU; a picture of numbers that are none would be black."""
    values = {"with_prior_preservation": True, "class_prompt": "cat", "num_class_images": 3, "sample_batch_size": 2}
    train(tmp_path / "run", class_data_dir=tmp_path / "cats", **one_concept | values)
    pictures = [Image.open(file) for file in (tmp_path / "cats").glob("*.png")]
    assert [picture.size for picture in pictures] == [(64, 64)] * 3
    assert all(np.asarray(picture).std() > 1 for picture in pictures)
    assert all(value.isfinite().all() for value in load_trained(tmp_path / "run").values())


@pytest.fixture(scope="module")
def overflowing(sd1, tmp_path_factory):
    """A model whose pictures are no numbers, as where half precision overflows; its encoder is whole."""
    model = tmp_path_factory.mktemp("models") / "overflowing"
    shutil.copytree(sd1, model)
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.bias"] += float("nan")
    save_file(weights, file, {"format": "pt"})
    return model


def test_class_pictures_that_overflow(overflowing, one_concept, tmp_path):
    """The run stops before the first one is kept: a black picture would be used by every later run."""
    values = one_concept | {"with_prior_preservation": True, "class_prompt": "cat", "num_class_images": 3}
    values |= {"pretrained_model_name_or_path": overflowing, "class_data_dir": tmp_path / "cats"}
    said = finish(start(tmp_path / "run", max_train_steps=1, **values), tmp_path / "run", status=1)
    assert re.match("error: class pictures: .* overflow .*--prior_generation_precision", said.splitlines()[-1])
    assert not list((tmp_path / "cats").glob("*"))


def test_validation_pictures_that_overflow(overflowing, one_concept, tmp_path):
    """A warning, as what is trained may be sound."""
    values = one_concept | {"pretrained_model_name_or_path": overflowing, "max_train_steps": 1}
    fork(tmp_path / "run", validation_prompt="a <new1> cat", **values)
    said = (tmp_path / "run.log").read_text()
    assert re.search("^warning: pictures are black: .* overflow in torch.float32", said, re.MULTILINE)
    assert "loads as trained (checked)" in said


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


def read(flags_list):
    """Captions and files of the class pictures that the trainer finds, from the working folder."""
    from train_custom_diffusion import parse_args, read_concepts

    (concept,) = read_concepts(parse_args(flags_list))
    return [(caption, file.resolve()) for file, caption in concept.class_samples]


def test_retrieved_pictures(sd1, world, monkeypatch):
    """Lines of images.txt that are absolute, relative to the working folder, relative to class_data_dir."""
    monkeypatch.chdir(world)
    found = read(flags(**real_flags(sd1, world, class_data_dir="retrieved")))
    images = world / "retrieved" / "images"
    assert found == [(f"a cat, number {i}", (images / f"{i}.png").resolve()) for i in range(6)]


def test_blank_line_takes_its_caption_along(sd1, world, tmp_path):
    """Of images.txt, wherever it is."""
    folder = tmp_path / "retrieved"
    shutil.copytree(world / "cats", folder / "images")
    for names, captions, expected in (
        ("images/0.png\n\nimages/1.png\n", "a\nb\nc\n", [("a", "0.png"), ("c", "1.png")]),
        ("\nimages/0.png\n\n", "a\nb\nc\n", [("b", "0.png")]),
    ):
        (folder / "images.txt").write_text(names)
        (folder / "caption.txt").write_text(captions)
        found = read(flags(**real_flags(sd1, world, class_data_dir=folder)))
        assert [(caption, file.name) for caption, file in found] == expected


def test_run_on_retrieved_pictures_counts_them(trained):
    """`--real_prior=True`, as the guide writes it, with --num_class_images=5 of six."""
    assert "5 pictures, 5 class pictures" in (trained / "stdout.txt").read_text()


def test_plain_folder_of_real_pictures(sd1, world):
    """class_prompt is every caption."""
    found = read(flags(**real_flags(sd1, world, class_data_dir=world / "cats")))
    assert found == [("cat", (world / "cats" / f"{i}.png").resolve()) for i in range(6)]


@pytest.mark.parametrize("name", ["missing", "empty", "with a space"])
def test_missing_real_pictures_name_the_command(name, sd1, world, tmp_path):
    """The error ends in the retrieve.py command that fetches them, ready to be pasted into a shell."""
    folder = tmp_path / name
    if name == "empty":
        (folder / "images").mkdir(parents=True)
    values = real_flags(sd1, world, class_data_dir=folder, class_prompt="tabby cat", num_class_images=7)
    process = fork_script(SCRIPT, *flags(**values, output_dir=tmp_path / "run"))
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    words = shlex.split(line[line.index("python retrieve.py") :])
    expected = ["--class_prompt", "tabby cat", "--class_data_dir", str(folder), "--num_class_images", "7"]
    assert words == ["python", "retrieve.py", *expected]
    assert not (tmp_path / "run").exists()


def test_real_prior_can_be_switched_off(sd1, world, tmp_path):
    """--real_prior=False is no --real_prior: existing pictures are used, none is asked of retrieve.py."""
    values = real_flags(sd1, world, class_data_dir=world / "cats", real_prior="False", num_class_images=6)
    fork(tmp_path / "run", **values | {"max_train_steps": 1})
    assert "6 class pictures" in (tmp_path / "run.log").read_text()
    assert len(list((world / "cats").iterdir())) == 6
