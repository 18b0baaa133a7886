"""Stable Diffusion XL: what the trainer proves for 1.x and 2.x, once more where XL differs."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hub import Hub
from launching import ROOT, SECRET, finish, fork, fork_code, fork_script, run, start, train
from models import EMBEDDED
from observers import record_losses, record_tables
from PIL import Image
from reading import RARE, WEIGHTS, distance, load_weights, same_bits
from records import copy_result, only_bin
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import train_custom_diffusion as trainer

HF = Path(sys.executable).with_name("hf")
WORDS = ["<New1>", "<new2>"]
ROWS = {"<New1>": 42170, "<new2>": 47629}  # of ktn and pll, from which they start


@pytest.fixture(scope="module")
def common(two_real_concepts, sdxl):
    """Two concepts with class pictures, three of each a step; a step is nearly the gradient itself, not its sign."""
    return two_real_concepts | {
        "pretrained_model_name_or_path": sdxl,
        "train_batch_size": 3,
        "max_train_steps": 4,
        "learning_rate": 1,
        "adam_epsilon": 1,
    }


@pytest.fixture(scope="module")
def trained(common, sdxl_end, tmp_path_factory):
    """A run with the model that pools at the end token, and with pictures."""
    folder = tmp_path_factory.mktemp("xl") / "run"
    values = common | {"pretrained_model_name_or_path": sdxl_end, "checkpointing_steps": 2}
    values |= {"validation_prompt": "a <New1> cat and a <new2> pot", "num_validation_images": 1}
    finish(start(folder, observer=record_tables, **values), folder)
    return folder


def fresh(model):
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoders(pipeline):
    return [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]


def load_as_a_user(model, folder, suffix):
    """The documented way, with a call for each text encoder."""
    pipeline = fresh(model)
    pipeline.unet.load_attn_procs(str(folder), weight_name=f"{WEIGHTS}.{suffix}", _pipeline=pipeline)
    for word in WORDS:
        file = folder / f"{word}.{suffix}"
        table = load_file(file) if suffix == "safetensors" else torch.load(file, weights_only=True)
        for name, (tokenizer, encoder) in zip(("clip_l", "clip_g"), encoders(pipeline), strict=True):
            pipeline.load_textual_inversion(table[name], token=word, text_encoder=encoder, tokenizer=tokenizer)
    return pipeline


@torch.no_grad()
def prediction(pipeline, prompt):
    """The UNet's output for a prompt, encoded by diffusers, and fixed noise."""
    hidden, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return pipeline.unet(noise, torch.tensor([400]), hidden, added_cond_kwargs=conditions).sample


# The step


@torch.no_grad()
def loss_by_formula(model, batch, pools_at_the_word):
    """The contract's formulas around diffusers' networks, in which the new words have their first embeddings."""
    pipeline, n = fresh(model), len(batch["noise"])
    for tokenizer, encoder in encoders(pipeline):
        table = encoder.get_input_embeddings().weight
        for word, row in ROWS.items():
            pipeline.load_textual_inversion(table[row], token=word, text_encoder=encoder, tokenizer=tokenizer)
            table = encoder.get_input_embeddings().weight
    first = pipeline.text_encoder(batch["input_ids"], output_hidden_states=True).hidden_states[1:]
    second = pipeline.text_encoder_2(batch["input_ids_2"], output_hidden_states=True).hidden_states[1:]
    end = (batch["input_ids_2"] == 49407).int().argmax(1)
    if pools_at_the_word:
        end = torch.where((batch["input_ids_2"] > 49407).any(1), batch["input_ids_2"].argmax(1), end)
    second_model = pipeline.text_encoder_2
    norm = dict(second_model.named_modules())[
        next(name for name, _ in second_model.named_modules() if name.endswith("final_layer_norm"))
    ]
    pooled = second_model.text_projection(norm(second[-1])[torch.arange(n), end])
    colours, alpha = batch["pixels"][:, :3] / 127.5 - 1, batch["pixels"][:, 3:]
    posterior = pipeline.vae.encode(colours * (alpha == 255)).latent_dist
    latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * 0.13025
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[batch["timesteps"].numpy()]
    alphas = torch.tensor(alphas, dtype=torch.float32)[:, None, None, None]
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * batch["noise"]
    conditions = {"text_embeds": pooled, "time_ids": batch["time_ids"]}
    hidden = torch.cat([first[-2], second[-2]], -1)
    predicted = pipeline.unet(noisy, batch["timesteps"], hidden, added_cond_kwargs=conditions).sample
    error, half, mask = (predicted - batch["noise"]).square(), n // 2, batch["mask"]
    instance = [(error[i] * mask[i]).sum() / mask[i].sum() for i in range(half)]
    return float(sum(instance) / half + 0.3 * error[half:].mean())


@pytest.mark.parametrize("model", ["sdxl", "sdxl_end"])
def test_loss_of_real_networks(model, common, request, tmp_path):
    """Hidden states, pooled output at the place where transformers takes it, conditions, mask and prior loss."""
    values = {"pretrained_model_name_or_path": request.getfixturevalue(model), "learning_rate": 0}
    values |= {"prior_loss_weight": 0.3, "max_train_steps": 3}
    finish(start(tmp_path / "run", observer=record_losses, **common | values), tmp_path / "run")
    for batch in torch.load(tmp_path / "run.losses", weights_only=True):
        loss = batch.pop("loss").item()
        expected = loss_by_formula(values["pretrained_model_name_or_path"], batch, model == "sdxl")
        assert loss == pytest.approx(expected, rel=1e-4)


def test_conditions_are_those_of_each_sample(world, tmp_path):
    """A picture on a canvas: what inference uses. A window: the file's size and the place in the resized picture."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    (tmp_path / "large").mkdir()
    image = Image.open(world / "my_cat" / "1.png").resize((500, 300))  # is reduced before it is resized
    image.save(tmp_path / "large" / "1.png")
    words = [f"--instance_data_dir={tmp_path / 'large'}", "--instance_prompt=photo of a <new1> cat"]
    words += ["--pretrained_model_name_or_path=m", f"--output_dir={tmp_path / 'out'}", "--with_prior_preservation"]
    words += [f"--class_data_dir={world / 'cats'}", "--class_prompt=cat", "--real_prior"]
    draws = trainer.CustomDiffusionDataset(
        trainer.read_concepts(trainer.parse_args(words)),
        [tokenizer] * 2,
        [tokenizer] * 2,
        size=64,
        latent_shape=(4, 8, 8),
        num_train_timesteps=1000,
        seed=0,
        center_crop=False,
        hflip=False,
        alpha_mask=False,
        aug=True,
    )
    kinds = set()
    for n in range(60):
        for sample, file in zip(draws[n], (tmp_path / "large" / "1.png", None), strict=True):
            height, width, top, left, *target = sample["time_ids"].astype(int).tolist()
            assert target == [64, 64] and sample["time_ids"].shape == (6,)
            if file and (sample["pixels"][3] == 0).any():
                kinds.add("canvas")
                assert (height, width, top, left) == (64, 64, 0, 0)
            elif file and sample["mask"].all() and (height, width) != (64, 64):
                kinds.add("window")
                assert (height, width) == (300, 500)
                assert is_window(sample["pixels"], Image.open(file).convert("RGB"), (top, left), range(76, 90))
            elif not file:
                files = [Image.open(path).convert("RGB") for path in (world / "cats").glob("*.png")]
                files = [image for image in files if image.size == (width, height)]
                assert any(is_window(sample["pixels"], image, (top, left), [64]) for image in files)
    assert kinds == {"canvas", "window"}


def is_window(pixels, image, corner, scales):
    """Whether pixels lie at a corner (top, left) of an image at one of some scales of its shorter side."""
    (top, left), found = corner, pixels[:3].transpose(1, 2, 0).astype(float)
    for scale in scales:
        size = [round(side * scale / min(image.size)) for side in image.size]
        part = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + 64, top + 64))
        if np.abs(np.asarray(part, float) - found).mean() < 2:
            return True
    return False


# What is trained and kept


def test_both_words_train_in_both_encoders(trained, sdxl_end):
    """All other rows keep their bits."""
    base = [encoder.get_input_embeddings().weight for _, encoder in encoders(fresh(sdxl_end))]
    for word in WORDS:
        table = load_file(trained / f"{word}.safetensors")
        assert {name: tuple(row.shape) for name, row in table.items()} == {"clip_l": (1, 32), "clip_g": (1, 48)}
        for row, start_row in zip((table["clip_l"], table["clip_g"]), (t[ROWS[word]] for t in base), strict=True):
            assert 1e-6 < (row[0] - start_row).abs().max() < 1
    for found, expected in zip(torch.load(f"{trained}.tables", weights_only=True), base, strict=True):
        assert torch.equal(found, expected)


def test_loads_with_diffusers(trained, sdxl_end):
    """Both formats give the model into whose own layers and rows the numbers were copied by hand."""
    by_hand, prompt = fresh(sdxl_end), "photo of a {} cat"
    own = by_hand.unet.state_dict()
    for key, value in load_weights(trained).items():
        own[key.replace("processor.", "").replace("_custom_diffusion", "")].copy_(value)
    for name, (tokenizer, encoder) in zip(("clip_l", "clip_g"), encoders(by_hand), strict=True):
        row = tokenizer.convert_tokens_to_ids(f"{RARE}</w>")
        encoder.get_input_embeddings().weight.data[row] = load_file(trained / "<New1>.safetensors")[name][0]
    expected = prediction(by_hand, prompt.format(RARE))
    assert (expected - prediction(fresh(sdxl_end), prompt.format(RARE))).abs().max() > 1e-3
    for suffix in ("safetensors", "bin"):
        found = prediction(load_as_a_user(sdxl_end, trained, suffix), prompt.format("<New1>"))
        assert (found - expected).abs().max() < 1e-4, suffix


def test_printed_lines_make_a_picture(trained, tmp_path):
    """As they stand, but for fewer steps."""
    code = trained.with_name("run.log").read_text().split("To use it:\n\n")[1].split("'picture.png')")[0]
    code = code.replace("num_inference_steps=100", "num_inference_steps=2") + "'picture.png')"
    fork_code(code, cwd=tmp_path)
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    assert "--resolution 1024" in trained.with_name("run.log").read_text()
    assert Image.open(trained / "before_after.png").height > 2 * 64


@pytest.mark.parametrize("word", ["it's", 'the_"one"', "[cat]*"])
def test_printed_lines_of_a_word_with_quotes_or_brackets(word, common, tmp_path):
    values = {"concepts_list": None, "instance_data_dir": EMBEDDED.parent / "instance" / "cat", "class_prompt": "cat"}
    values |= {"instance_prompt": f"photo of a {word} cat", "modifier_token": word, "with_prior_preservation": None}
    values |= {"real_prior": None, "max_train_steps": 1}
    said = finish(start(tmp_path / "run", **common | values), tmp_path / "run")
    code = said.split("To use it:\n\n")[1].split("image = ")[0]
    code += "print(len(pipeline.tokenizer), pipeline.tokenizer_2.convert_ids_to_tokens(49408))"
    assert fork_code(code).stdout.splitlines()[-1] == f"49409 {word}"


@pytest.mark.slow
def test_hub(common, sdxl_end, tmp_path):
    """From a base model of the hub to a card whose lines make a picture."""
    with Hub() as hub:
        process = run(HF, "upload", "tester/tiny-xl", sdxl_end, env=hub.environment(HF_TOKEN=SECRET))
        assert process.returncode == 0, process.stderr
        values = common | {"pretrained_model_name_or_path": "tester/tiny-xl", "max_train_steps": 1}
        values |= {"push_to_hub": True, "hub_token": SECRET, "hub_model_id": "tester/xl-cat"}
        train(tmp_path / "run", env=hub.environment(), **values | {"learning_rate": 1e-3})
        card = hub.files("tester/xl-cat")["README.md"].decode()
        assert "license:" not in card and "- stable-diffusion-xl\n" in card
        code = card.split("```python\n")[1].split("```")[0].replace("=100", "=2")
        env = hub.environment(HF_HOME=str(tmp_path / "home"))
        process = run(sys.executable, "-c", code, cwd=tmp_path, env=env)
        assert process.returncode == 0, process.stderr[-2000:]
        assert (tmp_path / "picture.png").is_file() and hub.unknown == []


# The same training in other ways


@pytest.fixture(scope="module")
def straight(common, tmp_path_factory):
    """The weights of a run in one go, of the model that pools at the new word."""
    return load_trained_xl(fork(tmp_path_factory.mktemp("straight") / "run", **common))


def load_trained_xl(folder):
    """Everything that a run trained, by unique names."""
    found = load_weights(folder)
    for word in WORDS:
        found |= {f"{word} {name}": row for name, row in load_file(folder / f"{word}.safetensors").items()}
    return found


def test_resumes_to_the_bit(straight, common, tmp_path):
    fork(tmp_path / "run", **common | {"max_train_steps": 2, "checkpointing_steps": 2})
    fork(tmp_path / "run", **common | {"resume_from_checkpoint": "latest", "dataloader_num_workers": 2})
    assert same_bits(load_trained_xl(tmp_path / "run"), straight)


WAYS = {
    "processes": {"processes": 3, "train_batch_size": 1},
    "accumulation": {"gradient_accumulation_steps": 3, "train_batch_size": 1},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_equals_one_process(way, straight, common, sdxl, tmp_path):
    """Up to the order of sums."""
    found = load_trained_xl(fork(tmp_path / "run", **common | WAYS[way]))
    base = fresh(sdxl)
    start = {f"{w} {n}": e.get_input_embeddings().weight[[ROWS[w]]].detach()
             for w in WORDS for n, (_, e) in zip(("clip_l", "clip_g"), encoders(base), strict=True)}  # fmt: skip
    own = base.unet.state_dict()
    start |= {k: own[k.replace("processor.", "").replace("_custom_diffusion", "")] for k in straight if "proc" in k}
    assert distance(found, straight) < 0.01 * distance(straight, start)


def test_everything_else_together(common, tmp_path):
    """Class pictures are generated, bf16, cached latents, crossattn: the run's own proof of the reload holds."""
    values = {"concepts_list": None, "modifier_token": "<New1>", "instance_prompt": "a <New1> cat", "real_prior": None}
    values |= {"instance_data_dir": tmp_path / "cat", "class_data_dir": tmp_path / "generated", "class_prompt": "cat"}
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (90, 70), "red").save(tmp_path / "cat" / "0.png")
    values |= {"num_class_images": 2, "mixed_precision": "bf16", "cache_latents": 2, "freeze_model": "crossattn"}
    fork(tmp_path / "run", **common | values | {"max_train_steps": 1, "validation_prompt": "a <New1> cat"})
    assert len(list((tmp_path / "generated").iterdir())) == 2 and (tmp_path / "run" / "image_0.png").is_file()


# Companions


def companion(name, *words):
    """Runs a script of scripts/ as a user does; returns what it printed."""
    process = fork_script(ROOT / "scripts" / name, *words)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def load_words(pipeline, folder):
    """Loads the embeddings that export.py wrote, under the trained names."""
    for word in WORDS:
        table = load_file(folder / f"{word.strip('<>')}.safetensors")
        for name, (tokenizer, encoder) in zip(("clip_l", "clip_g"), encoders(pipeline), strict=True):
            pipeline.load_textual_inversion(table[name], token=word, text_encoder=encoder, tokenizer=tokenizer)
    return pipeline


def test_exported(trained, sdxl_end, tmp_path):
    """A LoRA of full rank and a merged model predict as trained; their metadata say SDXL."""
    prompt = "photo of a <New1> cat and a <new2> pot"
    expected, words = prediction(load_as_a_user(sdxl_end, trained, "bin"), prompt), [trained]
    words += ["--pretrained_model_name_or_path", sdxl_end, "--dtype", "fp32"]
    companion("export.py", *words, "--output", tmp_path / "cat.safetensors", "--rank", "64")
    lora = load_words(fresh(sdxl_end), tmp_path)
    lora.load_lora_weights(tmp_path, weight_name="cat.safetensors")
    assert (prediction(lora, prompt) - expected).abs().max() < 1e-4
    for name in ("cat", "New1"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as content:
            assert content.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
            assert content.metadata()["modelspec.architecture"].startswith("stable-diffusion-xl-v1-base/")
    companion("export.py", *words, "--output", tmp_path / "model", "--format", "model")
    assert (prediction(fresh(tmp_path / "model"), prompt) - expected).abs().max() < 1e-5
    companion("export.py", *words, "--output", tmp_path / "plain", "--format", "model", "--keep_vocabulary")
    assert (prediction(load_words(fresh(tmp_path / "plain"), tmp_path / "plain"), prompt) - expected).abs().max() < 1e-5


def test_kept_apart(trained, sdxl_end, tmp_path):
    """merge.py's weights solve the least squares on both encoders' features; its result loads and is taken again."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import merge as script

    captions = ["a red fish on the beach", "two dogs", "a house at night"]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    words = ["--pretrained_model_name_or_path", sdxl_end, "--captions", tmp_path / "captions.txt", "--ridge", "1e-3"]
    companion("merge.py", trained, *words, "--output_dir", tmp_path / "run")
    pipeline = load_as_a_user(sdxl_end, trained, "bin")

    @torch.no_grad()
    def features(prompts, first):
        found = []
        for prompt in prompts:
            hidden, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
            end = pipeline.tokenizer(prompt).input_ids.index(49407)
            found.append(hidden[0, first : end + 11].double().numpy())
        return np.concatenate(found)

    templates = script.TEMPLATES.read_text().splitlines()
    parts = [(features(captions, 0), 1, 0)]
    for word, kind in zip(WORDS, ("cat", "pot"), strict=True):
        parts.append((features([text.format(kind) for text in templates], 0), 4, 0))
        parts.append((features([text.format(f"{word} {kind}") for text in templates], 1), 10, 1))
    base, weights = fresh(sdxl_end).unet.state_dict(), load_weights(trained)
    found = load_weights(tmp_path / "run")
    for key in sorted(found)[:3]:
        own = base[key.replace("processor.", "").replace("_custom_diffusion", "")].double().numpy()
        change = weights[key].double().numpy() - own
        ridge = (1e-3 * np.square(parts[0][0]).mean()) ** 0.5
        rows, values = [np.eye(80) * ridge], [np.zeros((80, len(own)))]
        for part, weight, wanted in parts:
            rows.append((weight / len(part)) ** 0.5 * part)
            values.append((weight / len(part)) ** 0.5 * part @ change.T * wanted)
        solution = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)[0].T
        assert np.abs(found[key].numpy() - own - solution).max() < 1e-4 * np.abs(solution).max(), key
    load_as_a_user(sdxl_end, tmp_path / "run", "safetensors")
    companion("merge.py", tmp_path / "run", *words, "--output_dir", tmp_path / "again")


def test_result_in_bin_alone(trained, tmp_path):
    """Both embeddings of a word, in the order of the text encoders, are those of the .safetensors."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import results

    both, bare = copy_result(trained, tmp_path / "both"), only_bin(copy_result(trained, tmp_path / "bare"))
    expected, found = results.read_result(str(both)), results.read_result(str(bare))
    assert list(expected.words) == WORDS and sorted(found.words) == sorted(WORDS)
    assert same_bits(found.weights, expected.weights)
    for word, rows in expected.words.items():
        assert list(rows) == list(found.words[word]) == ["clip_l", "clip_g"]
        assert same_bits(rows, found.words[word])


# The VAE, memory, and what is refused


def args_of(model, *words):
    """The arguments of a run with this model, as `main` completes them."""
    needed = [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=d", "--instance_prompt=p"]
    return trainer.find_base(trainer.parse_args([*needed, *words]))


@pytest.mark.parametrize("model, force_upcast, dtype", [
    ("sdxl", True, torch.float32), ("sdxl", False, torch.float16), ("sd1", True, torch.float16),
])  # fmt: skip
def test_vae_of_fp16(model, force_upcast, dtype, request):
    """XL's overflows in fp16 unless its configuration says otherwise."""
    args = args_of(request.getfixturevalue(model), "--resolution=64")
    pipeline = trainer.load_pipeline(args, trainer.load_tokenizers(args), torch.float16)
    pipeline.vae.register_to_config(force_upcast=force_upcast)
    accelerator = SimpleNamespace(mixed_precision="fp16", device=torch.device("cpu"))
    none = [[]] * len(trainer.text_parts(pipeline))
    trainer.build_models(args, accelerator, pipeline, none, none)
    assert pipeline.vae.dtype == dtype and pipeline.unet.conv_in.weight.dtype == torch.float16


def test_broken_part_is_not_the_other_tokenizers(sdxl, tmp_path):
    """--tokenizer_name is fine; the model's second text encoder is not."""
    model = shutil.copytree(sdxl, tmp_path / "model")
    (model / "text_encoder_2" / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="error: --pretrained_model_name_or_path .*complete model"):
        trainer.load_tokenizers(args_of(model, f"--tokenizer_name={sdxl / 'tokenizer'}"))


def test_refiner_is_refused(sdxl, tmp_path):
    """A pipeline with only the second text encoder."""
    folder = tmp_path / "refiner"
    folder.mkdir()
    index = (sdxl / "model_index.json").read_text()
    index = re.sub(r'("text_encoder": )\[[^]]*\]', r"\1[null, null]", index)
    (folder / "model_index.json").write_text(index)
    with pytest.raises(SystemExit, match="give a Stable Diffusion 1.x, 2.x or XL"):
        trainer.load_tokenizers(args_of(folder))
