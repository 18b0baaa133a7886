"""What the trackers are told, read back from what the real ones write without a network; and trackers that can't start.

One run of two processes reports to all of them; the configuration that it logged is enough to repeat it.
"""

import http.server
import io
import json
import os
import struct
import threading
import zipfile

import accelerate
import numpy as np
import pytest
import yaml
from conftest import SECRETS, fork, load_trained, same_bits, secrets_in, train
from packaging.version import Version
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record

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
    """Pictures of each step, from left to right, against the pixels below the label in output_dir/validation."""
    assert sorted(pictures) == VALIDATED
    for step, images in pictures.items():
        expected = np.asarray(Image.open(folder / "validation" / f"step-{step:06d}.png"))[-64:]
        assert np.array_equal(np.concatenate([np.asarray(image.convert("RGB")) for image in images], 1), expected)


def test_tensorboard(tracked, config):
    main, hparams = sorted((tracked / "logs").rglob("events.out.tfevents.*"), key=lambda file: len(file.parts))
    log = EventAccumulator(str(main), size_guidance={"scalars": 0, "images": 0}).Reload()
    check_scalars(*([(event.step, event.value) for event in log.Scalars(tag)] for tag in ("loss", "lr")))
    events = log.Images("validation")
    assert [event.step for event in events] == VALIDATED
    check_pictures(tracked, {e.step: [Image.open(io.BytesIO(e.encoded_image_string))] for e in events})
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
    files = {row["_step"]: row["validation.filenames"] for row in rows if "validation.filenames" in row}
    check_pictures(tracked, {step: [Image.open(folder / "files" / name) for name in files[step]] for step in files})


@pytest.mark.skipif(not COMET_OFFLINE, reason="needs accelerate 1.6")
def test_comet_ml(tracked, config):
    """One archive, of the main process, in the run's folder; comet_ml's own guesses at a loss are not among ours."""
    (file,) = (tracked / "logs").glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        told = {}
        for line in archive.read("messages.json").splitlines():
            message = json.loads(line)
            told.setdefault(message["type"], []).append(message["payload"])
        settings = {p["param"]["paramName"]: p["param"]["paramValue"] for p in told["parameter_msg"]}
        assert {name: value for name, value in settings.items() if name != "curr_step"} == config
        scalars = {"loss": [], "lr": []}
        for metric in [payload["metric"] for payload in told["metric_msg"]]:
            scalars.setdefault(metric["metricName"], []).append((metric["step"], metric["metricValue"]))
        check_scalars(scalars["loss"], scalars["lr"])
        pictures = {}
        for payload in told["file_upload"]:
            if payload["upload_type"] == "visualization":
                image = Image.open(io.BytesIO(archive.read(payload["file_path"])))
                pictures.setdefault(payload["additional_params"]["step"], []).append(image)
    check_pictures(tracked, pictures)


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


def test_logged_configuration_repeats_the_run(tracked, config, tmp_path):
    """As flags it gives the same bits again. Without a tracker there is nothing of one."""
    assert config["mixed_precision"] == "bf16" and "hub_token" not in config and None not in config.values()
    values = {name: value for name, value in config.items() if name not in NO_FLAGS}
    assert len(values) == len(config) - len(NO_FLAGS)
    away = f"import os; os.chdir({str(tmp_path)!r})"  # where trackers might leave something too
    values |= {"output_dir": tmp_path / "run", "report_to": "none"}
    fork(tmp_path / "run", processes=config["num_processes"], prelude=away, **values)
    assert same_bits(load_trained(tmp_path / "run"), load_trained(tracked))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.log0", "run.log1"}
    left = {path.name for path in tracked.iterdir()} - {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"logs", "wandb", "stdout.txt"}


class Refusing(http.server.BaseHTTPRequestHandler):
    """A tracker's server that refuses every key and repeats it."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        error = f"no user has the key {SECRETS['WANDB_API_KEY']} or {SECRETS['COMET_API_KEY']}"
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"sdk_error_code": 90212, "msg": error, "errors": [{"message": error}]}).encode())

    do_GET = do_POST

    def log_message(self, *values):
        """Is silent."""


@pytest.fixture(scope="module")
def server():
    """Address of a server that refuses every key."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CASES = {  # --report_to, whether there are keys, words of the error
    "all, no key": ("all", False, ["wandb login", "COMET_START_ONLINE=False"]),
    "comet_ml, no key": ("comet_ml", False, ["COMET_API_KEY", "COMET_START_ONLINE=False"]),
    "wandb, wrong key": ("wandb", True, ["no user has the key ***", "WANDB_MODE=offline"]),
    "comet_ml, wrong key": ("comet_ml", True, ["refuses its key", "COMET_START_ONLINE=False"]),
    "tensorboard": ("tensorboard", False, ["run/logs"]),
}


@pytest.mark.parametrize("case", CASES)
def test_tracker_that_cannot_start(case, one_concept, server, tmp_path):
    """Nobody to ask, no login, a folder that is a file: one line before the training says so, and shows no key."""
    report_to, has_keys, words = CASES[case]
    env = {"HOME": str(tmp_path), "WANDB_BASE_URL": server, "COMET_URL_OVERRIDE": f"{server}/clientlib/"}
    env |= SECRETS if has_keys else {}
    prelude = f"import os; os.environ.pop('WANDB_MODE'); os.environ.update({env})"
    if report_to == "tensorboard":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "logs").touch()
    fork(tmp_path / "run", status=1, prelude=prelude, report_to=report_to, max_train_steps=1, **one_concept)
    said = (tmp_path / "run.log").read_text()
    assert secrets_in(said) == [] and "Traceback" not in said
    lines = [line for line in said.splitlines() if not line.startswith("wandb: ")]  # wandb says which key it takes
    assert len(lines) == 1 and lines[0].startswith(f"error: --report_to {report_to}: "), said
    assert [word for word in words if word not in lines[0]] == []
    assert not list((tmp_path / "run").glob("*.safetensors"))
