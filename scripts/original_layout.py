"""One-file models in the original layout, as CompVis and Stability AI published theirs.

Their names for tensors follow from those of diffusers, and their files are read and written here
tensor by tensor, so that a model never lies in memory as a whole.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pickle
import re
import zipfile

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = ("cond_stage_model.", "conditioner.")
KEYS = ".attn2.to_k.weight"
CLIP_WORDS = 49408

# What the UNet has outside of its blocks
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
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
# The VAE's attention has a second name each in files of old versions of diffusers.
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "query": "q",
    "to_k": "k",
    "key": "k",
    "to_v": "v",
    "value": "v",
    "to_out.0": "proj_out",
    "proj_attn": "proj_out",
}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# What other files are, by names that only they have
OTHER_FILES = (
    (r"lora_|.*\.lora_|.*\.(hada|lokr)_", "a LoRA"),
    (r".*_custom_diffusion\.", "a Custom Diffusion result"),
    (r"emb_params$|string_to_param|clip_[lg]$", "the embedding of a word"),
    (r".+\.diffusion_model\.", "a model whose names begin otherwise than those of the original code"),
    (r"model_ema\.", "no weights but their moving averages (EMA)"),
    (r"(unet\.)?down_blocks\.", "a UNet with diffusers' names"),
    (r"input_blocks\.", "a UNet alone"),
    (r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|down|up)", "a VAE alone"),
    (r"text_model\.|transformer\.", "a text encoder alone"),
)


# ---------- Names -----------------------------------------------------------------------------------------------


def unet_name(name, unet):
    """The original layout's name, without its prefix, of what diffusers calls `name`; None if it has none.

    `unet` is the UNet's configuration. The original counts the layers of all blocks in a row: those
    on the way down from 1, as conv_in is 0, each with the layer that makes it smaller at its end.
    """
    module, _, ending = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{ending}"
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if middle:
        part, index, rest = middle.groups()
        number = 2 * int(index) if part == "resnets" else 1
        return f"middle_block.{number}.{inside(part, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not match:
        return None
    side, block, part, index, rest = match.groups()
    layers = unet["layers_per_block"]
    # On the way up, each block has a layer more, and its last one makes it larger as well.
    offset = layers if part.endswith("samplers") else int(index)
    number = int(block) * (layers + 1) + offset
    child = {"resnets": 0, "attentions": 1, "downsamplers": 0}.get(part)
    if part == "upsamplers":
        child = 2 if "CrossAttn" in unet["up_block_types"][int(block)] else 1
    if side == "down":
        return f"input_blocks.{number + 1}.{child}.{inside(part, rest)}"
    return f"output_blocks.{number}.{child}.{inside(part, rest)}"


def inside(part, rest):
    """A name within a part of the UNet's blocks."""
    first, _, others = rest.partition(".")
    if part == "resnets":
        return f"{RESNET[first]}.{others}"
    return f"op.{others}" if part == "downsamplers" else rest


def vae_name(name, blocks):
    """The same of a VAE with so many blocks. The original counts the decoder's from the other end."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    attention = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name)
    if attention:
        coder, layer, ending = attention.groups()
        return f"{coder}.mid.attn_1.{VAE_ATTENTION[layer]}.{ending}"
    match = re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not match:
        return name
    coder, side, block, part, index, rest = match.groups()
    number = int(block) if side == "down" else blocks - 1 - int(block)
    layer = f"block.{index}" if part == "resnets" else part.removesuffix("rs")
    return f"{coder}.{side}.{number}.{layer}.{rest}"


def open_clip_name(name):
    """The same of OpenCLIP's text encoder, whose layers hold queries, keys and values in one tensor each."""
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if not match:
        return OPEN_CLIP.get(name)
    index, layer, ending = match.groups()
    return f"transformer.resblocks.{index}.{OPEN_CLIP_LAYER[layer]}.{ending}"


# ---------- Files -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tensor:
    """A tensor that is read when it is needed. With a `dtype` it keeps that whatever its file's precision is."""

    shape: list
    read: callable
    dtype: object = None


class TooLarge(Exception):
    """Numbers do not fit into the precision in which they are to be written."""


# safetensors' names of types, and torch's
TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@contextlib.contextmanager
def open_tensors(file):
    """Yields {name: Tensor} of a .safetensors or .ckpt file. No code in a pickle is run."""
    import torch
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as content:
            names = content.keys()
            shapes = {name: content.get_slice(name).get_shape() for name in names}
            yield {name: Tensor(shapes[name], functools.partial(content.get_tensor, name)) for name in names}
        return
    is_zip = zipfile.is_zipfile(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        if not is_zip:
            raise ValueError("no table of tensors") from None
        # torch's own message advises to run the code in it.
        raise ValueError("holds objects that are no tensors and could run code, so give its .safetensors") from None
    while "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not a table of tensors")
    tensors = {name: value for name, value in content.items() if torch.is_tensor(value)}
    yield {name: held(value) for name, value in tensors.items()}


def held(value):
    """A `Tensor` of a value that is in memory or mapped from a file, and keeps its type."""
    return Tensor(list(value.shape), lambda: value, value.dtype)


def as_bytes(value):
    """A torch tensor's bytes, without a copy if it is contiguous."""
    import torch

    return memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy())


def rounded(name, value, dtype):
    """A tensor in another precision."""
    if value.dtype == dtype:
        return value
    found = value.to(dtype)
    if dtype.is_floating_point and bool((found.float().isfinite() != value.float().isfinite()).any()):
        raise TooLarge(f"{name} has numbers that are too large for {dtype}")
    return found


def write_tensors(stream, tensors, metadata, dtype):
    """Writes {name: Tensor} as a .safetensors file, one at a time, in `dtype` where they have none of their own."""
    import torch

    codes = {getattr(torch, name): code for code, name in TYPES.items()}
    header = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        own = tensor.dtype or dtype
        begin = end
        end += math.prod(tensor.shape) * own.itemsize
        header[name] = {"dtype": codes[own], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # The format aligns what follows.
    stream.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in tensors.items():
        value = rounded(name, tensor.read(), tensor.dtype or dtype)
        stream.write(as_bytes(value))


def replace_tensors(stream, file, values):
    """Writes values over those of the same names in `stream`, a copy of a .safetensors file, in its own types."""
    import torch

    with open(file, "rb") as source:
        size = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(size))
    for name, value in values.items():
        dtype = getattr(torch, TYPES[header[name]["dtype"]])
        stream.seek(8 + size + header[name]["data_offsets"][0])
        stream.write(as_bytes(rounded(name, value, dtype)))


def what_is(names):
    """What a file is that has these names and no UNet in the original layout, in words for a line."""
    for pattern, words in OTHER_FILES:
        if any(re.match(pattern, name) for name in names):
            return words
    return "the embedding of a word" if len(names) == 1 else "no model that is known here"


# ---------- From diffusers' folders -----------------------------------------------------------------------------


def from_unet(table, unet):
    """Returns {name in the file: Tensor} of a UNet's {name: Tensor}; a ValueError if the layout lacks something."""
    names = {name: unet_name(name, unet) for name in table}
    for name, known in names.items():
        if known is None:
            raise ValueError(f"the original layout has no place for {name}")
    return {UNET + names[name]: tensor for name, tensor in table.items()}


def from_vae(table, blocks):
    """The same of a VAE. The original's attention has convolutions of one pixel."""
    found = {}
    for name, tensor in table.items():
        known = vae_name(name, blocks)
        is_linear = ".mid.attn_1." in known and len(tensor.shape) == 2
        one_pixel = changed([tensor], lambda value: value[:, :, None, None], [*tensor.shape, 1, 1])
        found[VAE + known] = one_pixel if is_linear else tensor
    return found


def from_clip(table, prefix):
    """The same of CLIP's text encoder, which transformers 5.6 and newer name without `text_model`."""
    import torch

    found = {}
    for name, tensor in table.items():
        found["text_model." + name.removeprefix("text_model.")] = tensor
    length = found["text_model.embeddings.position_embedding.weight"].shape[0]
    found["text_model.embeddings.position_ids"] = held(torch.arange(length)[None])
    return {prefix + name: tensor for name, tensor in found.items()}


def from_open_clip(table, prefix):
    """The same of OpenCLIP's, of Stable Diffusion 2.x or the second one of XL."""
    import torch

    table = {name.removeprefix("text_model."): tensor for name, tensor in table.items()}
    table.pop("embeddings.position_ids", None)  # of old versions of transformers
    numbers = {int(name.split(".")[2]) for name in table if name.startswith("encoder.layers.")}
    width = table["final_layer_norm.bias"].shape[0]
    # CLIP's training ends with this scale, which drawing does not use.
    found = {"logit_scale": Tensor([], lambda: torch.tensor(math.log(100)))}
    if "text_projection.weight" not in table:
        # Stable Diffusion 2.x draws with the last but one of OpenCLIP's layers and without a projection. diffusers
        # leaves both out; a loader that wants them gets some that are not used.
        found["text_projection"] = Tensor([width, width], lambda: torch.eye(width))
        last = f"encoder.layers.{max(numbers)}."
        unused = f"encoder.layers.{max(numbers) + 1}."
        table |= {name.replace(last, unused): tensor for name, tensor in table.items() if name.startswith(last)}
        numbers.add(max(numbers) + 1)
    for name, tensor in table.items():
        if name == "text_projection.weight":
            found["text_projection"] = changed([tensor], lambda value: value.T, tensor.shape[::-1])
        elif not re.search(r"self_attn\.[qkv]_proj", name):
            found[open_clip_name(name)] = tensor
    for index in numbers:
        for ending in ("weight", "bias"):
            parts = [table[f"encoder.layers.{index}.self_attn.{part}_proj.{ending}"] for part in "qkv"]
            shape = [3 * width, *parts[0].shape[1:]]
            found[f"transformer.resblocks.{index}.attn.in_proj_{ending}"] = changed(parts, join, shape)
    return {prefix + name: tensor for name, tensor in found.items()}


def without_added_words(table):
    """A text encoder's table with CLIP's own words alone: a tool that reads a file takes no others."""
    kept = dict(table)
    for name, tensor in table.items():
        if name.endswith("token_embedding.weight") and tensor.shape[0] > CLIP_WORDS:
            kept[name] = changed([tensor], lambda value: value[:CLIP_WORDS], [CLIP_WORDS, tensor.shape[1]])
    return kept


def join(*values):
    """Tensors one below the other."""
    import torch

    return torch.cat(values)


def changed(tensors, change, shape):
    """A `Tensor` that is made of others when it is read."""
    return Tensor(list(shape), lambda: change(*(tensor.read() for tensor in tensors)))
