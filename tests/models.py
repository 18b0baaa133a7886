"""Tiny Stable Diffusion models with random weights, and the small trained one of the repository."""

import json
import shutil

import pytest
from launching import ROOT

EMBEDDED = ROOT / "assets" / "model"
SMALL_VOCABULARY = 1000


def write_small_vocabulary(folder):
    """Writes vocab.json and merges.txt with CLIP's first 998 pieces and its two special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = json.loads((EMBEDDED / "tokenizer" / "vocab.json").read_text())
    pieces = sorted(ids, key=ids.get)[: SMALL_VOCABULARY - 2] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    merges = (EMBEDDED / "tokenizer" / "merges.txt").read_text().splitlines(keepends=True)
    # below the first line, which says the version; the pieces before the merged ones are single bytes
    (folder / "merges.txt").write_text("".join(merges[: 1 + SMALL_VOCABULARY - 2 - 512]))
    return folder


def split_tokenizers(folder):
    """Gives a saved model's tokenizers the two files of CLIP's, as the hub's models have them.

    The one file that transformers 5 writes instead takes eight times as long to read.
    """
    for file in folder.glob("tokenizer*/tokenizer.json"):
        file.unlink()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(EMBEDDED / "tokenizer" / name, file.parent)
    return folder


def make_vae(**config):
    """A tiny VAE of factor 8 with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4, 4, 8, 8],
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        **config,
    )


def make_model(folder, text, unet, scheduler):
    """Saves a Stable Diffusion of random weights, with CLIP's whole vocabulary and a VAE of factor 8."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    vae = make_vae()
    text_config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=49408, **text
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=[32, 32],
        cross_attention_dim=32,
        norm_num_groups=8,
        **unet,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return split_tokenizers(folder)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """Stable Diffusion 1.x in small: predicts the noise, one size of attention head."""
    from diffusers import PNDMScheduler

    unet = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 8,
    }
    scheduler = PNDMScheduler(skip_prk_steps=True, **BETAS)
    return make_model(tmp_path_factory.mktemp("models") / "sd1", {"hidden_act": "quick_gelu"}, unet, scheduler)


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    """Stable Diffusion 2.x in small: v-prediction, linear projections, a list of head dimensions."""
    from diffusers import DDIMScheduler

    unet = {
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
    }
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **BETAS)
    return make_model(tmp_path_factory.mktemp("models") / "sd2", {"hidden_act": "gelu"}, unet, scheduler)


@pytest.fixture(scope="session")
def small_vocabulary(tmp_path_factory):
    """As small as the model of diffusers' own test of its script: 1,000 pieces, a VAE of factor 2."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("models") / "small_vocabulary"
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 64],
        latent_channels=4,
    )
    unet = UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=[32, 64],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=32,
    )
    text = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = write_small_vocabulary(folder / "tokenizer")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=SMALL_VOCABULARY, **text)),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_xl(folder, eos_token_id, **unet):
    """Saves a Stable Diffusion XL of random weights, with two text encoders of different width."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    vae = make_vae(scaling_factor=0.13025)
    text = {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 49408}
    text |= {"eos_token_id": eos_token_id}
    blocks = {
        "layers_per_block": 1,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [2, 4],
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        use_linear_projection=True,
        cross_attention_dim=32 + 48,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 40,
        norm_num_groups=8,
        **blocks | unet,
    )
    second = CLIPTextConfig(hidden_size=48, projection_dim=40, hidden_act="gelu", **text)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=32, hidden_act="quick_gelu", **text)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", pad_token="!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **BETAS),
        add_watermarker=False,
    ).save_pretrained(folder)
    return split_tokenizers(folder)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """Stable Diffusion XL in small. With this end token, of the hub's folders, transformers pools at the new word."""
    return make_xl(tmp_path_factory.mktemp("models") / "sdxl", eos_token_id=2)


@pytest.fixture(scope="session")
def ssd(tmp_path_factory):
    """SSD-1B in small: an XL without attention in the middle, and with other depths on the way up than down.

    The true depths are [1, [2, 2], [4, 4]] and [[4, 4, 10], [2, 1, 1], 1].
    """
    return make_xl(
        tmp_path_factory.mktemp("models") / "ssd",
        eos_token_id=2,
        layers_per_block=2,
        block_out_channels=[16, 32, 32],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2D",
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, [2, 2], [1, 1]],
        reverse_transformer_layers_per_block=[[1, 1, 3], [2, 1, 1], 1],
        attention_head_dim=[1, 2, 2],
    )


@pytest.fixture(scope="session")
def sdxl_end(tmp_path_factory):
    """The same with the true end token, at which it pools."""
    return make_xl(tmp_path_factory.mktemp("models") / "sdxl_end", eos_token_id=49407)


# Models that judge pictures


def make_clip(folder):
    """Saves a CLIP of random weights, with CLIP's own tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    text = layers | {"vocab_size": 49408, "eos_token_id": 49407}
    vision = layers | {"image_size": 64, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer").save_pretrained(folder)
    return folder


def make_dino(folder):
    """Saves a vision transformer of random weights without a pooling layer, as DINO is."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=56, patch_size=8, **layers), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judges(tmp_path_factory):
    """Flags with a CLIP and a DINO of random weights."""
    folder = tmp_path_factory.mktemp("judges")
    return {"clip_model": make_clip(folder / "clip"), "dino_model": make_dino(folder / "dino")}
