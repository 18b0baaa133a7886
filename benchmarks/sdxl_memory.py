#!/usr/bin/env python3
"""Counts what a run of Stable Diffusion XL keeps in a GPU's memory, without a GPU: on torch's meta device.

    python benchmarks/sdxl_memory.py [--resolution 1024] [--batch_size 1]

Builds UNet and text encoders at their real sizes, lets the trainer prepare them, and runs the forward pass of a step
with as many class pictures as instance pictures in bfloat16. It counts weights, gradients, AdamW's state, and every
tensor that autograd keeps. With gradient checkpointing, that is the input of each layer that is computed twice, and
what the largest of them keeps while it is. The VAE is left out, as with --cache_latents.

Then it goes through the end of a run as the trainer does: what was trained is taken out of the networks, loaded again,
and a picture is drawn. There it counts the largest sum of all tensors that are alive at one time. What a GPU needs
besides (the allocator's gaps, libraries, workspaces) is not counted.

Last, it counts what --keep_apart adds: the bytes that it keeps, and its share of a step's floating-point operations.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import train_custom_diffusion as trainer

UNET = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
REQUIRED = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--instance_prompt=a <new1> cat"]
FIRST = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SECOND = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


class Attention(torch.autograd.Function):
    """Stands in for fused attention, which keeps its inputs, its output and a number for each row."""

    @staticmethod
    def forward(context, query, key, value):
        output = torch.empty_like(query)
        context.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


class Count:
    """Bytes of the tensors that autograd keeps, each once, by the layer in which it was made."""

    def __init__(self, model):
        self.layer, self.bytes, self.inputs, self.seen = None, {}, {}, set()
        self.seen |= {id(parameter) for parameter in model.parameters()}
        self.kept = []  # so that no id is used twice
        for name, module in model.named_modules():
            if type(module).__name__ in ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"):
                module.register_forward_pre_hook(self.enter(name), with_kwargs=True)
                module.register_forward_hook(self.leave)

    def enter(self, name):
        def hook(module, args, kwargs):
            self.layer = name
            self.inputs[name] = args[0].nbytes if args else kwargs["hidden_states"].nbytes

        return hook

    def leave(self, *args):
        self.layer = None

    def pack(self, tensor):
        if id(tensor) not in self.seen and not isinstance(tensor, torch.nn.Parameter):
            self.seen.add(id(tensor))
            self.kept.append(tensor)
            self.bytes[self.layer] = self.bytes.get(self.layer, 0) + tensor.nbytes
        return tensor


class Peak(TorchDispatchMode):
    """The largest sum of bytes of the tensors that operations make and that are alive at one time, without weights."""

    def __init__(self, *networks):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.weights:
                    continue
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return output


def bytes_of(network):
    """Bytes of a network's weights."""
    return sum(parameter.nbytes for parameter in network.parameters())


def predict(pipeline, pictures, cells):
    """The UNet's prediction for so many pictures, as the trainer makes it."""
    ids = torch.zeros(pictures, 77, dtype=torch.long, device="meta")
    noisy = torch.empty(pictures, 4, cells, cells, device="meta", dtype=torch.bfloat16)
    timesteps = torch.zeros(pictures, dtype=torch.long, device="meta")
    conditions = torch.empty(pictures, 6, device="meta")
    return trainer.DenoisingModel(pipeline)(noisy, timesteps, ids, ids, conditions)


@torch.no_grad()
def count_end(pipeline, resolution):
    """Returns {name: bytes} of the end of a run: the three networks, and the three peaks of what it does with them."""
    cells = resolution // 8
    trainer.to_base_model(pipeline, [None, None])
    networks = [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
    base = sum(bytes_of(network) for network in networks)
    with torch.device("meta"):
        processors = trainer.custom_diffusion_processors(pipeline.unet, "crossattn_kv")
    pipeline.unet.set_attn_processor(processors)
    loaded = sum(bytes_of(network) for network in networks) - base
    pipeline.unet.to(torch.bfloat16)  # as autocast does, layer by layer
    found = {"base networks, bf16": base, "loaded weights, fp32": loaded, "VAE, bf16": bytes_of(pipeline.vae)}
    with Peak(*networks) as peak:
        predict(pipeline, 1, 32)
    found["the proof's prediction"] = peak.bytes
    with Peak(*networks) as peak:
        predict(pipeline, 2, cells)
    found["a prediction with guidance"] = peak.bytes
    with Peak(pipeline.vae) as peak:
        pipeline.vae.decode(torch.empty(1, 4, cells, cells, device="meta", dtype=torch.bfloat16))
    found["decoding a picture"] = peak.bytes
    return found


def build():
    """Returns SDXL's pipeline on the meta device and the trainer's model of it, prepared for bfloat16."""
    text = {"vocab_size": 49408, "attn_implementation": "sdpa"}
    with torch.device("meta"):
        pipeline = SimpleNamespace(
            unet=UNet2DConditionModel(**UNET),
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**FIRST, **text)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**SECOND, **text, projection_dim=1280)),
            tokenizer=None,
            tokenizer_2=None,
        )
        args = trainer.parse_args(REQUIRED)
        accelerator = SimpleNamespace(mixed_precision="bf16", device=torch.device("meta"))
        return pipeline, trainer.build_models(args, accelerator, pipeline, [[49408]] * 2, [[0]] * 2)


def operations(call):
    """The floating-point operations of a call, those of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count_apart(pipeline, model, cells):
    """Counts --keep_apart with one word: bytes kept from step to step, and its operations and those of a step.

    A step has one instance picture, the case in which the share is largest.
    """
    base = Path(__file__).resolve().parents[1] / "assets/model-xl"
    tokenizers = [
        transformers.CLIPTokenizer.from_pretrained(base, subfolder=name) for name in ("tokenizer", "tokenizer_2")
    ]
    for tokenizer in tokenizers:
        tokenizer.add_tokens("<new1>")
    args = trainer.parse_args([*REQUIRED, "--modifier_token=<new1>", "--keep_apart"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    # R^-1 is found before the first step; on this device there are no numbers to invert.
    trainer.invert_others = lambda *_: torch.eye(UNET["cross_attention_dim"], device="meta")
    trainer.keep_apart(args, optimizer, model, tokenizers, [])
    step = operations(lambda: predict(pipeline, 1, cells).sum().backward())
    for _ in range(2):  # the first time it encodes the word twice
        added = operations(optimizer.step)
    # W0, and W0 + U in the optimizer's state
    kept = 2 * sum(parameter.nbytes for parameter in model.unet.parameters() if parameter.requires_grad)
    return kept, added, step


def count_host(pipeline, trained):
    """Returns {name: bytes} of what the phases of a run hold in the computer's own memory, beside a GPU."""
    numbers = sum(p.numel() for p in pipeline.unet.parameters()) - trained // 4
    in_float = sum(p.numel() for name, p in pipeline.unet.named_parameters() if ".attn2.to_" in name)
    unet = 2 * numbers + 2 * in_float
    texts = sum(p.numel() for part in (pipeline.text_encoder, pipeline.text_encoder_2) for p in part.parameters())
    vae = 4 * sum(p.numel() for p in pipeline.vae.parameters())
    return {
        "loading: UNet in bf16, its cross-attention and all else in fp32": unet + 4 * texts + vae,
        "making what is trained: text encoders are in bf16 by then": unet + 2 * texts + vae + trained,
        "the base model's digest: weights in fp32, in fp16, and a file of these": 2 * trained,
        "a checkpoint or the result: weights in fp32, and a file of them": 2 * trained,
    }


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Count the memory of a run of SDXL.")
    parser.add_argument("--resolution", type=int, default=1024, help="in pixels")
    parser.add_argument("--batch_size", type=int, default=1, help="instance pictures, and as many class pictures")
    args = parser.parse_args()
    pipeline, model = build()
    n, cells = 2 * args.batch_size, args.resolution // 8
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    kept, added, step = count_apart(pipeline, model, cells)
    model.zero_grad()
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: Attention.apply(q, k, v)
    count = Count(model)
    ids = torch.zeros(n, 77, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda tensor: tensor):
        noisy = torch.empty(n, 4, cells, cells, device="meta", dtype=torch.bfloat16)
        times = torch.empty(n, 6, device="meta")
        model(noisy, torch.zeros(n, dtype=torch.long, device="meta"), ids, ids, times)
    layers = {name: size for name, size in count.bytes.items() if name}
    outside = count.bytes.get(None, 0)
    checkpointed = outside + sum(count.inputs.values()) + max(layers.values())
    rows = {
        "frozen weights, bf16": frozen,
        "trained weights, fp32": trained,
        "gradients": trained,
        "AdamW's state": 2 * trained,
        "AdamW's state, --use_8bit_adam": trained / 2,
        "kept by autograd": outside + sum(layers.values()),
        "kept by autograd, --gradient_checkpointing": checkpointed,
    }
    print(f"| {args.resolution} px, {args.batch_size} + {args.batch_size} pictures | GB |\n| --- | --- |")
    for name, size in rows.items():
        print(f"| {name} | {size / 1e9:.2f} |")
    states = frozen + 4 * trained
    print(f"| together | {(states + outside + sum(layers.values())) / 1e9:.2f} |")
    training = states + checkpointed
    print(f"| together, --gradient_checkpointing | {training / 1e9:.2f} |")
    print(f"| together, --gradient_checkpointing --use_8bit_adam | {(training - 1.5 * trained) / 1e9:.2f} |")
    print("\n| in the computer's own memory | GB |\n| --- | --- |")
    for name, size in count_host(pipeline, trained).items():
        print(f"| {name} | {size / 1e9:.2f} |")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda tensor: tensor):
        end = count_end(pipeline, args.resolution)
    print("\n| the end of the run | GB |\n| --- | --- |")
    for name, size in end.items():
        print(f"| {name} | {size / 1e9:.2f} |")
    *networks, proof, prediction, decoding = end.values()
    # The trained weights themselves are still there, as the optimizer refers to them.
    together = sum(networks) + trained + max(proof, prediction, decoding)
    print(f"| the end together | {together / 1e9:.2f} |")
    print(f"| of the training, --gradient_checkpointing | {together / training:.2f} |")
    print(
        f"\n--keep_apart keeps {kept / 1e9:.2f} GB more. A step with one picture has {step / 1e12:.1f} TFLOP, to which"
    )
    print(f"it adds {added / 1e12:.2f} ({100 * added / step:.1f} %).")


if __name__ == "__main__":
    main()
