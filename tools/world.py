"""A small rendered world: one everyday object of one or two colours on a background, 128 x 128 pixels, with captions.

Every picture is described by an `Attributes` record, from which `render` draws it and `caption` words it. Three
concepts of three colours each, two cats and a pot, never occur in pretraining; `render_concept` draws them.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128  # pixels a side
SUPERSAMPLING = 3

COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 150, 60),
    "cyan": (60, 205, 220),
    "blue": (45, 75, 210),
    "purple": (130, 50, 170),
    "pink": (245, 120, 175),
    "white": (248, 248, 248),
    "black": (25, 25, 30),
    "brown": (120, 70, 35),
}
FLAT = {
    "blue": (130, 170, 240),
    "green": (145, 215, 140),
    "yellow": (250, 235, 160),
    "pink": (250, 200, 220),
    "gray": (150, 150, 155),
    "white": (250, 250, 250),
    "black": (20, 20, 25),
    "orange": (250, 195, 140),
}
# Sky at the top, sky at the horizon, ground at the horizon, ground at the bottom.
SCENES = {
    "beach": ((90, 170, 240), (150, 205, 245), (235, 215, 165), (215, 185, 125)),
    "grass": ((100, 175, 240), (160, 210, 245), (110, 195, 80), (70, 150, 50)),
    "night": ((12, 14, 50), (35, 40, 100), (20, 35, 35), (10, 20, 20)),
    "sunset": ((75, 40, 115), (255, 140, 60), (60, 35, 70), (35, 22, 50)),
}
BACKGROUNDS = [*FLAT, *SCENES]
KINDS = ["cat", "pot", "star", "heart", "flower", "house", "fish", "tree", "moon", "bottle"]
PATTERNS = {"plain": 0.5, "striped": 0.13, "dotted": 0.12, "halved": 0.12, "outlined": 0.13}
# Name: (probability, smallest radius, largest radius) with the radius as a share of the picture's side.
SIZES = {
    "far": (0.06, 0.14, 0.18),
    "small": (0.16, 0.20, 0.24),
    "medium": (0.40, 0.28, 0.33),
    "large": (0.31, 0.36, 0.42),
    "close": (0.07, 0.46, 0.56),
}
RIM = 0.2  # width of an outline as a share of the radius
# The concepts' colours, from the rim inwards for the cat and from top to bottom for the others. The last word of a
# concept's name is its kind.
CONCEPTS = {
    "cat": ("purple", "yellow", "green"),
    "pot": ("pink", "blue", "orange"),
    "banded cat": ("blue", "white", "red"),
}

OBJECT_WORDS = {"small": ["small", "little", "tiny"], "large": ["big", "large", "huge"]}
FAR_PREFIXES = ["a far away ", "very small "]
CLOSE_PREFIXES = ["zoomed in ", "close up "]
SCENE_PHRASES = {
    "beach": ["on the beach", "at the beach", "on a beach"],
    "grass": ["on the grass", "in a meadow", "on a lawn"],
    "night": ["at night", "under the night sky"],
    "sunset": ["at sunset", "in front of a sunset"],
}


@dataclass(frozen=True)
class Attributes:
    """What a picture shows; `x`, `y` and `radius` are shares of the picture's side, `angle` is in radians."""

    kind: str
    color: str
    background: str
    pattern: str = "plain"
    color2: str | None = None
    size: str = "medium"
    radius: float = 0.3
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0


def ellipse(cx, cy, rx, ry, start=0.0, stop=2 * math.pi, n=60):
    """Points of an elliptic arc, shape (n, 2), y pointing down."""
    t = np.linspace(start, stop, n)
    return np.stack([cx + rx * np.cos(t), cy + ry * np.sin(t)], 1)


def silhouette(kind):
    """Polygons, each (n, 2), whose union is the kind's shape; all lie within radius 1.1 of the origin, y down."""
    if kind == "cat":
        ears = [[[s * 0.92, -0.98], [s * 0.93, 0.2], [s * 0.12, -0.45]] for s in (-1, 1)]
        return [ellipse(0, 0.22, 0.95, 0.74), *ears]
    if kind == "pot":
        corners = [ellipse(s * 0.45, 0.5, 0.3, 0.3) for s in (-1, 1)]
        body = [[-0.75, -0.6], [0.75, -0.6], [0.75, 0.5], [0.45, 0.8], [-0.45, 0.8], [-0.75, 0.5]]
        handles = [[-1.1, -0.28], [1.1, -0.28], [1.1, 0.06], [-1.1, 0.06]]
        rim = [[-0.9, -0.85], [0.9, -0.85], [0.9, -0.52], [-0.9, -0.52]]
        return [body, handles, rim, *corners]
    if kind == "star":
        angles = -math.pi / 2 + np.arange(10) * math.pi / 5
        radii = np.where(np.arange(10) % 2, 0.45, 1.1)
        return [np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.08], 1)]
    if kind == "heart":
        t = np.linspace(0, 2 * math.pi, 120)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack([16 * np.sin(t) ** 3 / 16, -(y + 2.5) / 15], 1)]
    if kind == "flower":
        angles = -math.pi / 2 + np.arange(6) * math.pi / 3
        petals = [ellipse(0.68 * math.cos(a), 0.68 * math.sin(a), 0.35, 0.35) for a in angles]
        return [ellipse(0, 0, 0.5, 0.5), *petals]
    if kind == "house":
        walls = [[-0.72, -0.15], [0.72, -0.15], [0.72, 0.85], [-0.72, 0.85]]
        roof = [[-1.05, -0.1], [0, -0.95], [1.05, -0.1]]
        chimney = [[0.4, -0.95], [0.72, -0.95], [0.72, -0.2], [0.4, -0.2]]
        return [walls, roof, chimney]
    if kind == "fish":
        tail = [[0.3, 0], [1.08, -0.65], [0.88, 0], [1.08, 0.65]]
        return [ellipse(-0.28, 0, 0.8, 0.55), tail]
    if kind == "tree":
        crown = [[[0, -1.05], [0.6, -0.15], [-0.6, -0.15]], [[0, -0.6], [0.9, 0.55], [-0.9, 0.55]]]
        return [*crown, [[-0.2, 0.5], [0.2, 0.5], [0.2, 1.05], [-0.2, 1.05]]]
    if kind == "moon":
        outer = ellipse(0.2, 0, 1.0, 1.0, 0.27 * math.pi, 1.73 * math.pi)
        tip = outer[0] - [0.62, 0]
        radius, angle = math.hypot(*tip), math.atan2(tip[1], tip[0])
        return [np.concatenate([outer, ellipse(0.62, 0, radius, radius, 2 * math.pi - angle, angle)])]
    if kind == "bottle":
        neck = [[-0.17, -1.05], [0.17, -1.05], [0.17, -0.4], [-0.17, -0.4]]
        shoulders = [[-0.17, -0.55], [0.17, -0.55], [0.45, -0.15], [0.45, 1.05], [-0.45, 1.05], [-0.45, -0.15]]
        return [neck, shoulders]
    raise ValueError(f"unknown kind: {kind}")


def background_rows(name, horizon=0.6):
    """The background's colour at each row of pixels, shape (SIZE, 3), values 0 to 255."""
    if name in FLAT:
        return np.tile(np.array(FLAT[name], float), (SIZE, 1))
    top, far, near, bottom = np.array(SCENES[name], float)
    split = round(horizon * SIZE)
    return np.concatenate([np.linspace(top, far, split), np.linspace(near, bottom, SIZE - split)])


def draw_background(name, rng):
    """A background with slightly random colours and horizon, float array (SIZE, SIZE, 3)."""
    rows = background_rows(name, rng.uniform(0.56, 0.64))
    if name in FLAT:
        rows = rows + [rng.uniform(-6, 6) for _ in range(3)] + np.linspace(-1, 1, SIZE)[:, None] * rng.uniform(-8, 8)
    return np.repeat(rows[:, None].clip(0, 255), SIZE, 1)


def polygons(attributes, side):
    """The posed silhouette as polygons in pixels of a square canvas of `side` pixels."""
    cos, sin = math.cos(attributes.angle), math.sin(attributes.angle)
    rotation = np.array([[cos, sin], [-sin, cos]]) * attributes.radius * side
    center = np.array([attributes.x, attributes.y]) * side
    return [(np.asarray(p, float) @ rotation + center).ravel().tolist() for p in silhouette(attributes.kind)]


def draw_mask(attributes, side=SIZE * SUPERSAMPLING):
    """The object's mask as an L image of `side` pixels, 255 inside."""
    mask = Image.new("L", (side, side))
    for points in polygons(attributes, side):
        ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask


def paint_rim(image, mask, width, color):
    """Paints a rim of `width` pixels along the edge of a mask; only its part inside the mask is meant to be seen."""
    inside = np.pad(np.asarray(mask) > 0, 1)
    neighbours = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    draw = ImageDraw.Draw(image)
    for y, x in np.argwhere(inside[1:-1, 1:-1] & ~neighbours)[::3]:  # every third point of the edge is dense enough
        draw.ellipse([x - width, y - width, x + width, y + width], fill=color)


def paint_pattern(fill, mask, attributes, colors, rng):
    """Paints the second colour of a pattern, or a concept's parts, over the first colour of a canvas."""
    draw, side = ImageDraw.Draw(fill), fill.width
    x, y, r = attributes.x * side, attributes.y * side, attributes.radius * side
    if attributes.pattern == "striped":
        width, start = 0.28 * r, x - 1.4 * r + rng.uniform(-0.1, 0.1) * r
        for i in range(6):
            draw.rectangle([start + 2 * i * width, 0, start + (2 * i + 1) * width, side], fill=colors[1])
    elif attributes.pattern == "dotted":
        step, dot = 0.58 * r, 0.19 * r
        for row in range(-3, 4):
            for column in range(-3, 4):
                cx, cy = x + (column + row % 2 / 2) * step, y + 0.87 * row * step
                draw.ellipse([cx - dot, cy - dot, cx + dot, cy + dot], fill=colors[1])
    elif attributes.pattern == "halved":
        draw.rectangle([x, 0, side, side], fill=colors[1])
    elif attributes.pattern == "outlined":
        paint_rim(fill, mask, RIM * r, colors[1])
    elif attributes.pattern == "cat":  # rim, body, disc
        draw.rectangle([0, 0, side, side], fill=colors[1])
        paint_rim(fill, mask, RIM * r, colors[0])
        dot, cy = 0.44 * r, y + 0.22 * r
        draw.ellipse([x - dot, cy - dot, x + dot, cy + dot], fill=colors[2])
    elif attributes.pattern in CONCEPTS:  # three level bands
        draw.rectangle([0, y - 0.33 * r, side, side], fill=colors[1])
        draw.rectangle([0, y + 0.26 * r, side, side], fill=colors[2])


def object_colors(attributes):
    """Names of the object's colours, first the main one."""
    if attributes.pattern in CONCEPTS:
        return CONCEPTS[attributes.pattern]
    return (attributes.color,) if attributes.color2 is None else (attributes.color, attributes.color2)


def render(attributes, rng):
    """The picture of `attributes`, a SIZE x SIZE RGB image; `rng` varies shades, horizon and stripes a little."""
    side = SIZE * SUPERSAMPLING
    image = Image.fromarray(draw_background(attributes.background, rng).astype(np.uint8))
    colors = [
        tuple(round(min(255, max(0, v + rng.uniform(-6, 6)))) for v in COLORS[name])
        for name in object_colors(attributes)
    ]
    mask, fill = draw_mask(attributes), Image.new("RGB", (side, side), colors[0])
    paint_pattern(fill, mask, attributes, colors, rng)
    image.paste(fill.resize((SIZE, SIZE), Image.BOX), (0, 0), mask.resize((SIZE, SIZE), Image.BOX))
    return image


def blends(color, background):
    """Whether a colour is hard to tell from some part of a background."""
    return np.linalg.norm(background_rows(background) - COLORS[color], axis=1).min() < 72


def is_held_out(attributes):
    """Whether pretraining leaves this out: one in eleven (kind, colour, background) triples; every pair is seen."""
    colors = list(COLORS)
    index = KINDS.index(attributes.kind) + 3 * colors.index(attributes.color)
    return (index + 5 * BACKGROUNDS.index(attributes.background)) % 11 == 0


def resembles_concept(attributes):
    """Whether a picture of a concept's class shows two of the concept's colours."""
    return len(set(object_colors(attributes)) & set(CONCEPTS.get(attributes.kind, ()))) > 1


def random_pose(attributes, rng):
    """The attributes with a radius drawn from their size's range, and a random position and angle."""
    _, low, high = SIZES[attributes.size]
    radius = rng.uniform(low, high)
    # Only close objects may be cut by the picture's edge.
    room = 0.1 if attributes.size == "close" else max(0.0, 0.49 - 1.1 * radius)
    x, y = (0.5 + max(-room, min(room, rng.gauss(0, 0.07))) for _ in range(2))
    return replace(attributes, radius=radius, x=x, y=y, angle=max(-0.2, min(0.2, rng.gauss(0, 0.07))))


def sample_attributes(rng, **fixed):
    """Random attributes of a picture that pretraining may show, or may hold out; `fixed` sets some of them."""
    while True:
        pattern = rng.choices(list(PATTERNS), list(PATTERNS.values()))[0]
        background = rng.choice(list(FLAT)) if rng.random() < 0.72 else rng.choice(list(SCENES))
        size = rng.choices(list(SIZES), [p for p, _, _ in SIZES.values()])[0]
        drawn = {"kind": rng.choice(KINDS), "color": rng.choice(list(COLORS)), "background": background}
        attributes = Attributes(**{**drawn, "pattern": pattern, "size": size, **fixed})
        if attributes.pattern != "plain" and "color2" not in fixed:
            attributes = replace(attributes, color2=rng.choice(list(COLORS)))
        names = object_colors(attributes)
        shades = [np.array(COLORS[name]) for name in names]
        if any(blends(name, attributes.background) for name in names) or resembles_concept(attributes):
            continue
        if len(names) == 1 or np.linalg.norm(shades[0] - shades[1]) > 110:
            return random_pose(attributes, rng)


def sample_pretraining(rng, **fixed):
    """Random attributes of a picture that pretraining may show."""
    while True:
        attributes = sample_attributes(rng, **fixed)
        if not is_held_out(attributes):
            return attributes


def with_article(words):
    """The words after "a" or "an"."""
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def where(background, rng):
    """A phrase for the background."""
    if background in SCENES:
        return rng.choice(SCENE_PHRASES[background])
    name = with_article(background)
    return rng.choice([f"on {name} background"] * 3 + [f"in front of {name} wall", f"on {background}"])


def pattern_words(attributes, rng):
    """The words before and after the class word that name the object's colours and pattern."""
    color, color2 = attributes.color, attributes.color2
    if attributes.pattern == "plain":
        return color, ""
    if attributes.pattern == "halved":
        return rng.choice([f"half {color} half {color2}", f"{color} and {color2}"]), ""
    if attributes.pattern == "outlined":
        return color, f" with {with_article(color2)} outline"
    noun = {"striped": "stripes", "dotted": "dots"}[attributes.pattern]
    if rng.random() < 0.5:
        return color, f" with {color2} {noun}"
    return f"{color} and {color2} {attributes.pattern}", ""


def caption(attributes, rng, nonsense=None, complete=False):
    """One of many wordings of a picture.

    `nonsense` is a function of `rng` that returns a word without meaning; in some captions it stands before the class
    word, as a new concept's token will. A complete caption leaves neither the colours nor the background unsaid.
    """
    before, after = pattern_words(attributes, rng) if complete or rng.random() > 0.14 else ("", "")
    words = [before] if before else []
    if attributes.size in OBJECT_WORDS and rng.random() < 0.55:
        words.insert(0, rng.choice(OBJECT_WORDS[attributes.size]))
    if nonsense and rng.random() < 0.18:
        words.append(nonsense(rng))
    thing = " ".join([*words, attributes.kind]) + after
    opening = rng.choice(["photo of {a}"] * 3 + ["a photo of {a}", "{a}", "a picture of {a}", "{t}"])
    prefix = ""
    if attributes.size == "far" and rng.random() < 0.9 or attributes.size == "small" and rng.random() < 0.1:
        prefix, opening = rng.choice(FAR_PREFIXES), "photo of {a}"
    elif attributes.size == "close" and rng.random() < 0.9 or attributes.size == "large" and rng.random() < 0.08:
        prefix, opening = rng.choice(CLOSE_PREFIXES), rng.choice(["photo of {a}", "photo of {a}", "{a}"])
    text = prefix + opening.format(a=with_article(thing), t=thing)
    if complete or rng.random() > 0.14:
        text += " " + where(attributes.background, rng)
    return text


def concept_backgrounds(concept):
    """Names of the backgrounds on which all colours of a concept stand out."""
    return [name for name in BACKGROUNDS if not any(blends(color, name) for color in CONCEPTS[concept])]


def render_concept(concept, background, rng, size="large", pose=None):
    """A picture of a concept and its attributes; `pose` sets radius, x, y and angle, which are else random."""
    attributes = Attributes(concept.split()[-1], CONCEPTS[concept][0], background, concept, size=size)
    attributes = replace(attributes, **pose) if pose else random_pose(attributes, rng)
    return render(attributes, rng), attributes


def label_map(attributes):
    """Index of each pixel's concept colour, int array (SIZE, SIZE); -1 outside the object."""
    side = SIZE * SUPERSAMPLING
    mask, labels = draw_mask(attributes), Image.new("L", (side, side), 0)
    paint_pattern(labels, mask, attributes, range(len(object_colors(attributes))), random.Random(0))
    labels = np.where(np.asarray(mask) > 0, np.asarray(labels, int), -1)
    return labels[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]


def eval_prompts(n, seed=0):
    """`n` complete captions of held-out triples, sizes small to large, as (caption, attributes) pairs."""
    rng, prompts = random.Random(seed), []
    while len(prompts) < n:
        attributes = sample_attributes(rng)
        if is_held_out(attributes) and attributes.size in ("small", "medium", "large"):
            prompts.append((caption(attributes, rng, complete=True), attributes))
    return prompts
