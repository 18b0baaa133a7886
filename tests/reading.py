"""What a run left, read with safetensors, torch and diffusers themselves."""

import copy
import functools

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

WEIGHTS = "pytorch_custom_diffusion_weights"
RARE = "zebra"  # a word of the vocabulary whose row `copy_by_hand` overwrites


def load_weights(folder):
    """Trained attention weights of a folder, without the empty entries, as safetensors reads them."""
    return {key: value for key, value in load_file(folder / f"{WEIGHTS}.safetensors").items() if value.numel()}


def load_trained(folder):
    """Everything that a run trained: attention weights by their key and embeddings by their word."""
    trained = load_weights(folder)
    for file in folder.glob("*.safetensors"):
        if file.stem != WEIGHTS:
            trained |= load_file(file)
    return trained


def same_bits(left, right):
    """Whether two dicts of tensors hold the same names and exactly the same numbers."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def base_weights(model, trained):
    """The base model's own weights for every key of `trained` that is an attention projection."""
    base = loaded_pipeline(model).unet.state_dict()
    keys = [key for key in trained if "processor" in key]
    return {key: base[key.replace("processor.", "").replace("_custom_diffusion", "")] for key in keys}


def distance(left, right):
    """Euclidean distance over all tensors of two dicts."""
    assert left.keys() == right.keys()
    return sum(float((left[key].double() - right[key].double()).square().sum()) for key in left) ** 0.5


def beginning(model, trained):
    """Where the numbers of `trained` started: the base model's projections, ktn's row, pll's for a second word."""
    table = loaded_pipeline(model).text_encoder.get_input_embeddings().weight.detach()
    words = sorted(key for key in trained if "processor" not in key)
    return base_weights(model, trained) | {word: table[row] for word, row in zip(words, (42170, 47629), strict=False)}


def movement(model, trained):
    """How far training moved."""
    return distance(trained, beginning(model, trained))


@functools.cache
def loaded_pipeline(model):
    """The base model as diffusers loads it, in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fresh_pipeline(model):
    """A copy of the base model that a test may change."""
    return copy.deepcopy(loaded_pipeline(model))


def prediction(pipeline, prompt):
    """The UNet's output for a prompt and fixed noise."""
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    size = pipeline.unet.config.sample_size
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipeline.unet(noise, torch.tensor([400]), pipeline.text_encoder(ids)[0]).sample


# Loading


def load_as_a_user(model, folder, words, suffix):
    """The documented way: load_attn_procs with _pipeline, load_textual_inversion for each word."""
    pipeline = fresh_pipeline(model)
    pipeline.unet.load_attn_procs(str(folder), weight_name=f"{WEIGHTS}.{suffix}", _pipeline=pipeline)
    for word in words:
        pipeline.load_textual_inversion(str(folder), weight_name=f"{word}.{suffix}")
    return pipeline


def copy_by_hand(model, folder, word=None):
    """The base model with the trained numbers copied into its own layers, and the new word's row into RARE's."""
    pipeline = fresh_pipeline(model)
    own = pipeline.unet.state_dict()
    for key, value in load_weights(folder).items():
        own[key.replace("processor.", "").replace("_custom_diffusion", "")].copy_(value)
    if word:
        row = pipeline.tokenizer.convert_tokens_to_ids(RARE + "</w>")
        embedding = pipeline.text_encoder.get_input_embeddings().weight.data
        embedding[row] = load_file(folder / f"{word}.safetensors")[word]
    return pipeline


def check_loading(model, folder, word, prompt, suffixes=("safetensors", "bin")):
    """Both formats give the hand-copied model's output, which is not the base model's."""
    expected = prediction(copy_by_hand(model, folder, word), prompt.replace(word, RARE) if word else prompt)
    base = prediction(fresh_pipeline(model), prompt.replace(word, RARE) if word else prompt)
    assert (expected - base).abs().max() > 1e-3
    for suffix in suffixes:
        found = prediction(load_as_a_user(model, folder, [word] if word else [], suffix), prompt)
        assert (found - expected).abs().max() < 1e-5, suffix


def check_weight_files(model, folder, words, projections):
    """Names, shapes and types of what a run leaves, in both formats."""
    unet = fresh_pipeline(model).unet
    keys, empty = {}, set()
    for name in unet.attn_processors:
        attention = name.removesuffix(".processor")
        if attention.endswith("attn1"):
            empty.add(name)
            continue
        for projection in projections:
            parameter, _, part = projection.partition(".")
            weight = unet.get_parameter(f"{attention}.{projection}")
            keys[f"{name}.{parameter}_custom_diffusion.{part}"] = weight.shape
    assert keys and empty
    safe = load_file(folder / f"{WEIGHTS}.safetensors")
    pickled = torch.load(folder / f"{WEIGHTS}.bin", weights_only=True)
    assert safe.keys() == pickled.keys() == keys.keys() | empty
    for key, shape in keys.items():
        assert safe[key].shape == pickled[key].shape == shape
        assert safe[key].dtype == pickled[key].dtype == torch.float32
        assert torch.equal(safe[key], pickled[key])
    for key in empty:
        assert safe[key].shape == (0,) and pickled[key] == {}
    for word in words:
        safe = load_file(folder / f"{word}.safetensors")
        pickled = torch.load(folder / f"{word}.bin", weights_only=True)
        assert safe.keys() == pickled.keys() == {word}
        dim = fresh_pipeline(model).text_encoder.config.hidden_size
        assert safe[word].shape == pickled[word].shape == (dim,)
        assert safe[word].dtype == pickled[word].dtype == torch.float32
        assert torch.equal(safe[word], pickled[word])


def training_state(checkpoint):
    """Optimizer and schedule of a checkpoint."""
    return torch.load(checkpoint / "training_state.pt", weights_only=True)
