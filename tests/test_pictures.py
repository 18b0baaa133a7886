"""How pictures are read, augmented and masked, against the recipe written out in NumPy."""

import collections
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import flags, fork, train
from pictures import display_p3, make_picture
from PIL import Image
from reading import load_trained, same_bits
from records import settings_of

import train_custom_diffusion
from train_custom_diffusion import (
    CustomDiffusionDataset,
    collate_fn,
    draw_scale,
    load_picture,
    parse_args,
    place_instance,
    read_concepts,
    read_folder,
)

GREY = 0  # value of the empty canvas; no pixel has it, since 127.5 is no whole number
SIZE, FACTOR = 64, 8


# Reading


def check_colours(path, expected, tolerance=0):
    """The picture is RGB and its four quarters have these colours."""
    image, _ = load_picture(path)
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
    image, size = load_picture(tmp_path / "p.png")
    assert image.size == size == (40, 20)
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


def test_grey_and_black_and_white(tmp_path):
    quarters("L", [0, 80, 160, 255]).save(tmp_path / "grey.png")
    check_colours(tmp_path / "grey.png", [(value,) * 3 for value in (0, 80, 160, 255)])
    quarters("1", [0, 1, 1, 0]).save(tmp_path / "bits.png")
    check_colours(tmp_path / "bits.png", [(value,) * 3 for value in (0, 255, 255, 0)])


# Files that a camera, a scanner or a paint program may leave: how to make them, the colours of their quarters, and
# how far these may be off


def lab_to_rgb(lightness, a, b):
    """CIE L*a*b* under D50, as defined, to 8-bit sRGB."""
    y = (lightness + 16) / 116
    xyz = [f**3 if f > 6 / 29 else (f - 4 / 29) * 108 / 841 for f in (y + a / 500, y, y - b / 200)]
    matrix = np.array([[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]])
    linear = (matrix @ (np.array(xyz) * (0.9642, 1, 0.8249))).clip(0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def frames(file):
    """Two frames, of which the first counts."""
    other = quarters("RGB", RGB[::-1])
    quarters("RGB", RGB).save(file, save_all=True, append_images=[other], duration=100, lossless=True)


def turned(file):
    exif = Image.Exif()
    exif[0x0112] = 6
    quarters("RGB", RGB).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif, quality=95, subsampling=0)


def numbers(values, dtype, **options):
    """Maker of a picture of numbers, one for each quarter."""
    return lambda file: Image.fromarray(np.repeat(np.repeat(np.array(values, dtype).reshape(2, 2), 10, 0), 20, 1)).save(
        file, **options
    )


def paint(mode, colours, **options):
    return lambda file: quarters(mode, colours).save(file, **options)


def grey(*values):
    return [(value,) * 3 for value in values]


CMYK = [(0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 51, 51), (0, 0, 0, 255)]
CMYK_AS_RGB = [(255, 0, 0), (0, 255, 0), (204, 204, 163), (0, 0, 0)]  # 255 x (1 - ink) x (1 - black)
LAB = [(50, 0, 0), (60, 40, 20), (80, -30, 30), (30, 10, -40)]
LAB_BYTES = [(round(light * 2.55), a + 128, b + 128) for light, a, b in LAB]
FULL = {"quality": 95, "subsampling": 0}
ODD = {
    "cmyk.jpg": (paint("CMYK", CMYK, **FULL), CMYK_AS_RGB, 6),
    "cmyk.tif": (paint("CMYK", CMYK), CMYK_AS_RGB, 2),
    "lab.tif": (paint("LAB", LAB_BYTES), [lab_to_rgb(*colour) for colour in LAB], 5),
    "ycbcr.tif": (paint("YCbCr", [(light, 128, 128) for light in (100, 180, 0, 255)]), grey(100, 180, 0, 255), 1),
    "grey.jpg": (paint("L", [0, 80, 160, 255], **FULL), grey(0, 80, 160, 255), 3),
    "bits.tif": (paint("1", [0, 1, 1, 0]), grey(0, 255, 255, 0), 0),
    "alpha.webp": (paint("RGBA", [(*RGB[0], 255), (*RGB[1], 0), *[(*c, 255) for c in RGB[2:]]], lossless=True),
                   [RGB[0], (255, 255, 255), *RGB[2:]], 1),
    "alpha.tif": (paint("RGBA", [(0, 0, 0, 51)] * 4), grey(204, 204, 204, 204), 1),
    "16 bits.png": (numbers([0, 65535, 25700, 6500], np.uint16), grey(0, 255, 100, 25), 0.5),
    "16 bits.tif": (numbers([0, 65535, 25700, 6500], ">u2"), grey(0, 255, 100, 25), 0.5),
    "32 bits.tif": (numbers([0, 65535, 25700, 6500], np.int32), grey(0, 255, 100, 25), 0.5),
    "float.tif": (numbers([0, 1, 0.5, 0.1], np.float32), grey(0, 255, 127.5, 25.5), 0.6),
    "turned.JPG": (turned, RGB, 6),
    "frames.gif": (frames, RGB, 8),
    "frames.webp": (frames, RGB, 0),
    "frames.png": (frames, RGB, 0),
    "photo of a Käfer, 甲虫.bmp": (paint("RGB", RGB), RGB, 0),
    "line.png": (lambda file: Image.new("RGB", (1, 4000), RGB[0]).save(file), [RGB[0]] * 4, 0),
    "point.png": (lambda file: Image.new("RGB", (1, 1), RGB[0]).save(file), [RGB[0]] * 4, 0),
    "link.png": (lambda file: file.symlink_to("frames.png"), RGB, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def odd_pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd pictures")
    for name, (make, _, _) in ODD.items():
        make(folder / name)
    return folder


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures(name, odd_pictures):
    _, colours, tolerance = ODD[name]
    check_colours(odd_pictures / name, colours, tolerance)


def test_trains_on_odd_pictures(odd_pictures, sd1, tmp_path):
    """One epoch over all of them, enlarged and reduced."""
    train(
        tmp_path / "run",
        pretrained_model_name_or_path=sd1,
        instance_data_dir=odd_pictures,
        instance_prompt="a <new1> Käfer",
        modifier_token="<new1>",
        max_train_steps=None,
    )
    said = (tmp_path / "run" / "stdout.txt").read_text()
    assert f"'a <new1> Käfer': {len(ODD)} pictures" in said and f"{len(ODD)} steps" in said
    assert all(value.isfinite().all() for value in load_trained(tmp_path / "run").values())


def test_display_p3(tmp_path):
    """Colours of a profile, which every iPhone's picture has, become sRGB; a broken profile is ignored."""
    image = Image.new("RGB", (40, 20), (230, 60, 50))
    image.save(tmp_path / "p3.png", icc_profile=display_p3())
    check_colours(tmp_path / "p3.png", [(250, 31, 34)] * 4, tolerance=1)
    image.save(tmp_path / "p3.jpg", icc_profile=display_p3(), quality=100, subsampling=0)
    check_colours(tmp_path / "p3.jpg", [(250, 31, 34)] * 4, tolerance=3)
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png", icc_profile=display_p3())
    check_colours(tmp_path / "palette.png", [(250, 31, 34)] * 4, tolerance=1)
    image.putalpha(128)
    image.save(tmp_path / "alpha.png", icc_profile=display_p3())
    check_colours(tmp_path / "alpha.png", [(252, 143, 144)] * 4, tolerance=2)
    for profile in (b"no profile", display_p3()[:200]):
        image.convert("RGB").save(tmp_path / "broken.png", icc_profile=profile)
        check_colours(tmp_path / "broken.png", [(230, 60, 50)] * 4)
    Image.new("L", (40, 20), 90).save(tmp_path / "other.png", icc_profile=display_p3())  # of another kind of picture
    check_colours(tmp_path / "other.png", [(90, 90, 90)] * 4)


def test_heic(tmp_path):
    """Phones' pictures are read if pillow-heif is installed."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(quarters("RGB", RGB).resize((160, 80), Image.Resampling.NEAREST)).save(tmp_path / "p.HEIC")
    found = read_folder(tmp_path, "instance_data_dir", PROMPT)
    assert found.samples == [(tmp_path / "p.HEIC", PROMPT)] and found.left_out == []
    check_colours(tmp_path / "p.HEIC", RGB, tolerance=12)


# Augmentation


def covered(pixels):
    """Top, left, height and width of the part of the canvas that is not empty."""
    rows, columns = np.nonzero((pixels != GREY).any((1, 2)))[0], np.nonzero((pixels != GREY).any((0, 2)))[0]
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def bilinear(length, new_length):
    """Matrix that resizes one axis: a triangle as wide as a source pixel or, where that is wider, a new one."""
    scale = length / new_length
    centres, pixels = (np.arange(new_length) + 0.5) * scale, np.arange(length) + 0.5
    weights = np.maximum(0, 1 - np.abs(pixels - centres[:, None]) / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


def resized(image, width, height):
    """The picture resized, float in [-1, 1]."""
    columns = np.einsum("xc,yck->yxk", bilinear(image.width, width), np.asarray(image, float))
    return np.einsum("yr,rxk->yxk", bilinear(image.height, height), columns) / 127.5 - 1


def normalized(pixels):
    """What the VAE is to get of RGBX pixels: colours in [-1, 1], GREY where nothing was pasted."""
    return np.where(pixels[..., 3:] > 0, pixels[..., :3] / np.float32(127.5) - 1, GREY)


def same(left, right):
    """Whether pixels are equal but for rounding: two of 255 levels, for Pillow rounds twice."""
    return left.shape == right.shape and np.abs(left - right).max() < 2.5 / 127.5


def is_window(pixels, whole):
    """Whether `pixels` are cut out of `whole` somewhere."""
    size = len(pixels)
    corners = whole[: len(whole) - size + 1, : whole.shape[1] - size + 1]
    places = np.argwhere(np.abs(corners - pixels[0, 0]).max(2) < 2.5 / 127.5)
    return any(same(whole[y : y + size, x : x + size], pixels) for y, x in places)


@pytest.mark.parametrize("size", [64, 96, 512])
def test_square_picture_follows_the_recipe(size):
    """The guide's recipe for every kind of scale, placement read back from the pixels."""
    image, rng = make_picture(1, 90, 90), np.random.default_rng(0)
    places = set()
    scales = [*np.linspace(size // 3, size, 25), *np.linspace(int(1.2 * size), int(1.4 * size) - 1, 8)]
    for scale in map(int, scales):
        pixels, _, mask = place_instance(image, scale, size, FACTOR, rng)
        pixels = normalized(pixels)
        assert pixels.shape == (size, size, 3)
        assert (
            mask.dtype == np.float32
            and mask.shape == (size // FACTOR, size // FACTOR)
            and set(np.unique(mask)) <= {0, 1}
        )
        whole = resized(image, scale, scale)
        if scale > size:
            assert mask.all()
            assert is_window(pixels, whole)
            continue
        top, left, height, width = covered(pixels)
        places.add((top, left))
        assert (height, width) == (scale, scale)
        assert same(pixels[top : top + scale, left : left + scale], whole)
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


@pytest.mark.parametrize("size", [64, 96, 512])
@pytest.mark.parametrize("width, height", [(90, 45), (45, 90), (100, 20)])
def test_other_shapes_keep_their_aspect_ratio(width, height, size):
    """Longer side at the scale; only the covered area counts. Above the size: shorter side at the scale."""
    image, rng = make_picture(2, width, height), np.random.default_rng(0)
    for scale in (size // 3, int(0.62 * size), size):
        for _ in range(20 if size < 512 else 3):
            pixels, _, mask = place_instance(image, scale, size, FACTOR, rng)
            pixels = normalized(pixels)
            top, left, rows, columns = covered(pixels)
            assert max(rows, columns) == scale and abs(columns / rows - width / height) < width / height * 0.08
            assert same(pixels[top : top + rows, left : left + columns], resized(image, columns, rows))
            inside = np.zeros_like(mask)
            last_row, last_column = (max(0, edge // FACTOR - 1) for edge in (top + rows, left + columns))
            inside[top // FACTOR + 1 : last_row, left // FACTOR + 1 : last_column] = 1
            if inside.any():
                assert np.array_equal(mask, inside)
            ys, xs = np.nonzero(mask)
            assert len(ys)
            assert ys.max() * FACTOR < top + rows and (ys.min() + 1) * FACTOR > top
            assert xs.max() * FACTOR < left + columns and (xs.min() + 1) * FACTOR > left
    scale = int(1.3 * size)
    pixels, _, mask = place_instance(image, scale, size, FACTOR, rng)
    pixels = normalized(pixels)
    assert mask.all() and pixels.shape == (size, size, 3) and (pixels != GREY).all()
    shorter = resized(image, *(round(side * scale / min(width, height)) for side in (width, height)))
    assert is_window(pixels, shorter)


class Size:
    """An image that has no pixels, so that many can be placed in little time."""

    def __init__(self, *size):
        self.size, (self.width, self.height) = size, size

    def resize(self, size, resampling):
        return Size(*size)

    def crop(self, box):
        return Size(box[2] - box[0], box[3] - box[1])

    def convert(self, mode):
        return self

    def __array__(self, dtype=None, copy=None):
        return np.zeros((1, 1, 4), dtype)


def expected_cells(length, size):
    """Masked cells along one side of a picture of that length, placed anywhere: mean, mean square, mean centre."""
    starts = np.arange(size - length + 1)
    first, last = starts // FACTOR + 1, (starts + length) // FACTOR - 1
    cells = np.maximum(1, last - first)  # at least one, so never empty
    centres = np.where(first < last, (first + last - 1) / 2, (starts + length // 2) // FACTOR)
    return cells.mean(), (cells**2).mean(), centres.mean()


@pytest.mark.parametrize("size, width, height", [(64, 1, 1), (96, 1, 1), (512, 1, 1), (64, 2, 1), (96, 2, 3)])
def test_coverage_of_ten_thousand_masks(size, width, height):
    """No mask is empty; how much they cover on average follows from the distribution of scales and places."""
    rng, covered, centres, moments = np.random.default_rng(1), [], [], []
    for _ in range(10_000):
        _, _, mask = place_instance(Size(60 * width, 60 * height), draw_scale(size, rng), size, FACTOR, rng)
        covered.append(mask.sum())
        centres.append(np.mean(np.nonzero(mask), 1))
    assert min(covered) > 0
    for scale in range(size // 3, size + 1):
        sides = (max(1, round(side * scale / max(width, height))) for side in (width, height))
        (mean_x, square_x, centre_x), (mean_y, square_y, centre_y) = (expected_cells(side, size) for side in sides)
        moments.append((mean_x * mean_y, square_x * square_y, centre_y, centre_x))
    first, second, *middle = np.mean(moments, 0)
    whole = (size // FACTOR) ** 2
    mean = 0.66 * first + 0.34 * whole
    deviation = np.sqrt(0.66 * second + 0.34 * whole**2 - mean**2)
    assert abs(np.mean(covered) - mean) < 4 * deviation / 100  # four standard errors
    assert abs(np.std(covered) - deviation) < 0.03 * deviation
    middle = 0.66 * np.array(middle) + 0.34 * (size // FACTOR - 1) / 2
    assert np.abs(np.mean(centres, 0) - middle).max() < 0.02 + 0.005 * size / FACTOR


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([64, 96]), st.integers(0, 2**32))
def test_sizes(width, height, size, seed):
    """Whatever the size and shape of a picture, the canvas is full of numbers and the mask is not empty."""
    rng = np.random.default_rng(seed)
    scale = draw_scale(size, rng)
    pixels, _, mask = place_instance(Image.new("RGB", (width, height)), scale, size, FACTOR, rng)
    pixels = normalized(pixels)
    assert pixels.shape == (size, size, 3) and set(np.unique(pixels)) <= {-1, 0} and mask.any()
    assert (pixels[mask.repeat(FACTOR, 0).repeat(FACTOR, 1) > 0] == -1).any(), "the mask is on the picture"


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
    prompts = {}

    def tokenizer(prompt, **options):
        return SimpleNamespace(input_ids=[prompts.setdefault(prompt, len(prompts))])

    draws = CustomDiffusionDataset(
        read_concepts(args),
        [tokenizer],
        [tokenizer],
        size=SIZE,
        latent_shape=(4, SIZE // FACTOR, SIZE // FACTOR),
        num_train_timesteps=1000,
        seed=args.seed,
        center_crop=args.center_crop,
        hflip=args.hflip,
        alpha_mask=args.alpha_mask,
        aug=not args.noaug,
    )
    return draws, lambda sample: list(prompts)[sample["input_ids"][0]]


def batch_of(draw):
    """The training's batch of one draw: tensors by their names."""
    return collate_fn([draw])


def test_masks_prompts_and_scales_over_many_draws(folders):
    """3000 draws at 64 pixels: no empty mask, the prefix that belongs to the scale, both prefixes equally often."""
    draws, prompt_of = make_draws(folders)
    prefixes = collections.Counter()
    for n in range(3000):
        (sample,) = draws[n]
        mask, pixels = sample["mask"], normalized(sample["pixels"].transpose(1, 2, 0))
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
    orders = [tuple(draws[3 * epoch + i][0]["pixels"].tobytes() for i in range(3)) for epoch in range(8)]
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
            shapes.add(covered(normalized(sample["pixels"].transpose(1, 2, 0)))[2:])
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
        crop = normalized(sample["pixels"].transpose(1, 2, 0))
        (left,) = (x for x in range(65) if same(whole[:, x : x + 64], crop))
        found.add(left)
        assert prompt_of(sample) == "cat" and "mask" not in sample
    assert len(found) > 55 and min(found) < 3 and max(found) > 61
    draws, _ = make_draws(folders, **values, center_crop=True)
    middle = resized(image.crop((30, 0, 90, 60)), 64, 64)
    assert all(np.abs(normalized(draws[n][1]["pixels"].transpose(1, 2, 0)) - middle).max() < 0.02 for n in range(5))


def test_large_pictures(folders, tmp_path, monkeypatch):
    """Decoded once, as far as the memory for it goes, and made smaller before: the picture is nearly the same."""
    (tmp_path / "large").mkdir()
    image = make_picture(5, 1008, 800)
    for i in range(66):
        image.save(tmp_path / "large" / f"{i:02d}.bmp")
    draws, _ = make_draws(folders, instance_data_dir=tmp_path / "large", noaug=True, center_crop=True)
    opened, read = collections.Counter(), train_custom_diffusion.load_picture

    def counted(file, *args, **options):
        opened[file] += 1
        return read(file, *args, **options)

    monkeypatch.setattr(train_custom_diffusion, "load_picture", counted)
    reduced = 126 * 100 * 3  # bytes: an eighth of 1008 x 800, as 1.4 * 64 is the largest scale of the shorter side
    monkeypatch.setattr(train_custom_diffusion, "DECODED_BYTES", 65 * reduced - 1)
    for n in range(3 * 66):
        (sample,) = draws[n]
    assert sorted(opened.values()) == [1] * 64 + [3] * 2
    expected = resized(image.crop((104, 0, 904, 800)), SIZE, SIZE)
    difference = np.abs(normalized(sample["pixels"].transpose(1, 2, 0)) - expected) * 127.5
    assert difference.max() < 6 and difference.mean() < 1.5, "of 255 levels"


def test_flip_mirrors_half_of_them(folders):
    draws, _ = make_draws(folders, noaug=True, hflip=True)
    still, _ = make_draws(folders, noaug=True)
    mirrored = []
    for n in range(300):
        left, right = (normalized(one[n][0]["pixels"].transpose(1, 2, 0)) for one in (draws, still))
        same = {np.array_equal(left, right): False, np.allclose(left[:, ::-1], right, atol=0.02): True}
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
        first, again = batch_of(draws[n]), batch_of(later[n])
        for key in ("pixels", "mask", "posterior_noise", "noise", "timesteps"):
            assert np.array_equal(first[key], again[key])
        assert not np.array_equal(first["noise"], batch_of(other[n])["noise"])
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
        for kind, pictures in ((0, 3), (1, count)):
            seen = [draws[n][kind]["pixels"].tobytes() for n in range(max(3, count))]
            assert len(set(seen)) == pictures
            assert max(map(seen.count, seen)) <= -(-max(3, count) // pictures)


@pytest.mark.parametrize("width", [101, 102])
def test_crop_leaves_a_sharp_alpha_sharp(width, tmp_path):
    """A picture whose right half is transparent, cut to a square: no pixel becomes empty canvas or half transparent."""
    image = Image.new("RGBA", (width, 64), (200, 50, 50, 255))
    image.paste((50, 200, 50, 0), (width // 2, 0, width, 64))
    (tmp_path / "mine").mkdir()
    image.save(tmp_path / "mine" / "0.png")
    (tmp_path / "class").mkdir()
    values = {"noaug": True, "center_crop": True, "alpha_mask": True}
    draws, _ = make_draws(tmp_path, **values)
    left = (width - 64) // 2
    (sample,) = draws[0]
    found = sample["pixels"].transpose(1, 2, 0)
    assert set(np.unique(found[..., 3])) == {1, 255}
    shown = np.asarray(image)[:, left : left + 64]
    shifted = np.asarray(image)[:, left + width % 2 : left + width % 2 + 64]
    assert any(np.array_equal(found[..., :3], expected[..., :3]) for expected in (shown, shifted))


# Captions


def test_caption_beside_a_picture(folders, tmp_path):
    """A .txt of the same name replaces the instance prompt of its picture; the prefixes apply to it."""
    shutil.copytree(folders / "mine", tmp_path / "mine")
    (tmp_path / "mine" / "1.txt").write_text("\ufeffa <new1> cat\r\n on a table\n", encoding="utf-8")
    (tmp_path / "mine" / "notes.txt").write_text("of no picture")
    draws, prompt_of = make_draws(folders, instance_data_dir=tmp_path / "mine")
    prompts = collections.Counter(prompt_of(draws[n][0]) for n in range(600))
    expected = {"": 0.24, "a far away ": 0.21, "very small ": 0.21, "zoomed in ": 0.17, "close up ": 0.17}
    assert set(prompts) == {prefix + text for prefix in expected for text in (PROMPT, "a <new1> cat on a table")}
    assert sum(count for prompt, count in prompts.items() if prompt.endswith("table")) == 200, "one of three pictures"


def test_summary_counts_captions(folders, sd1, tmp_path):
    shutil.copytree(folders / "mine", tmp_path / "mine")
    for i in range(2):
        (tmp_path / "mine" / f"{i}.txt").write_text("a <new1> cat on a table")
    values = {"pretrained_model_name_or_path": sd1, "instance_data_dir": tmp_path / "mine", "modifier_token": "<new1>"}
    fork(tmp_path / "run", max_train_steps=1, instance_prompt=PROMPT, **values)
    assert f"{PROMPT!r}: 3 pictures (2 with captions), 0 class pictures" in (tmp_path / "run.log").read_text()
    assert settings_of(tmp_path / "run")["captions"] == ["a <new1> cat on a table"]


# Masks


@pytest.fixture(scope="module")
def cut_out(tmp_path_factory):
    """Folders of the same wide picture: cut out (with soft edges), opaque, and its alpha as a picture."""
    folder, image = tmp_path_factory.mktemp("masks"), make_picture(7, 150, 90)
    alpha = Image.fromarray(np.kron(np.random.default_rng(0).integers(0, 2, (5, 5), np.uint8) * 255, np.ones((9, 15))))
    alpha = alpha.convert("L").resize(image.size, Image.Resampling.BICUBIC)
    cut = image.copy()
    cut.putalpha(alpha)
    for name, picture in {"cut": cut, "opaque": image, "alpha": alpha}.items():
        (folder / name).mkdir()
        picture.save(folder / name / "0.png")
    return folder


def pixels_of(sample):
    """Colours (size, size, 3) of a sample, and whether a picture is there (size, size)."""
    pixels = sample["pixels"].transpose(1, 2, 0)
    return pixels[..., :3].astype(float), pixels[..., 3] > 0


@pytest.mark.parametrize("center_crop", [False, True])
def test_alpha_masks_the_loss(center_crop, folders, cut_out):
    """The picture is shown as it is; its mask is that of the opaque one times the alpha, averaged over each cell."""
    values, sizes = {"hflip": True, "center_crop": str(center_crop)}, set()
    masked, opaque, alpha = (
        make_draws(folders, instance_data_dir=cut_out / name, alpha_mask=name == "cut", **values)[0]
        for name in ("cut", "opaque", "alpha")
    )
    for n in range(200):
        (sample,), (whole,), (weight,) = masked[n], opaque[n], alpha[n]
        (colours, shown), (expected, filled), (weights, _) = map(pixels_of, (sample, whole, weight))
        assert np.array_equal(shown, filled) and np.abs(colours - expected)[shown].max() <= 1
        cells = weights[..., 0].reshape(8, FACTOR, 8, FACTOR).mean((1, 3)) / 255
        product = whole["mask"][0] * cells
        product = product if product.max() > 0.01 else whole["mask"][0]  # too small a picture to tell
        assert sample["mask"].dtype == np.float32 and np.abs(sample["mask"][0] - product).max() < 0.012
        sizes.add(int(filled.sum()))
    assert len(sizes) > 20


def test_masks_that_hide_everything_or_nothing(folders, cut_out, tmp_path):
    """Nothing left, or no alpha: the picture's cells count. Class pictures are on white, and have no mask."""
    (tmp_path / "clear").mkdir()
    clear = Image.new("RGBA", (60, 60), (200, 10, 30, 0))
    clear.save(tmp_path / "clear" / "0.png")
    prior = {"with_prior_preservation": True, "real_prior": True, "class_data_dir": tmp_path / "clear"}
    for instances, more in {tmp_path / "clear": {}, cut_out / "opaque": prior}.items():
        values = {"instance_data_dir": instances, **more}
        masked, plain = (make_draws(folders, alpha_mask=str(on), **values)[0] for on in (True, False))
        for n in range(50):
            assert np.array_equal(masked[n][0]["mask"], plain[n][0]["mask"])
        colours, shown = pixels_of(masked[0][-1])
        assert (colours[shown] == (255 if more else (200, 10, 30))).all() and shown.any()
        colours, shown = pixels_of(plain[0][-1])
        assert (colours[shown] == 255).all(), "without the flag transparent parts are white"


def test_trains_with_masks(sd1, cut_out, tmp_path):
    """The flag changes what is learned of a cut-out picture, and nothing of one without alpha."""
    values = {"pretrained_model_name_or_path": sd1, "instance_prompt": PROMPT, "modifier_token": "<new1>"}
    values |= {"learning_rate": 1e-2, "noaug": True}
    cut, on_white, opaque, plain = (
        load_trained(fork(tmp_path / f"{name}{on}", instance_data_dir=cut_out / name, alpha_mask=str(on), **values))
        for name in ("cut", "opaque")
        for on in (True, False)
    )
    assert same_bits(opaque, plain) and not same_bits(cut, opaque) and not same_bits(cut, on_white)
