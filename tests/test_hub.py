"""--push_to_hub against a server on loopback that speaks the calls of the hub's API that an upload needs."""

import base64
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from conftest import SCRIPT, SECRET, SECRETS, WEIGHTS, flags, python, run, same_bits, secrets_in, train


class Hub(BaseHTTPRequestHandler):
    """Creates repositories and takes commits; `server.files` holds what was committed, by path."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        address = f"http://{self.headers['Host']}/tester"
        if self.path == "/api/repos/create" and self.server.takes_repositories:
            self.answer({"url": f"{address}/{json.loads(body)['name']}"})
        elif self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": files})
        elif "/commit/" in self.path and self.server.takes_commits:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{address}/cat/commit/0", "commitOid": "0" * 40})
        else:
            header = self.headers.get("Authorization")
            self.answer({}, 403, f"no to {header}, see {address}?token={header.split()[-1]}")

    def answer(self, value, status=200, error=""):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("X-Error-Message", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        """No lines between the tests' own."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.tokens, server.takes_commits = {}, set(), True
    server.takes_repositories = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    yield server
    server.shutdown()


@pytest.fixture
def push_flags(one_concept):
    return one_concept | {
        "push_to_hub": True,
        "hub_token": SECRET,
        "hub_model_id": "my-cat",
    }


def test_uploads_result_and_model_card(hub, push_flags, sd1, tmp_path):
    from safetensors.torch import load

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".<old>.bin.unfinished").write_bytes(b"left by a run that was killed")
    out = train(tmp_path / "out", validation_prompt="a <new1> cat", checkpointing_steps=1, **push_flags)
    names = {f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", "<new1>.safetensors", "<new1>.bin", "image_0.png"}
    assert names <= hub.files.keys()
    assert not any(name.startswith(("checkpoint", ".", "logs")) for name in hub.files)
    assert hub.tokens == {f"Bearer {SECRET}"}
    assert not any(SECRET.encode() in content for content in hub.files.values())
    uploaded = load(hub.files[f"{WEIGHTS}.safetensors"])
    assert same_bits(uploaded, load((out / f"{WEIGHTS}.safetensors").read_bytes()))

    _, header, text = hub.files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["base_model"] == str(sd1) and card["license"] == "creativeml-openrail-m"
    assert {"text-to-image", "diffusers", "stable-diffusion", "custom-diffusion"} <= set(card["tags"])
    # the snippet works when it is pasted; the folder stands in for the repository, whose files it holds
    snippet = text.split("```python\n")[1].split("```")[0].replace("'tester/my-cat'", repr(str(out)))
    process = run(sys.executable, "-c", snippet.replace("=100", "=2"), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "picture.png").is_file()


def test_failed_upload_keeps_everything(hub, push_flags, tmp_path):
    """All but the upload is done, and the answer, which repeats the token, is told without it."""
    hub.takes_commits = False
    words = flags(output_dir=tmp_path / "out", resolution=64, max_train_steps=1, checkpointing_steps=1, **push_flags)
    folders = {name: str(tmp_path / name) for name in ("HF_HOME", "TMPDIR")}
    (tmp_path / "TMPDIR").mkdir()
    process = run(sys.executable, SCRIPT, *words, env=os.environ | SECRETS | folders)
    assert process.returncode == 1
    assert f"hf upload tester/my-cat {tmp_path / 'out'}" in process.stderr and "Traceback" not in process.stderr
    assert "no to Bearer ***, see" in process.stderr and "token=***" in process.stderr
    assert (tmp_path / "out" / f"{WEIGHTS}.safetensors").is_file() and (tmp_path / "out" / "checkpoint-1").is_dir()
    assert secrets_in(tmp_path, process.stdout, process.stderr) == []


NOTEBOOK = """
import sys, traceback
from train_custom_diffusion import main, parse_args
try:
    main(parse_args(sys.argv[1:]))
except SystemExit:
    print(traceback.format_exc())
"""


def test_refused_repository(hub, push_flags, tmp_path, monkeypatch):
    """Told before training, and the token is in no exception; so if the token is in the environment, too."""
    hub.takes_repositories = False
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    for token in (SECRET, None):
        values = push_flags | {"hub_token": token, "output_dir": tmp_path / "out", "resolution": 64}
        process = python(NOTEBOOK, *flags(**values, report_to="none"))
        assert "error: --push_to_hub my-cat" in process.stdout and "no to Bearer ***" in process.stdout
        assert "Training" not in process.stdout
        assert secrets_in(tmp_path, process.stdout, process.stderr) == []


def test_unreachable_hub_stops_before_training(hub, push_flags, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    words = flags(output_dir=tmp_path / "out", resolution=64, max_train_steps=1, report_to="none", **push_flags)
    process = run(sys.executable, SCRIPT, *words)
    assert process.returncode == 1 and "--push_to_hub my-cat" in process.stderr
    assert "Traceback" not in process.stderr and "Training" not in process.stdout
