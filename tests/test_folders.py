"""What lies in the folders of pictures: captions in every form, masks, and what is left out."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from launching import finish, flags, fork, python, start
from pictures import make_picture, unwritable_exif
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from reading import load_trained, same_bits
from records import settings_of

from train_custom_diffusion import load_picture, parse_args, read_concepts

PROMPT = "photo of a <new1> cat"


def make_folder(folder, *names):
    """A folder with pictures of these names, each different."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        make_picture(number, 70, 60).save(folder / name)
    return folder


def read(folder, **values):
    """The concept in a folder, as the trainer reads it."""
    needed = {"pretrained_model_name_or_path": "none", "instance_prompt": PROMPT, "modifier_token": "<new1>"}
    (concept,) = read_concepts(parse_args(flags(**needed | {"instance_data_dir": folder} | values)))
    return concept


def captions_of(folder, **values):
    """{name of a picture: its caption} of a folder."""
    return {file.name: caption for file, caption in read(folder, **values).instance_samples}


# Captions

FORMS = {
    "kohya's": {"0.caption": "a <new1> cat"},
    "capitals": {"0.TXT": "a <new1> cat"},
    "capitals, kohya's": {"0.Caption": "a <new1> cat"},
    "after the picture's ending": {"0.png.txt": "a <new1> cat"},
    "after the picture's ending, kohya's": {"0.png.caption": "a <new1> cat"},
    "several lines": {"0.txt": "a <new1>\r\n cat\n"},
    "Windows, UTF-8": {"0.txt": "\ufeffa <new1> cat".encode()},
    "Windows, UTF-16": {"0.txt": "a <new1> cat".encode("utf-16")},
    "metadata.jsonl": {"metadata.jsonl": '{"file_name": "0.png", "text": "a <new1> cat"}\n\n'},
    "metadata.jsonl of another column": {"metadata.jsonl": '{"file_name": "0.png", "caption": "a <new1> cat"}'},
    "metadata.csv": {"metadata.csv": 'file_name,text\n0.png,"a <new1> cat"\n'},
    "metadata.jsonl with several captions": {"metadata.jsonl": '{"file_name": "0.png", "text": ["a <new1> cat", "b"]}'},
    "metadata.jsonl of Windows": {"metadata.jsonl": '{"file_name": ".\\\\0.png", "text": "a <new1> cat"}'},
    "metadata.jsonl with whole paths": {"metadata.jsonl": '{"file_name": "FOLDER/0.png", "text": "a <new1> cat"}'},
    "metadata.jsonl before a .txt": {
        "metadata.jsonl": '{"file_name": "0.png", "text": "a <new1> cat"}',
        "0.txt": "another",
    },
    "a .txt where metadata.jsonl has none": {"metadata.jsonl": '{"file_name": "0.png"}', "0.txt": "a <new1> cat"},
    "retrieve.py's lists": {"images.txt": "0.png\n", "caption.txt": "a <new1> cat\n", "urls.txt": "http://a/0\n"},
}


@pytest.mark.parametrize("form", FORMS)
def test_captions_of_every_form(form, tmp_path, capsys):
    """The caption is taken, the other picture keeps the prompt, and no file that was used is called left out."""
    make_folder(tmp_path / "cat", "0.png", "1.png")
    for name, content in FORMS[form].items():
        if isinstance(content, bytes):
            (tmp_path / "cat" / name).write_bytes(content)
        else:
            (tmp_path / "cat" / name).write_bytes(content.replace("FOLDER", str(tmp_path / "cat")).encode())
    assert captions_of(tmp_path / "cat") == {"0.png": "a <new1> cat", "1.png": PROMPT}
    assert len(read(tmp_path / "cat").instance_samples) == 2
    lines = set(capsys.readouterr().out.splitlines())
    left_out = {
        "metadata.jsonl before a .txt": "0.txt",
        "a .txt where metadata.jsonl has none": "metadata.jsonl",
    }
    expected = {f"instance_data_dir {tmp_path / 'cat'}: left out {left_out[form]}"} if form in left_out else set()
    assert lines == expected


def test_class_pictures_have_captions_of_every_form(tmp_path):
    """One reader for both folders; the class prompt is the caption of the others."""
    make_folder(tmp_path / "cat", "0.png")
    make_folder(tmp_path / "class", "0.png", "1.png", "2.png")
    (tmp_path / "class" / "0.txt").write_text("a cat on a sofa")
    (tmp_path / "class" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "two cats"}')
    for real_prior in ("False", "True"):
        prior = {"with_prior_preservation": True, "real_prior": real_prior}
        concept = read(tmp_path / "cat", class_data_dir=tmp_path / "class", class_prompt="cat", **prior)
        found = {file.name: caption for file, caption in concept.class_samples}
        assert found == {"0.png": "a cat on a sofa", "1.png": "two cats", "2.png": "cat"}


def test_broken_lists(tmp_path):
    """The file that is wrong is named."""
    make_folder(tmp_path / "cat", "0.png")
    for name, content in {
        "metadata.jsonl": '{"file": "0.png", "text": "a"}',
        "metadata.csv": "picture,text\n0.png,a\n",
    }.items():
        (tmp_path / "cat" / name).write_text(content)
        with pytest.raises(SystemExit, match=f"^error: .*cat/{name}: 'file_name'; each row needs a file_name"):
            read(tmp_path / "cat")
        (tmp_path / "cat" / name).unlink()
    (tmp_path / "cat" / "metadata.jsonl").write_text("[\n")
    with pytest.raises(SystemExit, match="^error: .*cat/metadata.jsonl: Expecting value"):
        read(tmp_path / "cat")


@pytest.fixture(scope="module")
def long_captions(sd1, tmp_path_factory):
    """A run with captions that are longer than what the model reads, and what it printed."""
    folder = tmp_path_factory.mktemp("long")
    make_folder(folder / "cat", "0.png", "1.png", "2.png", "3.png")
    (folder / "cat" / "0.txt").write_text("a <new1> cat, " + "sitting on a red sofa, " * 40)
    (folder / "cat" / "1.caption").write_text("a <new1> cat " + "cat " * 70)  # only when enlarged
    (folder / "cat" / "2.txt").write_text("a <new1> cat " + "cat " * 65)
    make_folder(folder / "class", "0.png", "1.png")
    (folder / "class" / "0.txt").write_text("a cat, " + "sitting on a red sofa, " * 40)
    prior = {"with_prior_preservation": True, "class_data_dir": folder / "class", "class_prompt": "cat"}
    values = {"pretrained_model_name_or_path": sd1, "instance_data_dir": folder / "cat", "modifier_token": "<new1>"}
    fork(folder / "run", max_train_steps=4, instance_prompt=PROMPT, num_class_images=2, **values, **prior)
    return folder / "run", (folder / "run.log").read_text()


def test_long_captions_are_cut(long_captions):
    """One line says how many, and the run goes on: captions of 200 tokens are what captioning models write."""
    folder, said = long_captions
    lines = [line for line in said.splitlines() if "cut to" in line]
    assert lines == ["3 prompts and captions are cut to the 77 tokens that the model reads"]
    assert f"{PROMPT!r}: 4 pictures (3 with captions), 2 class pictures (1 with captions)" in said
    assert all(value.isfinite().all() for value in load_trained(folder).values())
    assert len(settings_of(folder)["captions"]) == 3


# What is left out


def test_left_out_files_are_named_once(sd1, tmp_path):
    """In one line for each folder, by the first process alone, also where two concepts share a folder."""
    make_folder(tmp_path / "cat", "0.png", "1.png", "0-condlabel.png")
    make_folder(tmp_path / "class", "0.png")
    for name in ("a.jxl", "b.DNG", "c.mov", "d", "1.npz", "meta_cap.json", ".hidden", "0.txt"):
        (tmp_path / "cat" / name).write_text("a <new1> cat, a <new2> cat")
    (tmp_path / "class" / "Thumbs.db").write_text("")
    (tmp_path / "cat" / "sample").mkdir()
    concept = {"instance_data_dir": str(tmp_path / "cat"), "class_data_dir": str(tmp_path / "class")}
    concepts = [
        concept | {"instance_prompt": f"photo of a {word} cat", "class_prompt": "cat"} for word in ("<new1>", "<new2>")
    ]
    (tmp_path / "list.json").write_text(json.dumps(concepts))
    values = {"concepts_list": tmp_path / "list.json", "with_prior_preservation": True, "num_class_images": 1}
    values |= {"pretrained_model_name_or_path": sd1, "modifier_token": "<new1>+<new2>", "max_train_steps": 1}
    said = finish(start(tmp_path / "run", processes=2, **values), tmp_path / "run")
    lines = [line for line in said.splitlines() if "left out" in line]
    names = "0-condlabel.png, 1.npz, a.jxl, b.DNG, c.mov, d, meta_cap.json, sample/"
    assert lines == [
        f"instance_data_dir {tmp_path / 'cat'}: left out {names}",
        f"class_data_dir {tmp_path / 'class'}: left out Thumbs.db",
    ]


def test_listed_pictures(tmp_path, capsys):
    """metadata.jsonl may name pictures of a folder within; those that are gone are left out with a line."""
    make_folder(tmp_path / "cat" / "train", "0.png")
    make_picture(3).save(tmp_path / "cat" / "own.png")
    rows = [{"file_name": f"train/{i}.png", "text": f"a <new1> cat, {i}"} for i in range(2)]
    (tmp_path / "cat" / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert captions_of(tmp_path / "cat") == {"0.png": "a <new1> cat, 0", "own.png": PROMPT}
    assert capsys.readouterr().out == f"instance_data_dir {tmp_path / 'cat'}: left out 1.png of its list\n"


@pytest.mark.parametrize("inner", ["10_cat", "img/10_cat"])
def test_pictures_in_a_folder_within(inner, tmp_path):
    """The line names the folder that has them: other trainers read it from the one above."""
    make_folder(tmp_path / "kohya" / inner, "0.png")
    with pytest.raises(
        SystemExit, match=rf"instance_data_dir .*kohya: no pictures in it; give its folder {inner}, or put"
    ):
        read(tmp_path / "kohya")


def test_real_class_pictures_in_a_folder_within(tmp_path):
    """They are named before retrieve.py is."""
    make_folder(tmp_path / "cat", "0.png")
    make_folder(tmp_path / "reg" / "1_cat", "0.png")
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "reg", "class_prompt": "cat"}
    with pytest.raises(
        SystemExit, match="class_data_dir .*reg: no real class pictures in it; give its folder 1_cat, or run: python"
    ):
        read(tmp_path / "cat", real_prior=True, **prior)


def test_black_class_pictures(tmp_path):
    """Half precision and safety checkers leave such; a picture with one lighter pixel is none of them."""
    make_folder(tmp_path / "cat", "0.png")
    make_folder(tmp_path / "class", "0.png")
    black = Image.new("RGB", (64, 64))
    black.putpixel((3, 4), (1, 0, 0))
    black.save(tmp_path / "class" / "1.png")
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "cat"}
    read(tmp_path / "cat", **prior)
    Image.new("L", (64, 64)).save(tmp_path / "class" / "2.jpg")
    with pytest.raises(SystemExit, match="^error: .*class/2.jpg: all black, "):
        read(tmp_path / "cat", **prior)


# Masks


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Folders of one picture: with masks beside it, of other trainers' names, and with the same mask as its alpha."""
    folder = tmp_path_factory.mktemp("masked")
    image = make_picture(7, 150, 90)
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 2, (90, 150), np.uint8) * 255)
    for label in ("-masklabel", "-mask", "_mask", ".mask", "_MASK"):
        (folder / label).mkdir()
        image.save(folder / label / "0.png")
        mask.save(folder / label / f"0{label}.png")
    (folder / "alpha").mkdir()
    image.putalpha(mask)
    image.save(folder / "alpha" / "0.png")
    return folder


def test_masks_beside_pictures(masked, capsys):
    """With the flag they are masks, as an alpha would be; without it they are left out with a line."""
    expected = np.asarray(load_picture(masked / "alpha" / "0.png", keep_alpha=True)[0])
    labels = [folder.name for folder in masked.iterdir() if folder.name != "alpha"]
    assert len(labels) == 5
    for label in labels:
        folder = masked / label
        concept = read(folder, alpha_mask=True)
        assert concept.masks == {folder / "0.png": folder / f"0{label}.png"} and len(concept.instance_samples) == 1
        assert capsys.readouterr().out == ""
        ((file, mask),) = concept.masks.items()
        assert np.array_equal(np.asarray(load_picture(file, keep_alpha=True, mask=mask)[0]), expected)
        concept = read(folder)
        assert concept.masks == {} and len(concept.instance_samples) == 1
        assert capsys.readouterr().out == f"instance_data_dir {folder}: left out 0{label}.png\n"


def test_pictures_that_are_no_masks(tmp_path):
    """A picture is a mask only beside the picture that it is the mask of."""
    make_folder(tmp_path / "cat", "dog_mask.png", "mask.png", "unmask.png", "0.png", "0_masked.png", "7-masklabel.png")
    assert set(captions_of(tmp_path / "cat", alpha_mask=True)) == {
        "dog_mask.png", "mask.png", "unmask.png", "0.png", "0_masked.png",
    }  # fmt: skip


def test_trains_with_masks_beside_pictures(sd1, masked, tmp_path):
    """The weights are those of the same mask as an alpha, to the bit."""
    values = {"pretrained_model_name_or_path": sd1, "instance_prompt": PROMPT, "modifier_token": "<new1>"}
    values |= {"learning_rate": 1e-2, "max_train_steps": 2}
    beside, alpha, unmasked = (
        load_trained(fork(tmp_path / f"{name}{on}", instance_data_dir=masked / name, alpha_mask=on, **values))
        for name, on in (("-masklabel", "True"), ("alpha", "True"), ("-masklabel", "False"))
    )
    assert same_bits(beside, alpha) and not same_bits(beside, unmasked)
    assert "1 pictures (1 with masks of their own)" in (tmp_path / "-masklabelTrue.log").read_text()


def test_masks_that_hide_a_whole_picture(masked, tmp_path, capsys):
    """Said with the file's name: such a picture is learned whole."""
    shutil.copytree(masked / "-mask", tmp_path / "cat")
    read(tmp_path / "cat", alpha_mask=True)
    assert capsys.readouterr().out == ""
    Image.new("L", (150, 90)).save(tmp_path / "cat" / "0-mask.png")
    Image.new("RGBA", (60, 60), (200, 10, 30, 0)).save(tmp_path / "cat" / "1.png")
    Image.new("LA", (60, 60), (200, 255)).save(tmp_path / "cat" / "2.png")
    read(tmp_path / "cat", alpha_mask=True)
    lines = capsys.readouterr().out.splitlines()
    named = [re.match(".*/(.*): its mask hides all of it", line)[1] for line in lines]
    assert named == ["0.png", "1.png"]
    read(tmp_path / "cat")
    assert "hides" not in capsys.readouterr().out


# Large pictures


def test_jpeg_of_200_megapixels(sd1, tmp_path):
    """A phone's largest trains: it is decoded smaller, and nothing is printed about it."""
    (tmp_path / "cat").mkdir()
    Image.new("L", (16320, 12240), 130).save(tmp_path / "cat" / "0.jpg", quality=50)
    values = {"pretrained_model_name_or_path": sd1, "instance_data_dir": tmp_path / "cat", "modifier_token": "<new1>"}
    fork(tmp_path / "run", max_train_steps=2, instance_prompt=PROMPT, **values)
    said = (tmp_path / "run.log").read_text()
    assert "Warning" not in said and "limit" not in said
    code = f"""
import resource
from train_custom_diffusion import load_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image, size = load_picture({str(tmp_path / "cat" / "0.jpg")!r}, 90)
assert size == (16320, 12240) and 90 <= min(image.size) < 180
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kilobytes = int(python(code).stdout.split()[-1])
    assert kilobytes < 100_000, "decoded whole, it takes 800 MB"


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_decoded_smaller(orientation, tmp_path):
    """It looks as if it had been decoded as it is, and its size is the upright file's."""
    image = make_picture(5, 1000, 803)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "0.jpg", quality=95, exif=exif)
    found, size = load_picture(tmp_path / "0.jpg", 100)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "0.jpg"))
    assert size == upright.size and 100 <= min(found.size) < 200
    expected = np.asarray(upright.resize(found.size, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(found, float) - expected).mean() < 2, "of 255 levels"


# Pictures that viewers show


def test_metadata_that_pillow_cannot_write(tmp_path):
    """A phone's picture on its side, with a number that no file can hold again."""
    image = make_picture(3, 90, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "plain.jpg", quality=95, exif=exif)
    image.save(tmp_path / "broken.jpg", quality=95, exif=unwritable_exif())
    with pytest.raises(Exception):  # noqa: B017 (which one depends on Pillow)
        ImageOps.exif_transpose(Image.open(tmp_path / "broken.jpg"))
    found, size = load_picture(tmp_path / "broken.jpg")
    expected, _ = load_picture(tmp_path / "plain.jpg")
    assert size == (60, 90) and np.array_equal(np.asarray(found), np.asarray(expected))


def test_workflow_in_a_png(tmp_path):
    """ComfyUI writes how it drew a picture into the file; compressed, that may be larger than the picture."""
    text = PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    image = make_picture(3, 90, 60)
    image.save(tmp_path / "0.png", pnginfo=text)
    assert np.array_equal(np.asarray(load_picture(tmp_path / "0.png")[0]), np.asarray(image))


def test_pipe_among_the_pictures(tmp_path, capsys):
    """It is left out: who opened it would wait for ever."""
    make_folder(tmp_path / "cat", "0.png")
    os.mkfifo(tmp_path / "cat" / "1.png")
    assert captions_of(tmp_path / "cat") == {"0.png": PROMPT}
    assert "left out 1.png" in capsys.readouterr().out


def test_letters_composed_in_another_way(tmp_path):
    """macOS writes an accent as a letter of its own; word, prompts and captions are read alike."""
    composed, apart = "<\u00e9>", "<e\u0301>"
    make_folder(tmp_path / "cat", "0.png", "1.png")
    (tmp_path / "cat" / "0.txt").write_text(f"a {apart} cat on a sofa")
    values = {"modifier_token": apart, "instance_prompt": f"a {apart} cat"}
    assert captions_of(tmp_path / "cat", **values) == {
        "0.png": f"a {composed} cat on a sofa",
        "1.png": f"a {composed} cat",
    }
    words = flags(pretrained_model_name_or_path="none", instance_data_dir=tmp_path / "cat", **values)
    assert parse_args(words).modifier_token == composed
    (tmp_path / "list.json").write_text(
        json.dumps([{"instance_prompt": f"a {apart} cat", "instance_data_dir": str(tmp_path / "cat")}])
    )
    words = flags(pretrained_model_name_or_path="none", concepts_list=tmp_path / "list.json", modifier_token=composed)
    (concept,) = read_concepts(parse_args(words))
    assert concept.instance_prompt == f"a {composed} cat"
