"""The README's code blocks run as printed, with the embedded model and fewer steps, and its tables are true."""

import ast
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub import Hub
from launching import ROOT, SECRET, run
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "train_custom_diffusion.py").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n)?```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [(language, code, reason) for reason, language, code in BLOCK.findall(README)]
BIN, BASE = Path(sys.executable).parent, "tester/sd"
QUOTED = "lines of the script"
FEWER = re.compile(r"(max_train_steps|num_inference_steps)=\d+")
# what a reader puts in place of the printed words, here the embedded model and its pictures
SWAPS = {
    "CompVis/stable-diffusion-v1-4": "assets/model",
    "pip install": "pip install --dry-run",  # the tests' environment stays as it is
    "your-name": "tester",
    "./data/cat": "assets/instance/cat",
    "./data/face": "assets/instance/cat",
    "samples_person": "samples_cat",
    "resolution=512": "resolution=128",
    "real_reg/samples_cat --num_class_images 200": "real_reg/samples_cat --num_class_images 200 "
    "--source dataset --dataset assets/regularization/cat",
}


def unmarked(language):
    return [code for kind, code, reason in BLOCKS if kind == language and not reason]


@pytest.fixture(scope="module")
def hub():
    """A hub on loopback that has the embedded model."""
    with Hub() as hub:
        process = run(BIN / "hf", "upload", BASE, ROOT / "assets" / "model", env=hub.environment(HF_TOKEN=SECRET))
        assert process.returncode == 0, process.stderr
        yield hub


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like a clone, without this one's results."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("assets", "concept_list.json", "requirements.txt", "retrieve.py", "train_custom_diffusion.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_block(checkout, hub, language, code, **variables):
    for printed, here in SWAPS.items():
        code = code.replace(printed, here)
    code = FEWER.sub(r"\1=2", code)
    own = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ".", "HF_HOME": str(checkout / "hf")}
    environment = hub.environment(HF_TOKEN=SECRET, **own | variables)
    command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
    process = run(*command, cwd=checkout, env=environment)
    assert process.returncode == 0, code + process.stdout[-1000:] + process.stderr[-3000:]


def test_starts_with_the_two_commands():
    assert unmarked("bash")[:2] == ["bash examples/quickstart.sh\n", "bash tests/run.sh\n"]


def test_few_blocks_are_not_run():
    reasons = [reason for _, _, reason in BLOCKS if reason and reason != QUOTED]
    assert len(reasons) <= 3 and len(BLOCKS) > 20, reasons


def test_bash_blocks(checkout, hub):
    """All but the first two, which are how this test and the quickstart are started; in their order."""
    exported = {"INSTANCE_DIR": "assets/instance/cat", "OUTPUT_DIR": "my-cat"}
    for code in unmarked("bash")[2:]:
        model = BASE if "--push_to_hub" in code else "assets/model"
        variables = exported | {"MODEL_NAME": model, "FIRST_MACHINE": "127.0.0.1"}
        ranks = "01" if "$MACHINE_RANK" in code else "0"  # a process stands for each machine
        with ThreadPoolExecutor() as pool:
            blocks = [pool.submit(run_block, checkout, hub, "bash", code, MACHINE_RANK=n, **variables) for n in ranks]
            for block in blocks:
                block.result()
    assert len((checkout / "real_reg" / "samples_cat" / "caption.txt").read_text().splitlines()) == 200
    for run_of_a_block in ("my-cat", "my-face", *RESULTS):
        assert list((checkout / run_of_a_block).glob("*.safetensors")), run_of_a_block
    assert (checkout / "results" / "two-concepts" / "<new2>.safetensors").is_file()


RESULTS = [f"results/{name}" for name in ("two-concepts", "resumed", "two-processes", "two-machines", "small")]
PICTURES = ("cat", "cat_from_the_hub", "pot", "cat_from_a_pot", "pot_with_another_top")


def test_python_blocks(checkout, hub):
    """One session, in their order; another block's result stands in for the quickstart's."""
    (checkout / "results" / "quickstart").symlink_to("resumed")
    run_block(checkout, hub, "python", "\n".join(unmarked("python")))
    for name in PICTURES:
        assert Image.open(checkout / f"{name}.png").size == (128, 128)
    assert (checkout / "results" / "my-cat-model" / "model_index.json").is_file()
    assert (checkout / "results" / "python" / "<new1>.safetensors").is_file()


def test_quoted_lines_are_the_scripts():
    """The lines that explain the method stand in the script."""
    quoted = [line.strip() for _, code, reason in BLOCKS if reason == QUOTED for line in code.splitlines()]
    assert len(quoted) > 8
    assert [line for line in quoted if line not in SCRIPT] == []


def test_flags_and_defaults():
    """The tables have every flag once, with its default."""
    from train_custom_diffusion import parse_args

    needed = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--instance_prompt=p"]
    defaults = vars(parse_args(needed)) | dict.fromkeys(word.split("=")[0][2:] for word in needed)
    table = README.split("## Flags\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]*) ?\|", table, re.MULTILINE)
    shown = {}
    for names, values in rows:
        names, values = re.findall(r"--(\w+)", names), values.strip().split(", ")
        values = values * len(names) if values in (["off"], [""]) else values
        assert not shown.keys() & set(names)
        shown |= dict(zip(names, values, strict=True))
    words = {False: "off", None: ""}
    assert shown.keys() == defaults.keys()
    for name, value in defaults.items():
        if type(value) in (int, float):
            assert float(shown[name]) == value, name
        else:
            assert shown[name].replace("none", "") == words.get(value, value), name


def test_links_and_files():
    """Links inside the page, and to files of the repository; the tests that the troubleshooting names."""
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 15
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).is_file(), link
    for name in re.findall(r"\btest_\w+\.py", README):
        assert (ROOT / "tests" / name).is_file(), name


def test_benchmark_uses_the_quickstarts_settings():
    script = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "benchmarks" / "concept_learning.py").read_text(encoding="utf-8"))
    names = ("MODEL", "CAT", "PRIOR", "CAT_CLASS", "SETTINGS")
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AugAssign)]
    used = [node for node in used if getattr(getattr(node, "target", None) or node.targets[0], "id", "") in names]
    words = [word.value for node in used for word in ast.walk(node) if isinstance(word, ast.Constant)]
    command = re.sub(r"\\\n", " ", script)
    assert words and all(word in command for word in words)
