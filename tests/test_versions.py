"""Python or packages that are missing or not supported: one line, before imports that would fail in their own ways."""

import os
import re
import sys

import pytest
from conftest import ROOT, SCRIPT, flags, run

from train_custom_diffusion import NEEDED

LIMITS = dict(re.fullmatch("(.*?)(>=.*)", needed).groups() for needed in NEEDED.split())
LOWEST = {name: re.search("[0-9.]+", limits)[0] for name, limits in LIMITS.items()}
WORDS = flags(pretrained_model_name_or_path="m", instance_data_dir="cat", instance_prompt="a cat")


@pytest.fixture
def bare(tmp_path):
    """Function that starts Python with no packages but the names of those needed, in their lowest or given versions."""

    def start(*words, **versions):
        for name, version in (LOWEST | versions).items():
            if version:
                (tmp_path / f"{name}-{version}.dist-info").mkdir()
                content = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(content)
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        return run(sys.executable, "-S", *words, env=os.environ | {"PYTHONPATH": path})

    return start


REFUSED = [(name, None) for name in LIMITS] + [
    ("torch", "2.5.1+cu124"),
    ("diffusers", "0.34.0"),
    ("transformers", "4.40.0"),
    ("transformers", "6.0.0"),
    ("accelerate", "0.34.2"),
    ("accelerate", "2.0.0"),
    ("numpy", "1.25.2"),
    ("Pillow", "9.5.0"),
]


@pytest.mark.parametrize("name, version", REFUSED)
def test_refused(name, version, bare):
    process = bare(SCRIPT, *WORDS, **{name: version})
    needed = f"this script needs {name}{LIMITS[name]}; pip install -r requirements.txt"
    assert process.stderr == f"error: {name} {version or 'is not installed'}: {needed}\n"
    assert (process.returncode, process.stdout) == (1, "")


ACCEPTED = {"lowest": {}, "later": {"torch": "2.13.0+cpu", "diffusers": "1.0.0.dev0", "transformers": "5.23.0rc1",
            "accelerate": "1.15.0", "numpy": "10.0", "Pillow": "13.0.0"}}  # fmt: skip


@pytest.mark.parametrize("versions", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(versions, bare):
    """The script goes on to its first import, for which nothing is there."""
    assert bare(SCRIPT, *WORDS, **versions).stderr.endswith("No module named 'numpy'\n")


@pytest.mark.parametrize("words, status", [(["--help"], 0), (["--resolution=zero"], 2)])
def test_arguments_need_no_packages(words, status, tmp_path):
    process = run(sys.executable, "-S", SCRIPT, *words, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.returncode == status and "Traceback" not in process.stderr


def test_notebook(bare):
    """An import that fails, as a notebook survives it."""
    process = bare("-c", "from train_custom_diffusion import main, parse_args", transformers="4.40.0")
    assert process.stderr.splitlines()[-1].startswith("ImportError: transformers 4.40.0: this script needs ")


def test_old_python(bare):
    process = bare("-c", "import sys; sys.version_info = (3, 9); import train_custom_diffusion")
    assert re.search(r"\nImportError: Python .*: this script needs 3\.10 or later\n$", process.stderr)


def test_retrieve_without_packages():
    process = run(sys.executable, "-S", ROOT / "retrieve.py", "--class_prompt=cat", "--class_data_dir=cats")
    assert process.stderr == "error: No module named 'certifi'; pip install -r requirements.txt\n"
    assert process.returncode == 1


def test_retrieve_with_a_broken_datasets(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError('pyarrow requires NumPy 2.0 or newer, found 1.26.4')")
    words = flags(source="dataset", dataset="hub/set", class_prompt="cat", class_data_dir=tmp_path / "cats")
    process = run(sys.executable, ROOT / "retrieve.py", *words, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    problem = "--dataset: pyarrow requires NumPy 2.0 or newer, found 1.26.4; pip install -r requirements.txt"
    assert process.stderr == f"error: {problem}\n" and process.returncode == 1


def test_requirements_agree():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert [needed for needed in NEEDED.split() if needed not in lines] == []
