"""Models as one file: Stable Diffusion 1.x, 2.x and XL with the names of their first implementations.

The names of CompVis' and Stability AI's code are written down here as a table and a few rules, so that what diffusers
makes of a file is compared with something else than diffusers. Any widths and numbers of blocks will do.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def replace_start(name, table):
    """The name with what it starts with replaced as the table says."""
    for own, original in table.items():
        if name.startswith(f"{own}."):
            return original + name.removeprefix(own)
    return name


def unet_name(name, layers):
    """The original name of a weight of a UNet whose blocks on the way down have so many layers."""
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not match:
        name = replace_start(name, UNET)
        is_resnet = name.startswith(("middle_block.0.", "middle_block.2."))
        place, rest = name[:15], name[15:]
        return place + replace_start(rest, RESNET) if is_resnet else name
    way, block, part, layer, rest = match.groups()
    block, layer = int(block), int(layer)
    if way == "down":
        number = 1 + block * (layers + 1) + (layers if part == "downsamplers" else layer)
        place = f"input_blocks.{number}"
    else:
        number = block * (layers + 1) + (layers if part == "upsamplers" else layer)
        place = f"output_blocks.{number}"
    if part == "resnets":
        return f"{place}.0.{replace_start(rest, RESNET)}"
    if part == "attentions":
        return f"{place}.1.{rest}"
    if part == "downsamplers":
        return f"{place}.0.{rest.replace('conv.', 'op.')}"
    return f"{place}.UPSAMPLER.{rest}"


def write_unet(weights, config):
    """The UNet's part of a file, from diffusers' names."""
    state = {unet_name(name, config["layers_per_block"]): value for name, value in weights.items()}
    # The upsampler comes last in its block, so its number depends on whether there is attention.
    with_attention = {name.partition(".1.norm.")[0] for name in state}
    written = {}
    for name, value in state.items():
        place = name.partition(".UPSAMPLER.")[0]
        number = 2 if place in with_attention else 1
        written["model.diffusion_model." + name.replace("UPSAMPLER", str(number))] = value
    return written


def vae_name(name, last):
    """The original name of a weight of a VAE whose last block has this number."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{last - int(match[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{last - int(match[1])}.upsample", name)
    before, is_attention, rest = name.partition("mid_block.attentions.0.")
    return f"{before}mid.attn_1.{replace_start(rest, VAE_ATTENTION)}" if is_attention else name


def write_vae(weights, config):
    """The VAE's part of a file, from diffusers' names."""
    last = len(config["block_out_channels"]) - 1
    written = {f"first_stage_model.{vae_name(name, last)}": value for name, value in weights.items()}
    # In the attention there are convolutions of 1 x 1.
    is_linear = {name: ".attn_1." in name and value.dim() == 2 for name, value in written.items()}
    return {name: value[:, :, None, None] if is_linear[name] else value for name, value in written.items()}


def plain_names(weights):
    """A text encoder's weights without `text_model.`, which some versions of transformers write."""
    return {name.removeprefix("text_model."): value for name, value in weights.items()}


def write_clip(weights, prefix):
    """A text encoder's part with CLIP's own names, from diffusers' names."""
    return {f"{prefix}transformer.text_model.{name}": value for name, value in plain_names(weights).items()}


def write_open_clip(weights, prefix):
    """A text encoder's part in OpenCLIP's layout: queries, keys and values are one, the projection is transposed."""
    weights = plain_names(weights)
    written = {"logit_scale": torch.tensor(4.6)}
    for name, value in weights.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if name == "text_projection.weight":
            written["text_projection"] = value.T
        elif not match:
            written[OPEN_CLIP.get(name, name)] = value
        elif match[2].startswith("self_attn.q_proj."):
            ending = match[2].rpartition(".")[2]
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            written[f"transformer.resblocks.{match[1]}.attn.in_proj_{ending}"] = torch.cat(parts)
        elif not match[2].startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            written[f"transformer.resblocks.{match[1]}.{replace_start(match[2], OPEN_CLIP_LAYER)}"] = value
    return {f"{prefix}model.{name}": value for name, value in written.items()}


def add_last_layer(weights):
    """OpenCLIP's weights of Stable Diffusion 2, with the last layer and the projection, which nothing uses."""
    numbers = {int(match[1]) for name in weights if (match := re.search(r"resblocks\.(\d+)", name))}
    last = f"resblocks.{max(numbers)}."
    more = {name.replace(last, f"resblocks.{max(numbers) + 1}."): value for name, value in weights.items()}
    table = weights["cond_stage_model.model.positional_embedding"]
    return weights | more | {"cond_stage_model.model.text_projection": torch.eye(table.shape[1])}


def read_part(folder, part):
    """The weights and the configuration of a part of a model in diffusers format."""
    (file,) = Path(folder, part).glob("*.safetensors")
    return load_file(file), json.loads(Path(folder, part, "config.json").read_text())


def write_text_encoders(folder):
    """The text encoders' parts of a file, in the layout of the model's kind."""
    weights, config = read_part(folder, "text_encoder")
    if Path(folder, "text_encoder_2").is_dir():
        second, _ = read_part(folder, "text_encoder_2")
        first = write_clip(weights, "conditioner.embedders.0.")
        return first | write_open_clip(second, "conditioner.embedders.1.")
    if config["hidden_act"] == "gelu":  # OpenCLIP's; CLIP itself has quick_gelu
        return add_last_layer(write_open_clip(weights, "cond_stage_model."))
    return write_clip(weights, "cond_stage_model.")


def found_beside(state):
    """What files on the net have besides: buffers of the noise schedule and positions, and averaged weights."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    more = {"betas": betas, "alphas_cumprod": (1 - betas).cumprod(0)}
    for name in state:
        place, found, _ = name.rpartition("position_embedding.weight")
        if found:
            more[f"{place}position_ids"] = torch.arange(77)[None]
        if name.startswith("model.diffusion_model."):
            # EMA's names have no dots.
            more["model_ema." + name.removeprefix("model.").replace(".", "")] = state[name] + 1
    return more | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}


def write_original(folder, file, dtype=None, beside=False, empty=(), without=()):
    """Writes a model in diffusers format as one .safetensors or .ckpt file, whose path it returns.

    `dtype` is that of all numbers, else the folder's. `beside` adds what files on the net have besides, `empty` keys
    without numbers, such as v_pred and ztsnr. `without` leaves out what starts so: "first_stage_model." is the VAE.
    """
    state = write_unet(*read_part(folder, "unet")) | write_vae(*read_part(folder, "vae")) | write_text_encoders(folder)
    if beside:
        state |= found_beside(state)
    state |= {name: torch.empty(0) for name in empty}
    for name, value in state.items():
        state[name] = (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous()
    state = {name: value for name, value in state.items() if not name.startswith(tuple(without))}
    file = Path(file)
    if file.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 470000}, file)
    else:
        save_file({name: value.clone() for name, value in state.items()}, file)
    return file
