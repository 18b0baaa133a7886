"""--push_to_hub and base models from the hub, against a hub on loopback."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import (
    ROOT,
    SCRIPT,
    SECRET,
    SECRETS,
    WEIGHTS,
    flags,
    load_trained,
    run,
    same_bits,
    secrets_in,
    train,
)
from hub import Hub

HF = Path(sys.executable).with_name("hf")
BASE, REPOSITORY = "tester/tiny-sd", "tester/my-cat"
PROMPT = """a "<new1>" cat: 'naïve' #1 \N{CAT FACE} {x}"""
INSTANCE_PROMPT = """- "photo": a <new1> cat's \N{CAT FACE} #1"""
RESULT = {f"{name}.{ending}" for name in (WEIGHTS, "<new1>") for ending in ("safetensors", "bin")}


@pytest.fixture(scope="module")
def pushed(sd1, one_concept, tmp_path_factory):
    """A run with a base model of the hub, pushed into a repository that is there already: the hub and the folder."""
    folder = tmp_path_factory.mktemp("pushed")
    out, old = folder / "my-cat", folder / "old"
    for file in ("old/README.md", "old/<new1>.bin", "old/notes.md", "my-cat/train.log", "my-cat/wandb/run/logs.bin"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"\0of an earlier run" if file.endswith("bin") else b"of an earlier run")
    (out / ".<old>.bin.unfinished").write_bytes(b"left by a run that was killed")
    with Hub() as hub:
        for repository, files in ((BASE, sd1), (REPOSITORY, old)):
            process = run(HF, "upload", repository, files, env=hub.environment(HF_TOKEN=SECRET))
            assert process.returncode == 0, process.stderr
        values = {"pretrained_model_name_or_path": BASE, "revision": "main"}
        values |= {"instance_prompt": INSTANCE_PROMPT, "validation_prompt": PROMPT}
        train(
            out,
            env=hub.environment(),
            push_to_hub=True,
            hub_token=SECRET,
            checkpointing_steps=1,
            report_to="tensorboard",
            **one_concept | values,
        )
        yield hub, out
        assert hub.unknown == []


def card_of(content):
    """Metadata and text of a model card."""
    _, metadata, text = content.decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_uploads_the_result_alone(pushed):
    """Weights, embeddings, final pictures and card, as they are on the disk; what else lies there stays there."""
    hub, out = pushed
    files = hub.files(REPOSITORY)
    assert files.pop("notes.md") == b"of an earlier run"  # what was in the repository stays
    pictures = {"image_0.png", "image_1.png", "before_after.png", "steps.png"}
    assert files.keys() == RESULT | {"README.md"} | pictures
    assert all(content == (out / name).read_bytes() for name, content in files.items())
    assert hub.writers == {SECRET} and not any(SECRET.encode() in content for content in files.values())
    assert f"Uploaded to {hub.url}/{REPOSITORY}\n" in (out / "stdout.txt").read_text()
    assert len(hub.repositories[REPOSITORY]) == 3  # made, the old files, the result


def test_model_card(pushed):
    hub, out = pushed
    metadata, text = card_of(hub.files(REPOSITORY)["README.md"])
    assert metadata["license"] == "creativeml-openrail-m" and metadata["base_model"] == BASE
    assert metadata["instance_prompt"] == INSTANCE_PROMPT
    assert set(metadata["tags"]) == {"text-to-image", "diffusers", "stable-diffusion", "custom-diffusion"}
    names = ["image_0.png", "image_1.png"]
    assert metadata["widget"] == [{"text": PROMPT, "output": {"url": name}} for name in names]
    assert f"`{PROMPT}`:\n\n![](./image_0.png) ![](./image_1.png)" in text
    assert f"`{BASE}`, trained on pictures of `{INSTANCE_PROMPT}`." in text


USER = """
import sys, torch
from diffusers import DiffusionPipeline
from huggingface_hub.repocard import RepoCard
from train_custom_diffusion import attention_state_dict

repository, folder, base = sys.argv[1:]
assert RepoCard.load(repository).data.to_dict()["base_model"] == base
probe = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

def use(name, ending):
    pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    if name:
        weights = "pytorch_custom_diffusion_weights." + ending
        pipeline.unet.load_attn_procs(name, weight_name=weights, _pipeline=pipeline)
        pipeline.load_textual_inversion(name, weight_name="<new1>." + ending)
    settings = {"num_inference_steps": 3, "guidance_scale": 6.0, "eta": 1.0, "output_type": "np", "latents": latents}
    image = pipeline("a <new1> cat", generator=torch.Generator().manual_seed(0), **settings).images
    row = pipeline.text_encoder.get_input_embeddings().weight[-1].detach()
    return attention_state_dict(pipeline.unet) | {"<new1>": row, "image": torch.from_numpy(image)}

ways = [(name, ending) for name in (repository, folder) for ending in ("safetensors", "bin")]
torch.save([use(*way) for way in [*ways, (None, None)]], "used.pt")
"""


def test_loads_from_the_hub(pushed, tmp_path):
    """As in the guide, with no token and nothing cached: from the card to a picture, the same as from the folder."""
    import torch

    hub, out = pushed
    env = hub.environment(HF_HOME=str(tmp_path / "home"), PYTHONPATH=str(ROOT))
    process = run(sys.executable, "-c", USER, REPOSITORY, out, BASE, cwd=tmp_path, env=env)
    assert process.returncode == 0, process.stderr
    *used, plain = torch.load(tmp_path / "used.pt", weights_only=True)
    pictures = [one.pop("image") for one in used]
    trained = load_trained(out)
    assert len(trained) > 2 and all(same_bits(one, trained) for one in used)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    assert (pictures[0] - plain["image"]).abs().max() > 0.01


LOOK = """
from train_custom_diffusion import attention_state_dict
row = pipeline.text_encoder.get_input_embeddings().weight[-1].detach()
torch.save(attention_state_dict(pipeline.unet) | {"<new1>": row}, "used.pt")
"""


def test_snippet_of_the_card_works(pushed, tmp_path):
    """Pasted as it is; only the 100 steps are fewer here."""
    import torch

    hub, out = pushed
    _, text = card_of(hub.files(REPOSITORY)["README.md"])
    snippet = text.split("```python\n")[1].split("```")[0]
    assert f"from_pretrained('{BASE}', revision='main')" in snippet and f"pipeline({PROMPT!r}, " in snippet
    env = hub.environment(HF_HOME=str(tmp_path / "home"), PYTHONPATH=str(ROOT))
    process = run(sys.executable, "-c", snippet.replace("=100", "=2") + LOOK, cwd=tmp_path, env=env)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "picture.png").is_file()
    assert same_bits(torch.load(tmp_path / "used.pt", weights_only=True), load_trained(out))


def test_failed_upload(two_real_concepts, sd1, tmp_path):
    """All but the upload is done, and the answer, which repeats the token, is told without it.

    The command that the error names then uploads the result, and that alone.
    """
    out = tmp_path / "my out"
    folders = {name: str(tmp_path / name) for name in ("HF_HOME", "TMPDIR")}
    (tmp_path / "TMPDIR").mkdir()
    values = {"push_to_hub": True, "hub_token": SECRET, "report_to": "tensorboard"}
    values |= {"resolution": 64, "max_train_steps": 1, "checkpointing_steps": 1, "hub_model_id": "my-things"}
    with Hub(refused="/commit/") as hub:
        words = flags(**two_real_concepts | values, output_dir=out)
        process = run(sys.executable, SCRIPT, *words, env=hub.environment(**SECRETS, **folders))
        assert process.returncode == 1 and "Traceback" not in process.stderr
        assert "no to Bearer ***, see" in process.stderr and "token=***" in process.stderr
        assert all((out / name).exists() for name in (f"{WEIGHTS}.safetensors", "checkpoint-1", "logs"))
        assert secrets_in(tmp_path, process.stdout, process.stderr) == []
        assert hub.files("tester/my-things") == {} and hub.asked.count("POST /api/repos/create") == 1

        hub.refused = "$^"
        (error,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
        command = error.partition("; later: ")[2]
        assert shlex.split(command)[:4] == ["hf", "upload", "tester/my-things", str(out)]
        env = hub.environment(**SECRETS, **folders, PATH=f"{HF.parent}:/usr/bin:/bin")
        subprocess.run(command, shell=True, env=env, cwd=tmp_path, check=True, capture_output=True)
        files = hub.files("tester/my-things")
        names = {f"{name}.{ending}" for name in (WEIGHTS, "<New1>", "<new2>") for ending in ("safetensors", "bin")}
        assert files.keys() == names | {"README.md"}
        assert all(content == (out / name).read_bytes() for name, content in files.items())

        # a base model that is a folder is none for the hub; the text names it
        metadata, text = card_of(files["README.md"])
        assert "base_model" not in metadata and "widget" not in metadata and f"`{sd1}`" in text
        assert metadata["instance_prompt"] == "photo of a <New1> cat, photo of a <new2> pot"
        assert "`photo of a <New1> cat`, `photo of a <new2> pot`" in text and "image_" not in text
        assert "pipeline('photo of a <New1> cat', " in text
        assert hub.unknown == []


NOTEBOOK = """
import json, sys, traceback
from train_custom_diffusion import main, parse_args
for call in json.loads(sys.stdin.read()):
    try:
        main(parse_args(call))
    except SystemExit:
        print(traceback.format_exc())
"""


def test_refused_repository(one_concept, tmp_path):
    """Told before training, and the token is in no exception; so if the token is in the environment, too."""
    values = one_concept | {"push_to_hub": True, "output_dir": tmp_path / "out", "resolution": 64, "report_to": "none"}
    ways = [{"hub_token": token, "hub_model_id": "my-cat"} for token in (SECRET, None, "hf_wrong")]
    calls = [flags(**values | way) for way in [*ways, {"hub_model_id": "my cat"}]]
    with Hub(refused="/api/repos/create") as hub:
        env = hub.environment(HF_TOKEN=SECRETS["HF_TOKEN"], PYTHONPATH=str(ROOT))
        process = run(sys.executable, "-c", NOTEBOOK, input=json.dumps(calls), env=env)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("error: --push_to_hub my-cat: ") == 3
    assert process.stdout.count("no to Bearer ***") == 2  # and the third token is no one's
    assert "Invalid credentials in Authorization header; see to" in process.stdout
    assert "error: --push_to_hub my cat: Repo id must" in process.stdout
    assert "Training" not in process.stdout and not (tmp_path / "out").exists()
    assert secrets_in(process.stdout, process.stderr) == []


def test_unreachable_hub_stops_before_training(one_concept, tmp_path):
    with Hub() as hub:
        env = hub.environment(HF_ENDPOINT="http://127.0.0.1:9")
    values = one_concept | {"push_to_hub": True, "hub_model_id": "my-cat", "hub_token": SECRET}
    words = flags(**values, output_dir=tmp_path / "out", resolution=64, max_train_steps=1, report_to="none")
    process = run(sys.executable, SCRIPT, *words, env=env)
    assert process.returncode == 1 and "--push_to_hub my-cat" in process.stderr
    assert "Traceback" not in process.stderr and "Training" not in process.stdout
