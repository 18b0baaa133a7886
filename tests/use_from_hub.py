"""What a user does with weights on a hub, as in the guide: python use_from_hub.py REPOSITORY FOLDER BASE_MODEL.

Reads the base model from the model card, loads the weights of the repository and of the folder in both formats, and
draws a picture with each. Saves to used.pt the attention weights, the word's embedding and the picture of each way, and
those of the base model last.
"""

import sys

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.repocard import RepoCard

from train_custom_diffusion import attention_state_dict

repository, folder, base = sys.argv[1:]
assert RepoCard.load(repository).data.to_dict()["base_model"] == base
latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def use(name=None, ending=None):
    """Weights and picture of the base model with the weights of a repository or folder, if a name is given."""
    pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    if name:
        weights = f"pytorch_custom_diffusion_weights.{ending}"
        pipeline.unet.load_attn_procs(name, weight_name=weights, _pipeline=pipeline)
        pipeline.load_textual_inversion(name, weight_name=f"<new1>.{ending}")
    settings = {"num_inference_steps": 3, "guidance_scale": 6.0, "eta": 1.0, "output_type": "np", "latents": latents}
    image = pipeline("a <new1> cat", generator=torch.Generator().manual_seed(0), **settings).images
    row = pipeline.text_encoder.get_input_embeddings().weight[-1].detach()
    return attention_state_dict(pipeline.unet) | {"<new1>": row, "image": torch.from_numpy(image)}


ways = [(name, ending) for name in (repository, folder) for ending in ("safetensors", "bin")]
torch.save([use(*way) for way in ways] + [use()], "used.pt")
