"""What the processes that launching.py forks have in common: every import that a training makes, done once."""

import gc

import diffusers
from PIL import Image

import train_custom_diffusion  # noqa: F401

assert diffusers.StableDiffusionPipeline and diffusers.StableDiffusionXLPipeline  # imported when they are looked up
Image.init()
gc.freeze()  # a collection in a forked process looks at what that has made, not at all modules
