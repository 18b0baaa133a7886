"""The tests' own files in the original layout: diffusers makes the same models of them as of folders, to the bit."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from families import FAMILIES, make_family
from models import EMBEDDED
from original import write_original
from reading import same_bits

KINDS = ("assets/model", "SD 2.1", "zero terminal SNR", "sd1", "sdxl")


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_original(kind, ending, request, tmp_path):
    """All parts, with what files on the net have besides, in single and half precision."""
    dtype = torch.float16 if ending == "ckpt" else torch.float32
    if kind in FAMILIES:
        folder = make_family(tmp_path / "model", FAMILIES[kind])
    else:
        folder = EMBEDDED if kind == "assets/model" else request.getfixturevalue(kind)
    file = write_original(folder, tmp_path / f"model.{ending}", dtype, beside=True, empty=["v_pred"])
    is_xl = kind == "sdxl"
    pipeline_class = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    options = {} if is_xl else {"safety_checker": None, "feature_extractor": None}
    found = pipeline_class.from_single_file(str(file), config=str(folder), **options)
    expected = pipeline_class.from_pretrained(folder, **options)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if is_xl else [])):
        states = [getattr(pipeline, part).to(dtype).state_dict() for pipeline in (found, expected)]
        assert same_bits(*states), part
