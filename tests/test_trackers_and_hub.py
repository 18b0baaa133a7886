"""What the trackers and the hub are told, and trackers and hubs that can't be reached.

One run of two processes reports to all trackers, without a network; the configuration that it logged is enough to
repeat it. --push_to_hub and base models from the hub run against a hub on loopback (hub.py).
"""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import yaml
from hub import Hub
from launching import (
    FAST,
    ROOT,
    SCRIPT,
    SECRET,
    SECRETS,
    flags,
    fork,
    in_one_process,
    run,
    secrets_in,
    train,
)
from packaging.version import Version
from PIL import Image
from reading import WEIGHTS, load_trained, same_bits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record

from train_custom_diffusion import parse_args

# Trackers, read back from what the real ones write without a network


STEPS, VALIDATED = [1, 2, 3, 4], [0, 2, 4]
NO_FLAGS = {"num_processes", "accelerate_version", "diffusers_version", "torch_version", "transformers_version"}
OFFLINE = {"WANDB_MODE": "offline", "COMET_START_ONLINE": "False"}
COMET_OFFLINE = Version(accelerate.__version__) >= Version("1.6")  # before, its tracker knew no offline experiments


@pytest.fixture(scope="module")
def tracked(one_real_concept, tmp_path_factory):
    """Two processes that report to all trackers; the precision is accelerate's to say."""
    folder = tmp_path_factory.mktemp("tracked")
    values = {
        "report_to": "all",
        "max_train_steps": 4,
        "validation_prompt": "a <new1> cat in a bucket",
        "validation_steps": 2,
        "scale_lr": True,
        "learning_rate": 2.5e-3,
    }
    env = os.environ | SECRETS | OFFLINE | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    env["COMET_OFFLINE_DIRECTORY"] = str(folder / "run" / "logs")
    if not COMET_OFFLINE:  # it is not there, then
        (folder / "sitecustomize.py").write_text("import sys\nsys.modules['comet_ml'] = None\n")
        env["PYTHONPATH"] = str(folder)
    return train(folder / "run", launcher="torchrun", cwd=folder, env=env, **one_real_concept | values)


@pytest.fixture(scope="module")
def config(tracked):
    """What tensorboard's tracker was told of the run."""
    (file,) = (tracked / "logs").rglob("hparams.yml")
    return yaml.safe_load(file.read_text())


def check_scalars(loss, lr):
    """Pairs of a step and its value: each step once and in order, the learning rate scaled."""
    assert [step for step, _ in loss] == [step for step, _ in lr] == STEPS
    assert all(0 < value < 100 for _, value in loss)
    # 0.0025 x accumulation 1 x batch 1 x processes 2 x 2 for prior preservation
    assert [value for _, value in lr] == pytest.approx([0.01] * 4, rel=1e-6)


def check_pictures(folder, pictures):
    """{name: {step: pictures from left to right}} against the rows of the sheets in output_dir/validation."""
    tops = {"validation": 16 + 16, "validation_plain": 16 + 16 + 64 + 16}  # below lines of text
    assert pictures.keys() == tops.keys()
    for name, top in tops.items():
        assert sorted(pictures[name]) == VALIDATED
        for step, images in pictures[name].items():
            sheet = np.asarray(Image.open(folder / "validation" / f"step-{step:06d}.png"))
            found = np.concatenate([np.asarray(image.convert("RGB")) for image in images], 1)
            assert np.array_equal(found, sheet[top : top + 64]), (name, step)


def test_tensorboard(tracked, config):
    main, hparams = sorted((tracked / "logs").rglob("events.out.tfevents.*"), key=lambda file: len(file.parts))
    log = EventAccumulator(str(main), size_guidance={"scalars": 0, "images": 0}).Reload()
    check_scalars(*([(event.step, event.value) for event in log.Scalars(tag)] for tag in ("loss", "lr")))
    pictures = {}
    for name in log.Tags()["images"]:
        events = log.Images(name)
        pictures[name] = {e.step: [Image.open(io.BytesIO(e.encoded_image_string))] for e in events}
    check_pictures(tracked, pictures)
    content = EventAccumulator(str(hparams)).Reload().PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()} == config


def wandb_records(file):
    """Records of a .wandb file: blocks of 32 KiB of pieces, each after 7 bytes of checksum, length and kind."""
    content, place, record = file.read_bytes(), 7, b""  # after the file's own 7 bytes
    while place < len(content):
        if 2**15 - place % 2**15 < 7:  # no room for a piece: the block's padding
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record, place = record + content[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def wandb_values(items):
    """Their keys, joined by a dot where nested, and values."""
    return {".".join([*item.nested_key] or [item.key]): json.loads(item.value_json) for item in items}


def test_wandb(tracked, config):
    """One run, of the main process; nothing that was logged for a step came too late for it."""
    (folder,) = tracked.glob("wandb/offline-run-*")
    (file,) = folder.glob("*.wandb")
    records = list(wandb_records(file))
    settings = wandb_values(item for record in records for item in record.config.update)
    assert {name: value for name, value in settings.items() if not name.startswith("_wandb")} == config
    rows = [wandb_values(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [row["_step"] for row in rows] == [0, *STEPS]
    check_scalars(*([(row["_step"], row[tag]) for row in rows if tag in row] for tag in ("loss", "lr")))
    pictures = {}
    for row in rows:
        for key in [key for key in row if key.endswith(".filenames")]:
            images = [Image.open(folder / "files" / name) for name in row[key]]
            pictures.setdefault(key.removesuffix(".filenames"), {})[row["_step"]] = images
    check_pictures(tracked, pictures)


def scalars_of(folder):
    """The steps of each of tensorboard's curves, as tensorboard shows them."""
    log = EventAccumulator(str(folder / "logs" / "custom-diffusion"), size_guidance={"scalars": 0}).Reload()
    return [[event.step for event in log.Scalars(tag)] for tag in ("loss", "lr")]


def test_trackers_of_a_resumed_run(one_concept, tmp_path):
    """It goes on in the same run, and each step is there once, although the first run got further than its checkpoint.

    A new run in the folder hides the old one's curve.
    """
    folder = tmp_path / "run"
    values = one_concept | {"report_to": "all", "checkpointing_steps": 2, "env": SECRETS | OFFLINE}
    values["env"] |= {"COMET_OFFLINE_DIRECTORY": str(folder)}
    if not COMET_OFFLINE:
        values["report_to"] = "tensorboard"
    fork(folder, max_train_steps=3, **values)
    words = [f"@{folder / 'flags.txt'}"]  # which it writes anew
    values = {name: values[name] for name in ("env", "report_to")}
    fork(folder, before=words, max_train_steps=5, resume_from_checkpoint="latest", **values)
    written = (folder / "flags.txt").read_text()
    assert "\n--max_train_steps=5\n" in written and "--resume" not in written
    assert scalars_of(folder) == [[1, 2, 3, 4, 5]] * 2
    if COMET_OFFLINE:
        names = {
            re.fullmatch(r"offline-run-\d+_\d+-(\w+)", path.name)[1] for path in folder.glob("wandb/offline-run-*")
        }
        record = json.loads((folder / "checkpoint-4" / "checkpoint.json").read_text())
        assert names == {record["wandb_id"]} and len(list(folder.glob("wandb/offline-run-*"))) == 2
    fork(folder, max_train_steps=2, **one_concept | values | {"report_to": "tensorboard"})
    assert scalars_of(folder) == [[1, 2]] * 2


@pytest.mark.skipif(not COMET_OFFLINE, reason="needs accelerate 1.6")
def test_comet_ml(tracked):
    """Loss and learning rate, in one archive of the main process."""
    (file,) = (tracked / "logs").glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    found = {
        name: [(m["step"], m["metricValue"]) for m in metrics if m["metricName"] == name] for name in ("loss", "lr")
    }
    check_scalars(found["loss"], found["lr"])


def test_no_tracker_is_told_a_secret(tracked):
    """Keys of the environment, in the files and in what is packed into comet_ml's archive."""
    assert secrets_in(tracked) == []
    archives = list(tracked.rglob("*.zip"))
    assert len(archives) == COMET_OFFLINE
    for file in archives:
        with zipfile.ZipFile(file) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        assert contents
        for secret in SECRETS.values():
            assert [name for name, content in contents.items() if secret.encode() in content] == []


def test_flags_repeat_the_run(tracked, config, tmp_path):
    """flags.txt gives the same bits and says what the trackers say. Without a tracker there is nothing of one."""
    assert config["mixed_precision"] == "bf16" and "hub_token" not in config and None not in config.values()
    values = {name: value for name, value in config.items() if name not in NO_FLAGS}
    assert len(values) == len(config) - len(NO_FLAGS)
    repeated = vars(parse_args([f"@{tracked}/flags.txt"]))
    assert repeated.pop("validation_prompt") == [values.pop("validation_prompt")]
    assert {name: value for name, value in repeated.items() if value is not None} == values
    written = (tracked / "flags.txt").read_text()
    for name in ("accelerate", "diffusers", "torch", "transformers"):
        assert f"{name} {config[f'{name}_version']}" in written
    # in a working folder where trackers might leave something, too
    words = {"before": [f"@{tracked}/flags.txt"], "report_to": "none", "cwd": tmp_path}
    fork(tmp_path / "run", processes=config["num_processes"], **words)
    assert same_bits(load_trained(tmp_path / "run"), load_trained(tracked))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.log0", "run.log1"}
    left = {path.name for path in tracked.iterdir()} - {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"logs", "wandb", "stdout.txt", "stderr.txt"}


CASES = {  # --report_to, words of the error
    "wandb without a login": ("wandb", ["wandb", "WANDB_MODE=offline"]),
    "tensorboard without a folder": ("tensorboard", ["run/logs"]),
}


@pytest.mark.parametrize("case", CASES)
def test_tracker_that_cannot_start(case, one_concept, tmp_path):
    """No login, a folder that is a file: one line before the training says so."""
    report_to, words = CASES[case]
    env = {"HOME": str(tmp_path), "WANDB_MODE": None, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    if report_to == "tensorboard":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "logs").touch()
    fork(tmp_path / "run", status=1, env=env, report_to=report_to, max_train_steps=1, **one_concept)
    said = (tmp_path / "run.log").read_text()
    lines = [line for line in said.splitlines() if not line.startswith("wandb: ")]
    assert len(lines) == 1 and lines[0].startswith(f"error: --report_to {report_to}"), said
    assert [word for word in words if word not in lines[0]] == []
    assert not list((tmp_path / "run").glob("*.safetensors"))


# The hub


HF = Path(sys.executable).with_name("hf")
USER = Path(__file__).with_name("use_from_hub.py")
BASE, REPOSITORY = "tester/tiny-sd", "tester/my-cat"
PROMPT = """a "<new1>" cat: 'naïve' #1 \N{CAT FACE} {x}"""
INSTANCE_PROMPT = """- "photo": a <new1> cat's \N{CAT FACE} #1"""
OTHER_PROMPT = "a dog"
RESULT = {f"{name}.{ending}" for name in (WEIGHTS, "<new1>") for ending in ("safetensors", "bin")}


@pytest.fixture(scope="module")
def pushed(sd1, one_concept, tmp_path_factory):
    """A run with a base model of the hub, pushed into a repository that is there already: the hub and the folder."""
    folder = tmp_path_factory.mktemp("pushed")
    out, old = folder / "my-cat", folder / "old"
    base = shutil.copytree(sd1, folder / "base")
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n")
    for file in ("old/README.md", "old/<new1>.bin", "old/notes.md", "my-cat/train.log", "my-cat/wandb/run/logs.bin"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"\0of an earlier run" if file.endswith("bin") else b"of an earlier run")
    (out / ".<old>.bin.unfinished").write_bytes(b"left by a run that was killed")
    with Hub() as hub:
        for repository, files in ((BASE, base), (REPOSITORY, old)):
            process = run(HF, "upload", repository, files, env=hub.environment(HF_TOKEN=SECRET))
            assert process.returncode == 0, process.stderr
        values = {"pretrained_model_name_or_path": BASE, "revision": "main"}
        values |= {"instance_prompt": INSTANCE_PROMPT, "validation_prompt": [PROMPT, OTHER_PROMPT]}
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
    pictures = {*(f"image_{i}.png" for i in range(4)), "before_after.png", "steps.png"}
    assert files.keys() == RESULT | {"README.md"} | pictures
    assert all(content == (out / name).read_bytes() for name, content in files.items())
    assert hub.writers == {SECRET} and not any(SECRET.encode() in content for content in files.values())
    assert f"Uploaded to {hub.url}/{REPOSITORY}\n" in (out / "stdout.txt").read_text()
    assert len(hub.repositories[REPOSITORY]) == 3  # made, the old files, the result


def test_model_card(pushed):
    hub, out = pushed
    metadata, text = card_of(hub.files(REPOSITORY)["README.md"])
    assert metadata["license"] == "openrail++" and metadata["base_model"] == BASE, "as the base model's own card says"
    assert metadata["instance_prompt"] == INSTANCE_PROMPT
    assert set(metadata["tags"]) == {"text-to-image", "diffusers", "stable-diffusion", "custom-diffusion"}
    shown = [(PROMPT, "image_0.png"), (PROMPT, "image_1.png"), (OTHER_PROMPT, "image_2.png")]
    shown.append((OTHER_PROMPT, "image_3.png"))
    assert metadata["widget"] == [{"text": prompt, "output": {"url": name}} for prompt, name in shown]
    assert f"`{PROMPT}`:\n\n![](./image_0.png) ![](./image_1.png)\n" in text
    assert f"`{OTHER_PROMPT}`:\n\n![](./image_2.png) ![](./image_3.png)\n" in text
    assert f"`{BASE}`, trained on pictures of `{INSTANCE_PROMPT}`." in text


def test_loads_from_the_hub(pushed, tmp_path):
    """As in the guide, with no token and nothing cached: from the card to a picture, the same as from the folder."""
    hub, out = pushed
    env = hub.environment(HF_HOME=str(tmp_path / "home"), PYTHONPATH=str(ROOT))
    process = run(sys.executable, USER, REPOSITORY, out, BASE, cwd=tmp_path, env=env)
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
    """All but the upload is done, and the hub's answer is told: the result is there, so this is a warning.

    The command that it names then uploads the result, and that alone, whatever characters a word has.
    """
    out = tmp_path / "my out"
    out.mkdir()
    # of the user's, and of an earlier run
    for name in ("secret.pem", "data.sqlite", "train.py", "<new9>.bin", "n.bin", "other.bin"):
        (out / name).write_text("not of this run")
    folders = {name: str(tmp_path / name) for name in ("HF_HOME", "TMPDIR")}
    (tmp_path / "TMPDIR").mkdir()
    values = {"push_to_hub": True, "hub_token": SECRET, "report_to": "tensorboard"}
    values |= {"resolution": 64, "max_train_steps": 1, "checkpointing_steps": 1, "hub_model_id": "my-things"}
    with Hub(refused="/commit/") as hub:
        listed = json.loads(Path(two_real_concepts["concepts_list"]).read_text())
        for concept, word in zip(listed, ("[new]", "S*"), strict=True):
            concept["instance_prompt"] = re.sub("<.*>", word, concept["instance_prompt"])
        (tmp_path / "list.json").write_text(json.dumps(listed))
        values |= {"modifier_token": "[new]+S*", "concepts_list": tmp_path / "list.json"}
        words = flags(**two_real_concepts | values, output_dir=out)
        process = run(sys.executable, SCRIPT, *words, env=hub.environment(**SECRETS, **folders))
        assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
        assert re.search("^warning: upload left out: .*no, not you", process.stderr, re.MULTILINE)
        assert all((out / name).exists() for name in (f"{WEIGHTS}.safetensors", "checkpoint-1", "logs"))
        assert secrets_in(tmp_path, process.stdout, process.stderr) == []
        assert hub.files("tester/my-things") == {} and hub.asked.count("POST /api/repos/create") == 1

        hub.refused = "$^"
        (line,) = [line for line in process.stderr.splitlines() if line.startswith("Everything is in ")]
        command = line.partition("; later: ")[2]
        env = hub.environment(**SECRETS, **folders, PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin")
        subprocess.run(command, shell=True, env=env, cwd=tmp_path, check=True, capture_output=True)
        files = hub.files("tester/my-things")
        names = {f"{name}.{ending}" for name in (WEIGHTS, "[new]", "S*") for ending in ("safetensors", "bin")}
        assert files.keys() == names | {"README.md"}
        assert all(content == (out / name).read_bytes() for name, content in files.items())

        # a base model that is a folder is none for the hub; the text names it
        metadata, text = card_of(files["README.md"])
        assert not {"base_model", "widget", "license"} & metadata.keys() and f"`{sd1}`" in text
        assert metadata["instance_prompt"] == "photo of a [new] cat, photo of a S* pot"
        assert "`photo of a [new] cat`, `photo of a S* pot`" in text and "image_" not in text
        assert "pipeline('photo of a [new] cat', " in text
        assert hub.unknown == []


def test_refused_repository(one_concept, tmp_path):
    """Told before training, and the token is in no exception; so if the token is in the environment, too."""
    values = FAST | one_concept | {"push_to_hub": True, "output_dir": tmp_path / "out"}
    ways = {
        "a token": {"hub_token": SECRET, "hub_model_id": "my-cat"},
        "the environment's": {"hub_model_id": "my-cat"},
        "a wrong token": {"hub_token": "hf_wrong", "hub_model_id": "my-cat"},
        "a wrong name": {"hub_model_id": "my cat"},
    }
    calls = {name: (tmp_path, flags(**values | way)) for name, way in ways.items()}
    with Hub(refused="/api/repos/create") as hub:
        env = hub.environment(HF_TOKEN=SECRETS["HF_TOKEN"], PYTHONPATH=str(ROOT))
        answers = in_one_process(calls, env=env)
    for name, reason in {
        "a token": "no, not you",
        "the environment's": "no, not you",
        "a wrong token": "Invalid credentials in Authorization header",
        "a wrong name": "Repo id must",
    }.items():
        ended = answers[name]["ended"]
        assert ended.startswith("error: --push_to_hub") and ways[name]["hub_model_id"] in ended and reason in ended
        assert "Training" not in answers[name]["printed"]
    assert secrets_in(json.dumps(answers)) == [] and not (tmp_path / "out").exists()


def test_unreachable_hub_stops_before_training(one_concept, tmp_path):
    with Hub() as hub:
        env = hub.environment(HF_ENDPOINT="http://127.0.0.1:9")
    values = one_concept | {"push_to_hub": True, "hub_model_id": "my-cat", "hub_token": SECRET}
    words = flags(**values, output_dir=tmp_path / "out", resolution=64, max_train_steps=1, report_to="none")
    process = run(sys.executable, SCRIPT, *words, env=env)
    assert process.returncode == 1 and "--push_to_hub my-cat" in process.stderr
    assert "Traceback" not in process.stderr and "Training" not in process.stdout
