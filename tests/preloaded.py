"""What the processes that launching.py forks have in common: every import that a training makes, done once."""

import gc

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401 (diffusers imports them late)
from PIL import Image

import train_custom_diffusion  # noqa: F401

Image.init()
gc.freeze()  # a collection in a forked process looks at what that has made, not at all modules
