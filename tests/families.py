"""Stable Diffusion models as people use them: tiny, with random weights, and with the settings that each ships with.

What decides behaviour has the value of the model's own files: the scheduler's file as a whole, heads, projections,
blocks, the tokenizer's files, model_index.json. Widths, layers and the vocabulary are small, and UNets have two blocks;
Stable Diffusion 2.1 keeps its four and its text encoder's 23 layers, BK-SDM tiny its three. Parts of equal settings get
equal weights, so that two models can be compared bit by bit.

"read": a copy of the file was read in a public repository. The others are written down from memory of the hub's files.
"""

import dataclasses
import importlib.util
import json

from models import SMALL_VOCABULARY, write_small_vocabulary

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
OLD = BETAS | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
PNDM = OLD | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "clip_sample": False}  # read, of 1.5
# what converting a file of weights, and later a change of the scheduler, leaves
CONVERTED = PNDM | {"_diffusers_version": "0.21.2", "prediction_type": "epsilon", "timestep_spacing": "leading"}
THRESHOLDING = {"dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "thresholding": False}


def leftovers(kind, **more):
    """A scheduler's file that has its own settings beside those of the scheduler before."""
    return CONVERTED | {"_class_name": kind} | more


END = {"content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
SPECIAL_TOKENS = {"bos_token": END | {"content": "<|startoftext|>"}, "eos_token": END, "unk_token": END}
TOKENIZER = {name: value | {"__type": "AddedToken"} for name, value in SPECIAL_TOKENS.items()} | {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": 77,
    "pad_token": "<|endoftext|>",
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
}  # read, of 2.1-base

CROSS, PLAIN = ["CrossAttnDownBlock2D"], ["DownBlock2D"]
UNET = {"down_block_types": CROSS + PLAIN, "attention_head_dim": 8}  # of Stable Diffusion 1
BK_SMALL = UNET | {"mid_block_type": None}  # read; of four blocks, too
BK_TINY = BK_SMALL | {"down_block_types": CROSS * 3}  # read
# read, of 2.1-base; the channels below make it heads of two numbers
UNET_2 = {"down_block_types": CROSS * 3 + PLAIN, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SHORT_2 = UNET_2 | {"down_block_types": CROSS + PLAIN, "attention_head_dim": [5, 10]}  # the outer half
TEXT_2 = {"hidden_act": "gelu", "num_hidden_layers": 23}  # read, of 2.1-base
SHORT_TEXT_2 = TEXT_2 | {"num_hidden_layers": 2}


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model ships with, where it differs from Stable Diffusion 1.5."""

    scheduler: dict = dataclasses.field(default_factory=lambda: PNDM)
    unet: dict = dataclasses.field(default_factory=lambda: UNET)
    text: dict = dataclasses.field(default_factory=dict)
    vae: dict = dataclasses.field(default_factory=dict)
    vae_seed: int = 0
    pipeline: str = "StableDiffusionPipeline"
    pad_token: str = "<|endoftext|>"
    without: tuple = ()  # settings of the tokenizer that its file lacks
    words: tuple = ()  # that the tokenizer got after CLIP's
    needs: str | None = None  # a package without which diffusers cannot load the model's scheduler

    @property
    def loads(self):
        """Whether diffusers itself can load the model, and its tokenizer can cut prompts."""
        return not (self.without or self.needs and not importlib.util.find_spec(self.needs))

    @property
    def trains_as_1_5(self):
        """Whether what is trained must be Stable Diffusion 1.5's to the last bit."""
        return self.unet == UNET and not (self.text or self.vae_seed or self.words)


ZERO_SNR = leftovers(
    "DDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
)
DPM = THRESHOLDING | {"lower_order_final": True, "solver_order": 2, "solver_type": "midpoint", "euler_at_final": False}
DPM |= {"final_sigmas_type": "zero", "lambda_min_clipped": float("-inf"), "use_lu_lambdas": False}
SIGMAS = {"interpolation_type": "linear", "sigma_max": None, "sigma_min": None, "timestep_type": "discrete"}
LCM = BETAS | THRESHOLDING | {"_class_name": "LCMScheduler", "_diffusers_version": "0.22.0.dev0", "clip_sample": False}
LCM |= {"clip_sample_range": 1.0, "original_inference_steps": 50, "prediction_type": "epsilon", "steps_offset": 0}
LCM |= {"rescale_betas_zero_snr": False, "set_alpha_to_one": True, "timestep_spacing": "leading", "trained_betas": None}

FAMILIES = {
    "SD 1.5": Family(),
    # without clip_sample and so of PNDM's old form; read
    "SD 1.4": Family(OLD | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.4.0.dev0"}),
    "Realistic Vision 5.1": Family(CONVERTED, vae={"force_upcast": True, "scaling_factor": 0.18215}),  # read
    # class and algorithm_type: InvokeAI 6368
    "DreamShaper 8": Family(
        leftovers("DEISMultistepScheduler", algorithm_type="deis", **DPM | {"solver_type": "logrho"})
    ),
    "SD 2.1": Family(
        # read but for the class, which was Flax's there
        PNDM | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"},
        unet=UNET_2 | {"upcast_attention": True},
        text=TEXT_2,
        pad_token="!",
    ),
    "SD-Turbo": Family(
        leftovers("EulerDiscreteScheduler", timestep_spacing="trailing", use_karras_sigmas=False, **SIGMAS),
        unet=SHORT_2,
        text=SHORT_TEXT_2,
        vae={"force_upcast": True, "scaling_factor": 0.18215},
        pad_token="!",
    ),
    "LCM DreamShaper 7": Family(LCM, UNET | {"time_cond_proj_dim": 256}, pipeline="LatentConsistencyModelPipeline"),
    "BK-SDM small": Family(unet=BK_SMALL),
    "BK-SDM tiny": Family(unet=BK_TINY),
    "tiny-sd": Family(
        leftovers("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", **DPM),
        unet=BK_TINY | {"num_attention_heads": None, "transformer_layers_per_block": 1, "attention_type": "default"},
    ),
    # drawings; its VAE's file is of a time without scaling_factor and with another size; read
    "a VAE of its own": Family(vae={"sample_size": 256}, vae_seed=1),
    "zero terminal SNR": Family(ZERO_SNR, unet=SHORT_2, text=SHORT_TEXT_2, pad_token="!"),
    # read, of Waifu Diffusion
    "LMS": Family(
        {key: OLD[key] for key in (*BETAS, "set_alpha_to_one", "trained_betas")}
        | {"_class_name": "LMSDiscreteScheduler", "_diffusers_version": "0.4.1", "timestep_values": None},
        needs="scipy",
    ),
    "SDE": Family(leftovers("DPMSolverSDEScheduler", noise_sampler_seed=None), needs="torchsde"),
    "sigmas of a beta distribution, no model_max_length": Family(
        leftovers("EulerDiscreteScheduler", use_beta_sigmas=True, **SIGMAS),
        without=("model_max_length",),
        needs="scipy",  # the file was read, but without these two
    ),
    "SDE of DPM++": Family(
        leftovers("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, **DPM)
    ),
    "two vectors of another word": Family(words=("<old>", "<old>_1")),
}


def make_family(folder, family):
    """Saves the tiny model of a family as the hub has it: parts that are not needed are named, but not there."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = {"hidden_act": "quick_gelu", "num_hidden_layers": 2} | family.text
    text |= {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "vocab_size": SMALL_VOCABULARY + len(family.words),
    }
    text |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    down = family.unet["down_block_types"]
    unet = {"sample_size": 8, "layers_per_block": 1, "cross_attention_dim": 32} | family.unet
    unet |= {"up_block_types": [name.replace("Down", "Up") for name in reversed(down)]}
    # heads of two numbers where their counts differ, of four elsewhere
    heads = unet["attention_head_dim"]
    unet |= {"block_out_channels": [2 * n for n in heads] if isinstance(heads, list) else [32] * len(down)}
    unet |= {"norm_num_groups": 5 if isinstance(heads, list) else 8}
    vae = {"sample_size": 512, "block_out_channels": [4, 4, 8, 8], "norm_num_groups": 2, "latent_channels": 4}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4} | family.vae

    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(**text)).save_pretrained(folder / "text_encoder")
    torch.manual_seed(0)
    UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
    torch.manual_seed(family.vae_seed)
    AutoencoderKL(**vae).save_pretrained(folder / "vae")
    # the old files have no other settings than these
    unet = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "in_channels": 4} | unet
    vae = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0"} | vae
    special = SPECIAL_TOKENS | {"pad_token": family.pad_token}
    tokenizer = {name: value for name, value in TOKENIZER.items() if name not in family.without}
    index = {
        "_class_name": family.pipeline,
        "_diffusers_version": "0.6.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", family.scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    files = {
        "model_index.json": index,
        "scheduler/scheduler_config.json": family.scheduler,
        "unet/config.json": unet,
        "vae/config.json": vae,
        "tokenizer/tokenizer_config.json": tokenizer,
        "tokenizer/special_tokens_map.json": special,
    }
    if family.words:
        files["tokenizer/added_tokens.json"] = {word: SMALL_VOCABULARY + i for i, word in enumerate(family.words)}
    write_small_vocabulary(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder
