"""How pictures are read, augmented and masked, against the recipe written out in NumPy."""

import collections

import numpy as np
import pytest
from conftest import flags, make_picture
from PIL import Image

from train_custom_diffusion import (
    Draws,
    collate,
    draw_scale,
    load_picture,
    parse_args,
    place_instance,
    read_concepts,
)

GREY = 0  # value of the empty canvas; no pixel has it, since 127.5 is no whole number
SIZE, FACTOR = 64, 8


# Reading


def check_colours(path, expected, tolerance=0):
    """The picture is RGB and its four quarters have these colours."""
    image = load_picture(path)
    assert image.mode == "RGB"
    pixels = np.asarray(image, int)
    height, width = pixels.shape[:2]
    centres = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    assert all(np.abs(pixels[c] - colour).max() <= tolerance for c, colour in zip(centres, expected, strict=True)), path


def quarters(mode, colours):
    """A 40 x 20 picture whose four quarters have these colours."""
    image = Image.new(mode, (40, 20))
    for i, colour in enumerate(colours):
        image.paste(colour, (i % 2 * 20, i // 2 * 10, i % 2 * 20 + 20, i // 2 * 10 + 10))
    return image


RGB = [(200, 10, 30), (20, 180, 40), (30, 60, 220), (90, 90, 90)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    """The viewer's picture is the same whichever way the camera was held."""
    turned = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    image = quarters("RGB", RGB)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image.transpose(turned) if turned is not None else image).save(tmp_path / "p.png", exif=exif)
    assert load_picture(tmp_path / "p.png").size == (40, 20)
    check_colours(tmp_path / "p.png", RGB)


def test_alpha_is_on_white(tmp_path):
    colours = [(200, 10, 30, 255), (20, 180, 40, 0), (0, 0, 0, 51), (90, 90, 90, 255)]
    expected = [(200, 10, 30), (255, 255, 255), (204, 204, 204), (90, 90, 90)]
    quarters("RGBA", colours).save(tmp_path / "p.png")
    check_colours(tmp_path / "p.png", expected, tolerance=1)


def test_palette_with_a_transparent_colour(tmp_path):
    image = quarters("RGB", RGB).quantize(4)
    image.save(tmp_path / "plain.png")
    check_colours(tmp_path / "plain.png", RGB, tolerance=8)
    image.save(tmp_path / "clear.png", transparency=image.getpixel((5, 5)))
    check_colours(tmp_path / "clear.png", [(255, 255, 255), *RGB[1:]], tolerance=8)


def test_grey_with_alpha(tmp_path):
    quarters("LA", [(0, 255), (255, 255), (100, 255), (100, 0)]).save(tmp_path / "p.png")
    check_colours(tmp_path / "p.png", [(0,) * 3, (255,) * 3, (100,) * 3, (255,) * 3], tolerance=1)


@pytest.mark.parametrize("name", ["p.png", "p.tif"])
def test_sixteen_bits(name, tmp_path):
    """0 to 65535 becomes 0 to 255; it is not cut off at 255."""
    values = np.zeros((20, 40), np.uint16)
    values[:10, :20], values[:10, 20:], values[10:, :20], values[10:, 20:] = 0, 65535, 25700, 300
    Image.fromarray(values).save(tmp_path / name)
    check_colours(tmp_path / name, [(0,) * 3, (255,) * 3, (100,) * 3, (1,) * 3], tolerance=1)


def test_cmyk(tmp_path):
    quarters("CMYK", [(0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0), (0, 0, 0, 255)]).save(tmp_path / "p.tif")
    check_colours(tmp_path / "p.tif", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)], tolerance=2)


def test_grey_and_black_and_white(tmp_path):
    quarters("L", [0, 80, 160, 255]).save(tmp_path / "grey.png")
    check_colours(tmp_path / "grey.png", [(value,) * 3 for value in (0, 80, 160, 255)])
    quarters("1", [0, 1, 1, 0]).save(tmp_path / "bits.png")
    check_colours(tmp_path / "bits.png", [(value,) * 3 for value in (0, 255, 255, 0)])


# Augmentation


def covered(pixels):
    """Top, left, height and width of the part of the canvas that is not empty."""
    rows, columns = np.nonzero((pixels != GREY).any((1, 2)))[0], np.nonzero((pixels != GREY).any((0, 2)))[0]
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def resized(image, width, height):
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1


def is_window(pixels, whole):
    """Whether `pixels` are cut out of `whole` somewhere."""
    size = len(pixels)
    corners = whole[: len(whole) - size + 1, : whole.shape[1] - size + 1]
    places = np.argwhere((corners == pixels[0, 0]).all(2))
    return any(np.array_equal(whole[y : y + size, x : x + size], pixels) for y, x in places)


@pytest.mark.parametrize("size", [64, 128, 512])
def test_square_picture_follows_the_recipe(size):
    """The guide's recipe for every kind of scale, placement read back from the pixels."""
    image, rng = make_picture(1, 90, 90), np.random.default_rng(0)
    places = set()
    for scale in [*np.linspace(size // 3, size, 25, dtype=int), *np.linspace(int(1.2 * size), int(1.4 * size) - 1, 8)]:
        scale = int(scale)
        pixels, mask = place_instance(image, scale, size, FACTOR, rng)
        assert pixels.shape == (size, size, 3) and pixels.dtype == np.float32
        assert mask.shape == (size // FACTOR, size // FACTOR) and set(np.unique(mask)) <= {0, 1}
        whole = resized(image, scale, scale)
        if scale > size:
            assert mask.all()
            assert is_window(pixels, whole)
            continue
        top, left, height, width = covered(pixels)
        places.add((top, left))
        assert (height, width) == (scale, scale)
        assert np.array_equal(pixels[top : top + scale, left : left + scale], whole)
        assert (pixels == GREY).all(2).sum() == size**2 - scale**2
        expected = np.zeros_like(mask)
        expected[top // FACTOR + 1 : (top + scale) // FACTOR - 1, left // FACTOR + 1 : (left + scale) // FACTOR - 1] = 1
        if expected.any():
            assert np.array_equal(mask, expected), (scale, top, left)
        else:  # where the recipe leaves nothing: something, and inside the picture
            rows, columns = np.nonzero(mask)
            assert len(rows) and top <= rows.min() * FACTOR + FACTOR - 1 and rows.max() * FACTOR < top + scale
            assert left <= columns.min() * FACTOR + FACTOR - 1 and columns.max() * FACTOR < left + scale
    assert len(places) > 15, "places are random"


@pytest.mark.parametrize("width, height", [(90, 45), (45, 90), (100, 20)])
def test_other_shapes_keep_their_aspect_ratio(width, height):
    """Longer side at the scale; only the covered area counts. Above the size: shorter side at the scale."""
    image, rng = make_picture(2, width, height), np.random.default_rng(0)
    for scale in (SIZE // 3, 40, SIZE):
        for _ in range(20):
            pixels, mask = place_instance(image, scale, SIZE, FACTOR, rng)
            top, left, rows, columns = covered(pixels)
            assert max(rows, columns) == scale and abs(columns / rows - width / height) < width / height * 0.08
            assert np.array_equal(pixels[top : top + rows, left : left + columns], resized(image, columns, rows))
            ys, xs = np.nonzero(mask)
            assert len(ys)
            assert ys.max() * FACTOR < top + rows and (ys.min() + 1) * FACTOR > top
            assert xs.max() * FACTOR < left + columns and (xs.min() + 1) * FACTOR > left
    pixels, mask = place_instance(image, 80, SIZE, FACTOR, rng)
    assert mask.all() and pixels.shape == (SIZE, SIZE, 3) and (pixels != GREY).all()
    shorter = resized(image, *(round(side * 80 / min(width, height)) for side in (width, height)))
    assert is_window(pixels, shorter)


@pytest.mark.parametrize("size", [64, 512])
def test_scales(size):
    """66 % uniform in [S/3, S], 34 % uniform in [1.2 S, 1.4 S)."""
    rng = np.random.default_rng(0)
    scales = np.array([draw_scale(size, rng) for _ in range(20000)])
    small, large = scales[scales <= size], scales[scales > size]
    assert abs(len(small) / len(scales) - 0.66) < 0.015
    assert small.min() == size // 3 and small.max() == size
    assert large.min() == int(1.2 * size) and large.max() == int(1.4 * size) - 1
    for part, low, high in ((small, size // 3, size + 1), (large, int(1.2 * size), int(1.4 * size))):
        assert abs(part.mean() - (low + high - 1) / 2) < 0.02 * size
        assert abs(part.std() - ((high - low) ** 2 - 1) ** 0.5 / 12**0.5) < 0.02 * size


# Draws


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Instance pictures (the third is wide) and class pictures."""
    folder = tmp_path_factory.mktemp("draws")
    for name, seed in (("mine", 10), ("class", 20)):
        (folder / name).mkdir()
        for i in range(3):
            make_picture(seed + i, 100 if i == 2 else 50, 50).save(folder / name / f"{i}.png")
    return folder


PROMPT = "photo of a <new1> cat"


def make_draws(folders, **values):
    """The trainer's draws, and the prompts by the number that stands for their token ids."""
    values = {
        "pretrained_model_name_or_path": "none",
        "instance_data_dir": folders / "mine",
        "instance_prompt": PROMPT,
        "class_data_dir": folders / "class",
        "class_prompt": "cat",
        "modifier_token": "<new1>",
        "resolution": SIZE,
        "report_to": "none",
    } | values
    args = parse_args(flags(**values))
    numbers = collections.defaultdict(lambda: np.array([len(numbers)]))
    draws = Draws(read_concepts(args), args, numbers, (4, SIZE // FACTOR, SIZE // FACTOR), 1000)
    return draws, lambda sample: next(text for text, n in numbers.items() if n[0] == sample["input_ids"][0])


def test_masks_prompts_and_scales_over_many_draws(folders):
    """3000 draws at 64 pixels: no empty mask, the prefix that belongs to the scale, both prefixes equally often."""
    draws, prompt_of = make_draws(folders)
    prefixes = collections.Counter()
    for n in range(3000):
        (sample,) = draws[n]
        mask, pixels = sample["mask"], sample["pixel_values"].transpose(1, 2, 0)
        assert mask.shape == (1, 8, 8) and mask.sum() > 0, n
        prefix = prompt_of(sample).removesuffix(PROMPT)
        prefixes[prefix] += 1
        top, left, height, width = covered(pixels)
        scale = max(height, width)
        if prefix in ("zoomed in ", "close up "):
            assert mask.all() and (height, width) == (SIZE, SIZE)
        elif prefix in ("a far away ", "very small "):
            assert scale < 0.6 * SIZE
        else:
            assert prefix == "" and 0.6 * SIZE <= scale <= SIZE
    assert set(prefixes) == {"", "a far away ", "very small ", "zoomed in ", "close up "}
    assert abs(prefixes["zoomed in "] + prefixes["close up "] - 3000 * 0.34) < 90
    assert abs(prefixes["zoomed in "] - prefixes["close up "]) < 110
    assert abs(prefixes["a far away "] - prefixes["very small "]) < 110


def test_every_picture_is_drawn_once_an_epoch(folders):
    """Without augmentation the pictures can be recognized; the order changes from epoch to epoch."""
    draws, _ = make_draws(folders, noaug=True, center_crop=True)
    orders = [tuple(draws[3 * epoch + i][0]["pixel_values"].tobytes() for i in range(3)) for epoch in range(8)]
    assert all(len(set(order)) == 3 for order in orders) and len({frozenset(order) for order in orders}) == 1
    assert len(set(orders)) > 2


def test_no_augmentation_and_center_crop(folders):
    """--noaug: the whole picture, no prefix. --center_crop: the wide one is cut to a square first."""
    for crop in (False, True):
        draws, prompt_of = make_draws(folders, noaug=True, center_crop=str(crop))
        shapes = set()
        for n in range(3):
            (sample,) = draws[n]
            assert prompt_of(sample) == PROMPT
            shapes.add(covered(sample["pixel_values"].transpose(1, 2, 0))[2:])
            if crop:
                expected = np.zeros((8, 8))
                expected[1:7, 1:7] = 1
                assert np.array_equal(sample["mask"][0], expected)
        assert shapes == ({(64, 64)} if crop else {(64, 64), (32, 64)})


def test_class_pictures(folders, tmp_path):
    """Shorter side at the size; the middle with --center_crop, anywhere along the longer side without; no mask."""
    image = make_picture(3, 120, 60)
    image.save(tmp_path / "wide.png")
    values = {"with_prior_preservation": True, "real_prior": True, "class_data_dir": tmp_path}
    draws, prompt_of = make_draws(folders, **values)
    whole, found = resized(image, 128, 64), set()
    for n in range(200):
        sample = draws[n][1]
        crop = sample["pixel_values"].transpose(1, 2, 0)
        (left,) = (x for x in range(65) if np.array_equal(whole[:, x : x + 64], crop))
        found.add(left)
        assert prompt_of(sample) == "cat" and sample["mask"].shape == (1, 8, 8) and sample["mask"].all()
    assert len(found) > 55 and min(found) < 3 and max(found) > 61
    draws, _ = make_draws(folders, **values, center_crop=True)
    middle = resized(image.crop((30, 0, 90, 60)), 64, 64)
    assert all(np.abs(draws[n][1]["pixel_values"].transpose(1, 2, 0) - middle).max() < 0.02 for n in range(5))


def test_flip_mirrors_half_of_them(folders):
    draws, _ = make_draws(folders, noaug=True, hflip=True)
    still, _ = make_draws(folders, noaug=True)
    mirrored = []
    for n in range(300):
        left, right = draws[n][0]["pixel_values"], still[n][0]["pixel_values"]
        same = {np.array_equal(left, right): False, np.allclose(left[..., ::-1], right, atol=0.02): True}
        if True in same:
            mirrored.append(same[True])
    assert len(mirrored) > 150 and 0.35 < np.mean(mirrored) < 0.65


def test_a_draw_depends_on_seed_and_number_alone(folders):
    """Asked in any order, from a fresh object: the same numbers. Another seed: others."""
    flags_of = {"with_prior_preservation": True, "real_prior": True, "hflip": True}
    draws, _ = make_draws(folders, **flags_of)
    later, _ = make_draws(folders, **flags_of)
    other, _ = make_draws(folders, **flags_of, seed=1)
    for n in (9, 2, 5, 0):
        first, again = collate([draws[n]]), collate([later[n]])
        for key in ("pixel_values", "mask", "posterior_noise", "noise", "timesteps"):
            assert np.array_equal(first[key], again[key])
        assert not np.array_equal(first["noise"], collate([other[n]])["noise"])
    assert not np.array_equal(draws[0][0]["noise"], draws[1][0]["noise"])


def test_epoch_is_the_longer_of_both(folders, tmp_path):
    """Three instance pictures and two class pictures, and the other way round."""
    for name, count in (("few", 2), ("many", 7)):
        (tmp_path / name).mkdir()
        for i in range(count):
            make_picture(50 + i).save(tmp_path / name / f"{i}.png")
        draws, _ = make_draws(
            folders, with_prior_preservation=True, real_prior=True, class_data_dir=tmp_path / name, noaug=True,
            center_crop=True,
        )  # fmt: skip
        assert draws.epoch_length == max(3, count)
        for kind, pictures in ((0, 3), (1, count)):
            seen = {draws[n][kind]["pixel_values"].tobytes() for n in range(draws.epoch_length)}
            assert len(seen) == pictures
