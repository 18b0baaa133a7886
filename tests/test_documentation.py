"""What the README and the pages of docs/ say is true: their code blocks run as printed, with the embedded model and few
steps; flags, defaults, links, quoted lines and the names of tests are right.

The bash blocks of all pages run first, in their order, in one folder. Then the Python blocks of each page run as one
session in the same folder. A block with `<!-- not run: reason -->` above it is left out.
"""

import ast
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub import Hub
from launching import ROOT, SECRET, free_port, run
from models import make_clip, make_dino
from original import write_original
from PIL import Image
from reading import load_trained, same_bits
from warm import warm_commands

PAGES = {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": (ROOT / "README.md").read_text("utf-8")} | PAGES
OTHER_PAGES = ("CONTRIBUTING.md", "assets/model/README.md", "assets/model-xl/README.md")
OTHER_PAGES = {name: (ROOT / name).read_text("utf-8") for name in OTHER_PAGES}
SCRIPT = (ROOT / "train_custom_diffusion.py").read_text("utf-8")
BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n)?```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BIN, BASE = Path(sys.executable).parent, "tester/sd"
QUOTED = "lines of the script"
FEWER = re.compile(r"(max_train_steps|num_inference_steps|num_class_images)=\d+")
# what a reader puts in place of the printed words, here the embedded model and its pictures
SWAPS = {
    "CompVis/stable-diffusion-v1-4": "assets/model",
    "pip install": "pip install --dry-run",  # the tests' environment stays as it is
    'to("cuda", torch.float16)': 'to("cpu", torch.float32)',
    "your-name": "tester",
    "models/dreamshaper_8.safetensors": "models/dreamshaper_8.safetensors --config_name_or_path=assets/model",
    "./data/cat": "assets/instance/cat",
    "./data/face": "assets/instance/cat",
    "samples_person": "samples_cat",
    "resolution=512": "resolution=128",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",  # of random weights
    "resolution=1024": "resolution=64",
    # small judges, rough pictures
    "--output_dir=my-cat/evaluation": "--output_dir=my-cat/evaluation --clip_model=clip --dino_model=dino "
    "--num_images=1 --num_inference_steps=2",
    "--no_metrics": "--no_metrics --num_inference_steps=2",
    "checkpointing_steps=20": "checkpointing_steps=1",
    "choosing/checkpoint-20": "choosing/checkpoint-1",
    "choosing/checkpoint-80": "choosing/checkpoint-1",
    "choosing/checkpoint-240": "choosing/checkpoint-2",
    "real_reg/samples_cat --num_class_images 200": "real_reg/samples_cat --num_class_images 200 "
    "--source dataset --dataset assets/regularization/cat",
}
# what the bash blocks of all pages and the Python blocks of each leave, relative to the folder in which they run
RESULTS = ["my-cat", "my-face", "my-xl-cat", "my-dreamshaper-cat"]
NAMES = "small-xl two-concepts resumed two-processes two-machines small apart merged too-early too-strong one-file "
NAMES += "first repeated choosing choosing-apart second"
RESULTS += [f"results/{name}" for name in NAMES.split()]
PICTURES = ("pot.png", "cat_from_a_pot.png", "pot_with_another_top.png", "cat_from_the_hub.png")
EVALUATION = ("table.md", "evaluation.json", "sheet.png")
LEFT = {
    "docs/choosing.md": [f"{run}/evaluation/{name}" for run in ("my-cat", "results/choosing") for name in EVALUATION],
    "docs/from-a-ui.md": [f"results/for-my-ui/{n}.safetensors" for n in ("my-cat", "dreamshaper-with-my-cat", "new1")],
    "README.md": ["cat.png", "results/python/<new1>.safetensors"],
    "docs/export.md": [
        *("cat_from_a_lora.png", "results/exported/my-cat-model/model_index.json"),
        *("results/exported/my-cat.json", "results/exported/my-cat-model.safetensors"),
    ],
    "docs/other-tools.md": [*PICTURES, "results/my-cat-model/model_index.json"],
}


def blocks(page, language, marked=False):
    """Code blocks of a page, those that run or those that are marked."""
    found = BLOCK.findall(PAGES[page])
    return [code for reason, kind, code in found if kind == language and bool(reason) == marked]


@pytest.fixture(scope="module")
def hub():
    """A hub on loopback that has the embedded model."""
    with Hub() as hub:
        process = run(BIN / "hf", "upload", BASE, ROOT / "assets" / "model", env=hub.environment(HF_TOKEN=SECRET))
        assert process.returncode == 0, process.stderr
        yield hub


def environment_of(folder, hub, programs, **variables):
    """Environment of the blocks, which find `programs` first."""
    own = {"PATH": f"{programs}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": "."}
    return hub.environment(HF_TOKEN=SECRET, HF_HOME=str(folder / "hf"), **own | variables)


def run_block(folder, hub, programs, language, code, **variables):
    """Runs a block as a reader would who has put in words of their own."""
    for printed, here in SWAPS.items():
        code = code.replace(printed, here)
    code = FEWER.sub(r"\1=2", code)
    code = re.sub(r'(--validation_prompt="[^"]*")', r"\1 --num_validation_images=1", code)
    command = ["bash", "-euc", code]
    if language == "python":
        (folder / "block.py").write_text(code)
        command = [programs / "python", "block.py"]
    process = run(*command, cwd=folder, env=environment_of(folder, hub, programs, **variables))
    assert process.returncode == 0, code + process.stdout[-1000:] + process.stderr[-3000:]


def make_clone(folder, sdxl):
    """Makes the folder like a clone of the repository in which the quickstart has run."""
    names = ("assets", "concept_list.json", "requirements.txt", "retrieve.py", "scripts", "train_custom_diffusion.py")
    for name in names:
        (folder / name).symlink_to(ROOT / name)
    (folder / "sdxl").symlink_to(sdxl)
    make_clip(folder / "clip")
    make_dino(folder / "dino")
    (folder / "results").mkdir()
    (folder / "models").mkdir()
    for name in ("model.safetensors", "models/dreamshaper_8.safetensors"):
        write_original(ROOT / "assets" / "model", folder / name)
    (folder / "results" / "quickstart").symlink_to("resumed")  # of the README; stands in for the quickstart's result


def run_bash_blocks(folder, hub, programs):
    """Runs all bash blocks but the first two, which are this test and the quickstart."""
    port = f"--master_port {free_port()}"
    exported = {"INSTANCE_DIR": "assets/instance/cat", "OUTPUT_DIR": "my-cat", "FIRST_MACHINE": "127.0.0.1"}
    printed = [code for page in PAGES for code in blocks(page, "bash")]
    # Somebody else may run this test at the same time.
    for code in (code.replace("--master_port 29500", port) for code in printed[2:]):
        variables = exported | {"MODEL_NAME": BASE if "--push_to_hub" in code else "assets/model"}
        ranks = "01" if "$MACHINE_RANK" in code else "0"  # a process stands for each machine
        with ThreadPoolExecutor() as pool:
            started = [
                pool.submit(run_block, folder, hub, programs, "bash", code, MACHINE_RANK=n, **variables) for n in ranks
            ]
            for block in started:
                block.result()


# What runs


@pytest.mark.slow
def test_blocks(tmp_path, hub, sdxl):
    """All in one test, as the blocks in Python use what those in bash left."""
    make_clone(tmp_path, sdxl)
    programs = tmp_path.with_name("programs")
    with warm_commands(tmp_path, programs, environment_of(tmp_path, hub, programs)):
        run_bash_blocks(tmp_path, hub, programs)
        check_results(tmp_path, hub)
        for page in PAGES:
            if blocks(page, "python"):
                run_block(tmp_path, hub, programs, "python", "\n".join(blocks(page, "python")))
            for name in LEFT.get(page, []):
                assert (tmp_path / name).is_file(), name
                is_picture = name.endswith(".png") and not name.endswith("sheet.png")
                assert not is_picture or Image.open(tmp_path / name).size == (128, 128), name


def check_results(tmp_path, hub):
    """What the bash blocks left is there."""
    assert len((tmp_path / "real_reg" / "samples_cat" / "caption.txt").read_text().splitlines()) == 200
    assert len(list((tmp_path / "class_pictures" / "cat").glob("*.png"))) == 2
    for result in RESULTS:
        assert list((tmp_path / result).glob("*.safetensors")), result
    assert (tmp_path / "results" / "two-concepts" / "<new2>.safetensors").is_file()
    first, repeated = (load_trained(tmp_path / "results" / name) for name in ("first", "repeated"))
    assert same_bits(first, repeated)
    assert (tmp_path / "my-cat" / "before_after.png").is_file()
    assert "pytorch_custom_diffusion_weights.safetensors" in hub.files("tester/my-cat")


def test_few_blocks_are_not_run():
    found = [reason for text in PAGES.values() for reason, _, _ in BLOCK.findall(text)]
    skipped = [reason for reason in found if reason and reason != QUOTED]
    assert len(skipped) <= 2 and len(found) > 20, skipped


# What is said


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 300 and len(PAGES["README.md"].split()) <= 2200


def test_readme_starts_with_what_works_at_once():
    """The two commands, then one for Stable Diffusion that needs no account of a tracker."""
    first, second, third = blocks("README.md", "bash")[:3]
    assert (first, second) == ("bash examples/quickstart.sh\n", "bash tests/run.sh\n")
    assert "stable-diffusion" in third and "--report_to" not in third and "--push_to_hub" not in third


@pytest.mark.parametrize("page", PAGES)
def test_weights_are_loaded_into_a_pipeline(page):
    """Without `_pipeline` diffusers installs nothing and does not say so."""
    calls = re.findall(r"load_attn_procs\(.*", "\n".join(blocks(page, "python")))
    assert [call for call in calls if "_pipeline=pipeline" not in call] == []


def test_quoted_lines_are_the_scripts():
    """The lines that explain the method stand in the script."""
    found = [code for text in PAGES.values() for reason, _, code in BLOCK.findall(text) if reason == QUOTED]
    quoted = [line.strip() for code in found for line in code.splitlines()]
    assert len(quoted) >= 8
    assert [line for line in quoted if line not in SCRIPT] == []


def test_flags_and_defaults():
    """The tables of docs/flags.md have every flag once, with its default."""
    from train_custom_diffusion import parse_args

    needed = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--instance_prompt=p"]
    defaults = vars(parse_args(needed)) | dict.fromkeys(word.split("=")[0][2:] for word in needed)
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]*) ?\|", PAGES["docs/flags.md"], re.MULTILINE)
    shown = {}
    for flag_column, default_column in rows:
        names, values = re.findall(r"--(\w+)", flag_column), default_column.strip().split(", ")
        if values in (["off"], [""]):
            values *= len(names)
        assert not shown.keys() & set(names)
        shown |= dict(zip(names, values, strict=True))
    words = {False: "off", None: ""}
    assert shown.keys() == defaults.keys()
    for name, value in defaults.items():
        if type(value) in (int, float):
            assert float(shown[name]) == value, name
        else:
            assert shown[name].replace("none", "") == words.get(value, value), name


@pytest.mark.parametrize(
    "name", ["train_custom_diffusion.py", "retrieve.py", "scripts/merge.py", "scripts/evaluate.py"]
)
def test_help_shows_defaults_where_there_are_any(name):
    shown = re.findall(r"\(default:\s+([^)]+)\)", run(sys.executable, ROOT / name, "--help").stdout)
    assert len(shown) >= 5 and not {"None", "[]", "==SUPPRESS=="} & set(shown)


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_exist(page):
    """In sentences; those in code blocks are used."""
    files = [ROOT / "train_custom_diffusion.py", ROOT / "retrieve.py"]
    files += [file for folder in ("benchmarks", "scripts") for file in (ROOT / folder).glob("*.py")]
    known = {name for file in files for name in re.findall(r'"--(\w+)"', file.read_text("utf-8"))}
    # accelerate, tensorboard, docker, A1111 (--no-half)
    known |= {"num_processes", "multi_gpu", "dynamo_backend", "logdir", "shm", "no"}
    named = set(re.findall(r"(?<![\w-])--(\w+)", BLOCK.sub("", PAGES[page])))
    assert named - known - {"name"} == set()  # --name=value stands for any


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links():
    """Links to headings, pages and files of the repository; every page of docs/ is linked from the README."""
    pages, count = PAGES | OTHER_PAGES, 0
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.is_file(), (page, link)
            assert not anchor or anchor in anchors(target.read_text("utf-8")), (page, link)
            count += 1
    assert count >= 25
    assert [page for page in PAGES if page != "README.md" and f"]({page})" not in PAGES["README.md"]] == []


def test_named_tests_exist():
    written = "".join(file.read_text("utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGES["docs/differences.md"])
    assert len(named) >= 18
    assert [name for name in named if f"def {name}(" not in written] == []


def test_benchmark_uses_the_quickstarts_settings():
    script = (ROOT / "examples" / "quickstart.sh").read_text("utf-8")
    tree = ast.parse((ROOT / "benchmarks" / "concept_learning.py").read_text("utf-8"))
    names = ("MODEL", "CAT", "SETTINGS", "APART")
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AugAssign)]
    used = [node for node in used if getattr(getattr(node, "target", None) or node.targets[0], "id", "") in names]
    words = [word.value for node in used for word in ast.walk(node) if isinstance(word, ast.Constant)]
    command = re.sub(r"\\\n", " ", script)
    assert words and all(word in command for word in words)
