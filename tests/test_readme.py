"""The README's code blocks run as printed, with fewer steps."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [(language, code, bool(marked)) for marked, language, code in BLOCK.findall(README)]
FEWER = re.compile(r"(max_train_steps|num_inference_steps)=\d+")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like a clone, without this one's results; the quickstart's result stands in for itself."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("assets", "concept_list.json", "retrieve.py", "train_custom_diffusion.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_block(checkout, language, code):
    code = FEWER.sub(r"\1=2", code)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
    process = run(*command, cwd=checkout, env=os.environ | {"PATH": path, "PYTHONPATH": "."})
    assert process.returncode == 0, process.stderr[-3000:]


def test_starts_with_the_two_commands():
    commands = [code for language, code, _ in BLOCKS if language == "bash"][:2]
    assert commands == ["bash examples/quickstart.sh\n", "bash tests/run.sh\n"]


def test_training_and_inference_blocks(checkout):
    """The Python blocks in their order: train, then load and draw."""
    blocks = [code for language, code, marked in BLOCKS if language == "python" and not marked]
    assert len(blocks) == 2
    run_block(checkout, "python", blocks[0])
    (checkout / "results" / "quickstart").symlink_to("python")
    run_block(checkout, "python", blocks[1])
    assert (checkout / "cat.png").stat().st_size > 1000


def test_bash_blocks(checkout):
    """All but the first two, which are how this test and the quickstart are started."""
    blocks = [code for language, code, marked in BLOCKS if language == "bash" and not marked][2:]
    assert blocks
    for code in blocks:
        run_block(checkout, "bash", code)
    assert len((checkout / "results" / "real_reg" / "cat" / "caption.txt").read_text().splitlines()) == 200
    assert (checkout / "results" / "two-concepts" / "<new2>.safetensors").is_file()


def test_lines_of_the_method_are_the_scripts():
    """The lines that explain the new rows stand in the script."""
    lines = re.search(r"```python\n(  matches.*?)```", README, re.DOTALL).group(1).split("\n")
    source = (ROOT / "train_custom_diffusion.py").read_text(encoding="utf-8")
    assert all(line.strip() in source for line in lines)


def test_benchmark_uses_the_quickstarts_settings():
    script = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "benchmarks" / "concept_learning.py").read_text(encoding="utf-8"))
    names = ("MODEL", "CAT", "PRIOR", "CAT_CLASS", "SETTINGS")
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AugAssign)]
    used = [node for node in used if getattr(getattr(node, "target", None) or node.targets[0], "id", "") in names]
    words = [word.value for node in used for word in ast.walk(node) if isinstance(word, ast.Constant)]
    command = re.sub(r"\\\n", " ", script)
    assert words and all(word in command for word in words)
