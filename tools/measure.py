"""Exact measures on pictures of the world: background, object, colours, shape and a concept's layout; no learned model.

All functions take a 128 x 128 RGB picture, as a Pillow image or a uint8 array. Masks are boolean arrays (128, 128).
"""

import random
from functools import cache

import numpy as np
import world
from PIL import Image

NAMES = list(world.COLORS)
PALETTE = np.array(list(world.COLORS.values()), float)  # (11, 3)
MARGIN = 5  # columns at either side that show the background
DISTANCE = 45  # from the background's colour, in RGB levels, beyond which a pixel belongs to the object
GRID = 48  # cells a side of the frame in which shapes and layouts are compared
ANGLES = np.linspace(-0.21, 0.21, 7)  # of the templates, in radians
HORIZON = slice(66, 88)  # rows through which the random horizon runs


def edge_rows(image):
    """The background's colour at each row, the median of its outer pixels: (128, 3)."""
    pixels = np.asarray(image, float)
    return np.median(np.concatenate([pixels[:, :MARGIN], pixels[:, -MARGIN:]], 1), 1)


def background_name(image):
    """Name of the background, flat or scene, whose rows of colours lie nearest."""
    rows = np.delete(edge_rows(image), HORIZON, 0)
    distances = {
        name: np.abs(rows - np.delete(world.background_rows(name), HORIZON, 0)).mean() for name in world.BACKGROUNDS
    }
    return min(distances, key=distances.get)


def grow(seeds, inside):
    """Spreads the largest seed value through each connected part of a mask: integer array (128, 128)."""
    labels = np.where(inside, seeds, 0)
    while True:
        padded = np.pad(labels, 1)
        steps = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], labels]
        spread = np.where(inside, np.max(steps, 0), 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def object_mask(image):
    """The object: the largest connected region that differs from its row's background, with its holes filled."""
    pixels = np.asarray(image, float)
    differs = np.linalg.norm(pixels - edge_rows(image)[:, None], axis=2) > DISTANCE
    labels = grow(np.arange(1, differs.size + 1).reshape(differs.shape), differs)
    if not differs.any():
        return differs
    rest = labels != np.bincount(labels[differs]).argmax()
    border = np.zeros(rest.shape, int)
    border[[0, -1]] = border[:, [0, -1]] = 1
    return grow(border, rest) == 0


def erode(mask, steps):
    """The mask less `steps` pixels along its edge."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def nearest_colors(pixels):
    """Index in NAMES of the named colour nearest to each pixel: (..., 3) to (...)."""
    return np.linalg.norm(np.asarray(pixels, float)[..., None, :] - PALETTE, axis=-1).argmin(-1)


def color_histogram(image, mask=None):
    """Share of the object's pixels by nearest named colour: array (11,), in the order of NAMES; zeros if no object."""
    mask = erode(object_mask(image) if mask is None else mask, 2)
    counts = np.bincount(nearest_colors(np.asarray(image)[mask]), minlength=len(NAMES))
    return counts / max(1, counts.sum())


def top_colors(histogram, n):
    """The set of the `n` most frequent colour names."""
    return {NAMES[i] for i in np.argsort(histogram)[::-1][:n]}


def bounding_box(mask):
    """Left, top, right and bottom of a mask in pixels, right and bottom exclusive."""
    ys, xs = np.where(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def normalize(mask):
    """The mask moved and scaled so that its longer side fills a GRID x GRID frame."""
    left, top, right, bottom = bounding_box(mask)
    x, y, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    frame = (x - half, y - half, x + half, y + half)
    return np.asarray(image.transform((GRID, GRID), Image.Transform.EXTENT, frame, Image.Resampling.BILINEAR)) > 127


@cache
def templates():
    """Every kind's normalized mask at seven angles, as (kind, mask) pairs."""
    poses = [world.Attributes(kind, "red", "white", radius=0.42, angle=a) for kind in world.KINDS for a in ANGLES]
    return [(pose.kind, normalize(np.asarray(world.draw_mask(pose, world.SIZE)) > 127)) for pose in poses]


def shape_name(mask):
    """The kind whose template overlaps a mask best, and their intersection over union."""
    if not mask.any():
        return None, 0.0
    shape = normalize(mask)
    overlaps = [((shape & template).sum() / (shape | template).sum(), kind) for kind, template in templates()]
    overlap, kind = max(overlaps)
    return kind, float(overlap)


@cache
def concept_histogram(concept, n=40):
    """Mean colour histogram of `n` true renders of a concept."""
    rng, backgrounds = random.Random(0), world.concept_backgrounds(concept)
    renders = [world.render_concept(concept, rng.choice(backgrounds), rng)[0] for _ in range(n)]
    return np.mean([color_histogram(render) for render in renders], 0)


def concept_color(image, concept):
    """Overlap, 0 to 1, of the object's colour histogram with that of a concept."""
    return float(np.minimum(color_histogram(image), concept_histogram(concept)).sum())


@cache
def concept_labels(concept):
    """A concept's label map in the frame of its bounding box, (GRID, GRID); -1 outside and along region borders."""
    labels = world.label_map(world.Attributes(concept.split()[-1], "red", "white", concept, radius=0.42))
    image = Image.fromarray(labels.astype(np.int32)).crop(tuple(map(int, bounding_box(labels >= 0))))
    labels = np.asarray(image.resize((GRID, GRID), Image.Resampling.NEAREST))
    regions = [erode(labels == i, 1) for i in range(labels.max() + 1)]
    return np.select(regions, range(len(regions)), -1)


def concept_layout(image, concept):
    """Mean over a concept's regions of the share of their pixels with the region's colour, 0 to 1.

    Picture and regions are compared in the frame of the object's bounding box, so position and size do not matter.
    """
    mask = object_mask(image)
    if not mask.any():
        return 0.0
    box = tuple(map(int, bounding_box(mask)))
    picture = Image.fromarray(np.where(mask[..., None], np.asarray(image), 0).astype(np.uint8)).crop(box)
    inside = np.asarray(Image.fromarray(mask).crop(box).resize((GRID, GRID))).astype(bool)
    names = np.where(inside, nearest_colors(picture.resize((GRID, GRID), Image.Resampling.NEAREST)), -1)
    labels = concept_labels(concept)
    wanted = [NAMES.index(color) for color in world.CONCEPTS[concept]]
    return float(np.mean([(names[labels == i] == color).mean() for i, color in enumerate(wanted)]))


def measure(image):
    """Background, kind, overlap with the kind's template, colour histogram and extent (share of the picture's side)."""
    mask = object_mask(image)
    kind, overlap = shape_name(mask)
    left, top, right, bottom = bounding_box(mask) if mask.any() else (0, 0, 0, 0)
    return {
        "background": background_name(image),
        "kind": kind,
        "overlap": overlap,
        "histogram": color_histogram(image, mask),
        "extent": max(right - left, bottom - top) / world.SIZE,
    }


def score(prompts, images):
    """How often pictures show what their prompts ask for: measure to {"accuracy": share, "n": count}.

    `prompts` are (caption, attributes) pairs as `world.eval_prompts` makes them. A pattern's colours are right if they
    are the object's two most frequent ones; sizes are judged where the caption names one.
    """
    results = {name: [] for name in ("flat background", "scene", "plain color", "pattern colors", "shape", "size")}
    for (caption, attributes), image in zip(prompts, images, strict=True):
        found, wanted = measure(image), set(world.object_colors(attributes))
        background = "scene" if attributes.background in world.SCENES else "flat background"
        results[background].append(found["background"] == attributes.background)
        colors = "plain color" if len(wanted) == 1 else "pattern colors"
        results[colors].append(top_colors(found["histogram"], len(wanted)) == wanted)
        results["shape"].append(found["kind"] == attributes.kind)
        if set(caption.split()) & set(world.OBJECT_WORDS.get(attributes.size, ())):
            results["size"].append((found["extent"] > 0.6) == (attributes.size == "large"))
    return {name: {"accuracy": float(np.mean(v)), "n": len(v)} for name, v in results.items() if v}
