"""Pictures that the tests make up."""

import numpy as np
from PIL import Image


def make_picture(seed, width=80, height=80):
    """A soft random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
