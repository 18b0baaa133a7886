"""The command line: help, defaults and booleans. What is wrong is in test_bad_input.py."""

import sys
import time

import pytest
from conftest import SCRIPT, flags, run

from train_custom_diffusion import parse_args

HEAVY = ("torch", "diffusers", "transformers", "accelerate")


def imported(stderr):
    """Top-level modules that `python -X importtime` reports."""
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in stderr.splitlines() if "import time" in line}


def test_help_is_quick():
    """Under a second; the best of five, so that a busy machine does not matter."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert run(sys.executable, SCRIPT, "--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 1


@pytest.mark.parametrize("words, status", [(["--help"], 0), (["--resolution=zero"], 2)])
def test_answers_before_heavy_imports(words, status):
    process = run(sys.executable, "-X", "importtime", SCRIPT, *words)
    assert process.returncode == status
    modules = imported(process.stderr)
    assert "argparse" in modules and not modules & set(HEAVY)


def test_data_errors_come_before_heavy_imports(tmp_path):
    words = flags(pretrained_model_name_or_path="m", instance_data_dir=tmp_path / "no", instance_prompt="a cat")
    process = run(sys.executable, "-X", "importtime", SCRIPT, *words)
    assert process.returncode == 1 and "error: instance_data_dir" in process.stderr
    assert not imported(process.stderr) & set(HEAVY)


def test_help_names_every_flag():
    """Every flag of the contract."""
    names = """pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir instance_prompt
        class_data_dir class_prompt concepts_list modifier_token initializer_token freeze_model
        with_prior_preservation prior_loss_weight num_class_images real_prior prior_generation_precision
        sample_batch_size resolution center_crop hflip noaug train_batch_size gradient_accumulation_steps
        num_train_epochs max_train_steps learning_rate scale_lr lr_scheduler lr_warmup_steps adam_beta1 adam_beta2
        adam_weight_decay adam_epsilon use_8bit_adam max_grad_norm mixed_precision allow_tf32 gradient_checkpointing
        enable_xformers_memory_efficient_attention set_grads_to_none
        dataloader_num_workers local_rank seed output_dir logging_dir report_to validation_prompt num_validation_images
        validation_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint push_to_hub hub_token
        hub_model_id no_safe_serialization"""
    text = run(sys.executable, SCRIPT, "--help").stdout
    assert [name for name in names.split() if f"--{name}" not in text] == []


NEEDED = ["--pretrained_model_name_or_path=m", "--instance_data_dir=cat", "--instance_prompt=a <new1> cat"]


def test_defaults():
    args = parse_args(NEEDED)
    expected = {
        "initializer_token": "ktn+pll+ucd", "freeze_model": "crossattn_kv", "prior_loss_weight": 1.0,
        "num_class_images": 200, "sample_batch_size": 4, "resolution": 512, "train_batch_size": 4,
        "gradient_accumulation_steps": 1, "num_train_epochs": 1, "max_train_steps": None, "learning_rate": 1e-5,
        "lr_scheduler": "constant", "lr_warmup_steps": 500, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "dataloader_num_workers": 2,
        "local_rank": -1, "seed": 42, "output_dir": "custom-diffusion-model", "logging_dir": "logs",
        "report_to": "tensorboard", "num_validation_images": 2, "validation_steps": 50, "checkpointing_steps": 250,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    optional = ("revision", "variant", "mixed_precision", "validation_prompt", "hub_token", "hub_model_id")
    assert all(getattr(args, name) is None for name in optional)


BOOLEANS = """with_prior_preservation real_prior center_crop hflip noaug scale_lr use_8bit_adam allow_tf32
    gradient_checkpointing enable_xformers_memory_efficient_attention set_grads_to_none push_to_hub
    no_safe_serialization"""


@pytest.mark.parametrize("name", BOOLEANS.split())
def test_booleans(name):
    """Off by default, bare, =True and =False."""
    around = [*NEEDED, "--class_data_dir=c", "--class_prompt=cat"]
    around += ["--with_prior_preservation"] if name == "real_prior" else []
    assert getattr(parse_args(around), name) is False
    for words, value in ((f"--{name}", True), (f"--{name}=True", True), (f"--{name}=False", False)):
        assert getattr(parse_args([*around, words]), name) is value
    assert getattr(parse_args([*around, f"--{name}", "--seed=3"]), name) is True
