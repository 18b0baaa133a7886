"""The notebook runs from top to bottom, and the trainer behaves in a notebook's kernel."""

import base64
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import FAST, ROOT, SCRIPT, finish, flags, python, run, start, wait_until
from models import EMBEDDED
from PIL import Image
from reading import load_trained, load_weights, same_bits

FILE = ROOT / "examples" / "custom_diffusion.ipynb"
CELLS = {cell["id"]: cell for cell in json.loads(FILE.read_text(encoding="utf-8"))["cells"]}
CODE = {name: "".join(cell["source"]) for name, cell in CELLS.items() if cell["cell_type"] == "code"}
FEWER = {
    "FIRST_STEPS = 250": "FIRST_STEPS = 2",
    "ALL_STEPS = 500": "ALL_STEPS = 4",
    "--num_class_images 200": "--num_class_images 5",
    "--num_validation_images=2": "--num_validation_images=1",
    "--train_batch_size=8": "--train_batch_size=1",
    "--lr_warmup_steps=20": "--lr_warmup_steps=0",
    "num_inference_steps=100": "num_inference_steps=2",
}
WORRIES = re.compile(r"warn|error|traceback|deprecat|ignored|fail", re.IGNORECASE)
LABEL = 16  # pixels of a line of text above pictures of 128 pixels
ROW = LABEL + 128  # the word's pictures have one, and those of the plain class
NOT_PASSED = re.compile(r"The following values were not passed.*?`accelerate config`\.", re.DOTALL)  # the text says so


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """An environment in which the kernel python3 is this Python, and Jupyter's folders are nobody's."""
    home = tmp_path_factory.mktemp("jupyter")
    kernel = home / "data" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": words, "display_name": "Python 3", "language": "python"}))
    places = {"JUPYTER_PATH": home / "data", "JUPYTER_RUNTIME_DIR": home / "runtime", "IPYTHONDIR": home / "ipython"}
    with pytest.MonkeyPatch.context() as patch:
        for name, place in (places | {"HF_HOME": home / "hf"}).items():
            patch.setenv(name, str(place))
        yield


# The notebook


def test_is_committed_without_outputs():
    """So that its differences can be read. Nothing in it belongs to one machine."""
    for cell in CELLS.values():
        assert not cell.get("outputs") and cell.get("execution_count") is None
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|usr|work|content|Users)\b|[A-Z]:\\\\|torchvision", text)
    assert len(text) < 40_000
    metadata = json.loads(text)["metadata"]
    assert metadata["kernelspec"]["name"] == "python3" and metadata["language_info"]["name"] == "python"


def test_settings_for_ones_own_pictures_fit():
    """What the text gives to replace the settings has the same names, and makes flags that the trainer takes."""
    from train_custom_diffusion import parse_args

    (own,) = re.findall(r"```python\n(.*?)```", "".join(CELLS["own-text"]["source"]), re.DOTALL)
    default, changed = {}, {"CLASS_DIR": "classes"}
    exec(CODE["settings"], default)
    exec(own, changed)
    assert default.keys() == changed.keys() - {"CLASS_DIR"}
    exec(CODE["flags"], changed)
    args = parse_args([*changed["flags"], f"--max_train_steps={changed['ALL_STEPS']}"])
    assert args.modifier_token in args.instance_prompt and args.modifier_token in args.validation_prompt[0]


@pytest.fixture(scope="module")
def executed(jupyter, tmp_path_factory):
    """The notebook as executed in the examples folder of something like a clone; the clone."""
    import nbformat
    from nbclient import NotebookClient

    clone = tmp_path_factory.mktemp("clone")
    (clone / "examples").mkdir()
    for name in ("assets", "requirements.txt", "retrieve.py", "train_custom_diffusion.py"):
        (clone / name).symlink_to(ROOT / name)
    text = FILE.read_text(encoding="utf-8")
    for many, few in FEWER.items():
        assert text.count(many) >= 1, many
        text = text.replace(many, few)
    notebook = nbformat.reads(text, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(clone / "examples")}}).execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}, clone


def said(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(outputs):
    data = [output.data["image/png"] for output in outputs if output.output_type == "display_data"]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in data]


def test_says_nothing_that_worries(executed):
    outputs, _ = executed
    assert all(output.output_type != "error" for cell in outputs.values() for output in cell)
    for name, cell in outputs.items():
        assert not WORRIES.search(NOT_PASSED.sub("", said(cell))), (name, said(cell))
    assert said(outputs["setup"]) == ""  # nothing was missing, nothing was installed


def test_shows_pictures(executed):
    """A row of 5 instance and class pictures, before and after, over the steps, the last ones, those with prompts."""
    outputs, _ = executed
    sizes = {name: [picture.size for picture in pictures(cell)] for name, cell in outputs.items()}
    assert {name: size for name, size in sizes.items() if size} == {
        "instance-pictures": [(750, 150)],
        "class-pictures": [(750, 150)],
        "before-after": [(2 * 128, LABEL + 2 * ROW)],
        "final-pictures": [(3 * 128, LABEL + 2 * ROW), (150, 150)],
        "inference": [(128, 128)],
        "prompts": [(600, 150)],
    }
    before, after = np.split(np.asarray(pictures(outputs["before-after"])[0], int), 2, axis=1)
    assert abs(before - after)[2 * LABEL : LABEL + ROW].max() > 4  # of the new word
    assert all(np.asarray(picture).std() > 10 for cell in outputs.values() for picture in pictures(cell))  # none blank


def test_trains_with_both_launchers(executed):
    """The command takes the first two steps, notebook_launcher the others, from the command's checkpoint."""
    from safetensors.torch import load_file

    outputs, clone = executed
    result = clone / "results" / "notebook"
    written = outputs["config"][-1]
    assert Path(written.data["text/plain"].split("'")[1]).read_text().startswith("{")
    assert "2/2" in said(outputs["launch"]) and "Saved to results/notebook" in said(outputs["launch"])
    text = said(outputs["python"])
    assert text.startswith("Launching training on ") and "Resuming from results/notebook/checkpoint-2, step 2" in text
    assert "4/4" in text and "Saved to results/notebook" in text
    base = load_file(EMBEDDED / "unet" / "diffusion_pytorch_model.safetensors")
    first, last = load_weights(result / "checkpoint-2"), load_weights(result)
    assert first.keys() == last.keys() and len(last) > 0
    for key, weights in last.items():
        layer, projection = re.fullmatch(r"(.*)\.processor\.(to_[kv])_custom_diffusion\.weight", key).groups()
        start = base[f"{layer}.{projection}.weight"].float()
        assert (first[key] - start).abs().max() > 1e-3 and (weights - first[key]).abs().max() > 1e-3, key


def test_draws_with_what_it_has_learnt(executed):
    """The picture is that of the trained attention and word, not that of either alone, or of the base model."""
    import torch
    from diffusers import DiffusionPipeline

    outputs, clone = executed
    result = clone / "results" / "notebook"
    (shown,) = pictures(outputs["inference"])
    assert np.array_equal(shown, Image.open(result / "my_picture.png"))

    def draw(attention, word):
        pipeline = DiffusionPipeline.from_pretrained(EMBEDDED).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if attention:
            pipeline.unet.load_attn_procs(
                result, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipeline
            )
        if word:
            pipeline.load_textual_inversion(result, weight_name="<new1>.safetensors")
        noise = torch.Generator().manual_seed(0)
        prompt, how = "photo of a <new1> cat on the grass", {"num_inference_steps": 2, "guidance_scale": 6.0}
        return pipeline(prompt, **how, generator=noise).images[0]

    def difference(picture):
        return abs(np.asarray(picture, int) - np.asarray(shown, int)).max()

    assert difference(draw(True, True)) <= 1
    assert min(difference(draw(*parts)) for parts in ((True, False), (False, True), (False, False))) > 4


# The kernel


class Kernel:
    """A notebook's kernel; `answer` runs code in it."""

    def __init__(self, folder):
        from jupyter_client.manager import start_new_kernel

        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=environment)

    def answer(self, code, meanwhile=None):
        """What code printed, and the error that it ended with as (name, message), or None.

        `meanwhile` is called when the kernel has begun.
        """
        printed, error, request = "", None, self.client.execute(code)
        if meanwhile:
            meanwhile()
        while True:
            message = self.client.get_iopub_msg(timeout=300)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != request:
                continue  # of the kernel's start
            if kind == "stream":
                printed += content["text"]
            elif kind == "error":
                error = content["ename"], content["evalue"]
            elif kind == "status" and content["execution_state"] == "idle":
                return printed, error


@pytest.fixture
def kernel(jupyter, tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.manager.shutdown_kernel(now=True)


def test_setup_finds_or_fetches_the_scripts(kernel, tmp_path):
    """Started in the repository, or in a folder of it, or by itself, when it clones and installs what is missing."""
    clone = tmp_path / "origin"
    (clone / "examples").mkdir(parents=True)
    (tmp_path / "alone").mkdir()
    (clone / "train_custom_diffusion.py").touch()
    (clone / "requirements.txt").write_text("# what it needs\nnumpy>=1.26\n")
    run("git", "init", "--quiet", cwd=clone, check=True)
    run("git", "add", ".", cwd=clone, check=True)
    words = ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all")
    run("git", *words, cwd=clone, check=True)
    kernel.answer("get_ipython().register_magic_function(lambda line: print('pip', line), magic_name='pip')")

    def setup(folder, repository=""):
        code = CODE["setup"].replace('REPOSITORY = ""', f"REPOSITORY = {str(repository)!r}")
        printed, error = kernel.answer(f"import os\nos.chdir({str(folder)!r})\n{code}")
        return printed, error, kernel.answer("print(os.getcwd())")[0].strip()

    assert setup(clone) == ("", None, str(clone))
    assert setup(clone / "examples") == ("", None, str(clone))
    _, error, _ = setup(tmp_path / "alone")
    assert error[0] == "SystemExit" and "REPOSITORY" in error[1]
    assert setup(tmp_path / "alone", clone) == ("", None, str(tmp_path / "alone" / "custom-diffusion"))
    for line in ("numpy>=1000", "no-such-package-anywhere"):
        (clone / "requirements.txt").write_text(f"{line}  # missing\n")
        assert setup(clone) == ("pip install --quiet -r requirements.txt\n", None, str(clone))


COUNT = """
import gc, diffusers
gc.collect()
print(sum(type(thing) is diffusers.UNet2DConditionModel for thing in gc.get_objects()))
"""


def test_runs_of_one_kernel(kernel, one_concept, tmp_path):
    """Interrupted, resumed, and again with another precision: each run as it would be in a kernel of its own."""
    folder = tmp_path / "run"
    values = one_concept | FAST | {"output_dir": folder, "learning_rate": 1e-2, "checkpointing_steps": 1}

    def train(**more):
        return f"main(parse_args({flags(**(values | more))!r}))"

    def interrupt():
        wait_until((folder / "checkpoint-3").exists)
        kernel.manager.interrupt_kernel()

    printed, error = kernel.answer(
        "import gc\nfrom train_custom_diffusion import main, parse_args\nprint(gc.isenabled())"
    )
    assert (printed, error) == ("True\n", None)  # no warning of a bar that needs ipywidgets either
    printed, error = kernel.answer(train(max_train_steps=10**6), interrupt)
    assert error == ("SystemExit", "130")
    (step,) = re.findall(r"Stopped after step (\d+); to go on: .*--resume_from_checkpoint latest", printed)
    assert (folder / f"checkpoint-{step}").is_dir()
    assert kernel.answer(COUNT)[0].endswith("0\n")  # the models would fill a GPU twice when the run goes on

    more = {"max_train_steps": int(step) + 2, "resume_from_checkpoint": f"checkpoint-{step}"}
    for precision in ("bf16", None):
        printed, error = kernel.answer(train(**more, mixed_precision=precision))
        assert error is None and f"step {step}" in printed, (printed, error)
        used, _ = kernel.answer("from accelerate import Accelerator\nprint(Accelerator().mixed_precision)")
        assert used == f"{precision or 'no'}\n"
    assert kernel.answer(train(max_train_steps=0))[1] == ("SystemExit", "2")
    name, message = kernel.answer(train(instance_data_dir="nowhere"))[1]
    assert name == "SystemExit" and message.startswith("error: instance_data_dir nowhere")
    words = flags(**values | {"output_dir": tmp_path / "magic", "max_train_steps": 1})
    printed, error = kernel.answer(f"%run {SCRIPT} {shlex.join(words)}")  # its standard output is no file
    assert error is None and "Saved to" in printed


def test_settings_of_other_cells(one_concept, tmp_path):
    """Torch's defaults, which a notebook may have changed to draw pictures, do not reach the training."""
    values = FAST | one_concept | {"max_train_steps": 1}
    words = flags(**values | {"output_dir": tmp_path / "run"})
    process = python(f"""
import torch
from train_custom_diffusion import main, parse_args

torch.set_default_device("meta")
torch.set_default_dtype(torch.float16)
torch.set_grad_enabled(False)
with torch.inference_mode():
    main(parse_args({words!r}))
print(torch.is_grad_enabled())
""")
    assert process.stdout.endswith("\nFalse\n")
    assert "checked" in finish(start(tmp_path / "plain", **values), tmp_path / "plain")
    assert same_bits(load_trained(tmp_path / "run"), load_trained(tmp_path / "plain"))


# Several processes


def test_launcher_of_several_processes(one_concept, tmp_path):
    """The README's call, from a process that has imported the trainer as a notebook does."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (call,) = re.findall(r"`accelerate\.(notebook_launcher\(main, .*, num_processes=2)\)`", readme)
    words = flags(**FAST | one_concept | {"output_dir": tmp_path / "run", "max_train_steps": 2})
    code = f"""
import socket
from accelerate import notebook_launcher
from train_custom_diffusion import main, parse_args

with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
flags = {words!r}
{call}, use_port=str(port))
"""
    assert "2 steps of 2 instance pictures on 2 process(es)" in python(code).stdout
    assert load_weights(tmp_path / "run")


def test_import_does_not_touch_a_gpu():
    """Torch's questions whether there is one, which diffusers' imports ask, do, unless this variable is set."""
    python("""
import os
import torch

def is_available():
    if os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") != "1":
        raise SystemExit("the GPU was asked")
    return False

torch.cuda.is_available = torch.accelerator.is_available = is_available
import train_custom_diffusion
""")


@pytest.mark.gpu
def test_forked_processes_use_the_gpu():
    """After the imports of the README's call."""
    python("""
import os
from accelerate import notebook_launcher
from train_custom_diffusion import torch

if not os.fork():
    assert torch.ones(1, device="cuda").sum() == 1
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
""")
