"""Every documented command that is no flag of the trainer runs, in its smallest form: benchmarks, tools and examples.

They run in a copy of the repository, so that they find no results of an earlier run and leave none.
"""

import importlib.util
import json
import os
import re
import shutil
from importlib import metadata

import conftest
import pytest
import torch
from launching import ROOT, SCRIPT, fork, fork_script, python

MODEL = ROOT / "assets" / "model"
ALONE = ("benchmarks/gpu.py", "benchmarks/sdxl_memory.py", "benchmarks/step.py")  # tests of their own run these
LIBRARIES = ("tools/measure.py", "tools/world.py")  # these are no commands
COMMANDS = {  # file: (flags of its smallest form, what it prints)
    "benchmarks/choosing.py": (["--quick"], r"^\| rank correlation with colour \| \| \| -?[01]\.\d\d \|"),
    "benchmarks/concept_learning.py": (["--quick", "--runs", "cat kept apart"], r"^\| cat kept apart \| 0\.\d\d \|"),
    "benchmarks/folklore.py": (["--quick", "--rows", "min-SNR"], r"^\| min-SNR \| 0\.\d\d \|"),
    "benchmarks/inference.py": (["--size=tiny", "--rounds=1"], r"^loaded / merged: [\d.]+; .*: \d\.\de-0[5-9]$"),
    "benchmarks/memory.py": (["--size=tiny"], r"^\| end \| \d\.\d\d \| \d\.\d\d \| \d\.\d\d"),
    "benchmarks/one_file.py": (["--size=tiny"], r"^\| a file \| 0\.\d\d GB \| [\d.]+ s \|"),
    "benchmarks/retrieve_speed.py": (["--repeats=1", "--num_images=20"], r"^[\d.]+ times as fast$"),
    "benchmarks/time_to_concept.py": (["--reference=train_custom_diffusion.py", "--quick"], r"^\| cached \| \d+ "),
    "examples/before_after.py": (
        [
            f"--pretrained_model_name_or_path={MODEL}",
            "--weights_dir=result",
            f"--instance_data_dir={ROOT / 'assets' / 'instance' / 'cat'}",
            "--prompts=a {token} {class_prompt}",
            "--other_prompts=a fish",
        ],
        r"^Wrote before_after.png$",
    ),
    "tools/make_assets.py": (
        [
            *("--num_images=60", "--num_unseen=10", "--num_prompts=1", "--num_renders=1", "--num_processes=1"),
            *("--vae_steps=1", "--diffusion_steps=1", "--xl_text_steps=1", "--xl_steps=1", "--output_dir=made"),
        ],
        r"^stage finish_xl: \d+ s$",
    ),
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository with the result of a training."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("benchmarks", "examples", "scripts", "tools"):
        shutil.copytree(ROOT / name, folder / name)
    for file in ("concept_list.json", "retrieve.py", "train_custom_diffusion.py"):
        shutil.copy(ROOT / file, folder)
    (folder / "assets").symlink_to(ROOT / "assets")
    fork(
        folder / "result",
        pretrained_model_name_or_path=MODEL,
        instance_data_dir=ROOT / "assets" / "instance" / "cat",
        instance_prompt="photo of a <new1> cat",
        modifier_token="<new1>",
        max_train_steps=1,
    )
    return folder


def test_every_command_is_run():
    files = [file for name in ("benchmarks", "examples", "tools") for file in ROOT.glob(f"{name}/*.py")]
    assert {str(file.relative_to(ROOT)) for file in files} == {*COMMANDS, *ALONE, *LIBRARIES}


@pytest.mark.slow
@pytest.mark.parametrize("file", COMMANDS)
def test_command(clone, file):
    words, printed = COMMANDS[file]
    process = fork_script(clone / file, *words, cwd=clone)
    assert process.returncode == 0, process.stderr[-4000:]
    assert re.search(printed, process.stdout, re.MULTILINE), process.stdout[-3000:]


def test_gpus_are_found_though_they_are_hidden(tmp_path, monkeypatch):
    """`pytest -m gpu` runs on a GPU's machine: a package in torch's place sees what the question is asked with."""
    code = 'import os\nclass cuda:\n    is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""\n'
    (tmp_path / "torch.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(conftest, "GPUS", "all")  # as the tests were started with
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and conftest.sees_gpu()
    monkeypatch.setattr(conftest, "GPUS", "")
    assert not conftest.sees_gpu()


@pytest.mark.parametrize("given", [None, "1"])
def test_workers_know_which_gpus_there_were(given, monkeypatch):
    """pytest-xdist starts them from a process that has hidden the GPUs already."""
    for name in ("CUDA_VISIBLE_DEVICES", "GPUS_OF_THE_TESTS"):
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    ask = "import conftest; print(conftest.GPUS)"
    code = f"import subprocess, sys, conftest; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    assert python(code, env=environment).stdout.split() == [given or "all"]


# The benchmarks of a step


def printed_by(code, folder):
    """Lines that Python code prints, which runs as a file of the folder."""
    file = folder / "measure.py"
    file.write_text(code)
    process = fork_script(file)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout.splitlines()


@pytest.mark.slow
def test_benchmark(clone, tmp_path):
    """Another script's step is measured beside the trainer's: here a copy, which does the same work; cached, less."""
    shutil.copy(SCRIPT, tmp_path / "another.py")
    code = f"""if __name__ == "__main__":
        import json, sys
        sys.path.insert(0, {str(clone / "benchmarks")!r})
        import step
        setups = step.tables("tiny", {str(tmp_path / "another.py")!r})["variants"][:3]
        setups.append(step.Setup("broken", flags=("--no_such_flag",)))
        rows = step.measure(setups, "tiny", 1, 1, ("checkpoint", "flops", "end"))
        step.print_table("variants", rows)
        print(json.dumps(rows))"""
    *table, rows = printed_by(code, tmp_path)
    reference, exact, cached = rows = json.loads(rows)
    # one that fails is left out, and an answer that fails costs itself
    assert [row["name"] for row in rows] == ["reference fp32", "exact fp32", "cached fp32"]
    assert [row["end"] for row in rows] == [None] * 3
    assert reference["flops"] == exact["flops"] > cached["flops"] > 0
    assert "VAE" in exact["parts"] and "VAE" not in cached["parts"]
    assert reference["checkpoint"] is None and exact["checkpoint"] > 0
    for row in rows:
        assert len(row["times"]) == 1 and min(row["times"]) > 0
        assert min(row["parts"].values()) >= 0 and row["parts"]["rest"] > 0  # the parts are no more than the whole
        assert any(line.startswith(f"| {row['name']} |") for line in table)


@pytest.mark.slow
def test_benchmark_of_the_data(clone, tmp_path):
    """Here with small pictures, so that only the form of its table counts."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(clone / "benchmarks")!r})
        import step
        make = step.make_pictures
        step.make_pictures = lambda folder, count, size, cell: make(folder, count, (80, 60), cell)
        step.data(1)"""
    *_, once, at_every_draw = printed_by(code, tmp_path)
    for line, name in ((once, "decoded once"), (at_every_draw, "decoded at every draw")):
        assert re.fullmatch(rf"\| {name} (\| \d+ \(\d+-\d+\) ){{3}}\|", line)


@pytest.mark.slow
@pytest.mark.skipif(bool(importlib.util.find_spec("torchvision")), reason="torchvision is installed")
def test_benchmark_without_torchvision(clone):
    words = ("--size=tiny", "--rounds=1", "--only=cached fp32$", "--reference=x")
    said = fork_script(clone / "benchmarks" / "step.py", *words).stdout
    assert "The reference is left out: it needs torchvision." in said and "| cached fp32 |" in said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there fp16 is supported")
def test_benchmark_for_a_gpu(clone):
    """Its table, here of tiny models on a CPU, which it says; a row that fails says why, and the next one runs."""
    process = fork_script(clone / "benchmarks" / "gpu.py", "--size=tiny", "--only=XL|fp16")
    first, versions, _, head, _, xl, fp16 = process.stdout.splitlines()
    assert first.endswith("there is no GPU here  ")
    assert all(f"{name} {metadata.version(name)}" in versions for name in ("torch", "diffusers", "transformers"))
    columns = head.count("|")
    assert re.fullmatch(r"\| XL, cached bf16, checkpointing \| 1 \+ 1 (\| [\d.]+[^|]* ){7}\|  \|", xl)
    assert re.fullmatch(r"\| cached fp16 \| 2 \+ 2 (\|  ){7}\| error: --mixed_precision fp16[^|]*\|", fp16)
    assert xl.count("|") == fp16.count("|") == columns
    rows = json.loads((clone / "results" / "step" / "gpu.json").read_text())["rows"]
    assert len(rows) == 1 and rows[0]["pictures"] > 0 and rows[0]["flops"] > 0 and rows[0]["proof"][0] > 0


CARD = """if True:
    import sys, types
    sys.path.insert(0, {folder!r})
    import gpu, step, torch
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(total_memory=8 * 2**30)
    torch.cuda.is_available = lambda: True
    step.describe_device = lambda: "A card"
    step.measure = lambda *_: (_ for _ in ()).throw(SystemExit("a\\nerror: out of memory"))
    sys.argv = ["gpu.py"]
    gpu.main()"""


def test_benchmark_for_a_small_gpu(clone, tmp_path):
    """On a card of 8 GB it leaves XL out and says so; a row without memory has its line, and the next one runs."""
    rows = printed_by(CARD.format(folder=str(clone / "benchmarks")), tmp_path)
    assert rows[0].startswith("sd14, A card, 8.6 GB")
    said = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[-1].removesuffix(" |") for row in rows[5:]}
    assert said.pop("XL, cached bf16, checkpointing") == "left out: needs 15 GB"
    assert len(said) == 7 and set(said.values()) == {"error: out of memory"}


def test_benchmark_for_a_gpu_ends_in_time(clone):
    process = fork_script(clone / "benchmarks" / "gpu.py", "--size=tiny", "--minutes=0")
    rows = process.stdout.splitlines()[5:]
    assert len(rows) == 10 and all(row.endswith("| no time left |") for row in rows)


def test_memory_of_the_real_size():
    """A step at 1024 pixels with gradient checkpointing leaves room on a GPU of 24 GB, and so does the run's end."""
    said = fork_script(ROOT / "benchmarks" / "sdxl_memory.py").stdout
    rows = dict(re.findall(r"^\| (.+) \| ([\d.]+) \|$", said, re.MULTILINE))
    assert float(rows["trained weights, fp32"]) == pytest.approx(340.8e6 * 4 / 1e9, abs=0.01)
    assert 12 < float(rows["together, --gradient_checkpointing"]) < 18 < float(rows["together"])
    assert 10 < float(rows["the end together"]) < float(rows["together, --gradient_checkpointing"])
