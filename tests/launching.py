"""Starting the trainer: as a user, a launcher or a notebook does, and forked from a process that has imported it."""

import atexit
import contextlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_custom_diffusion.py"
OBSERVERS = Path(__file__).with_name("observers.py")
ONE_PROCESS = Path(__file__).with_name("one_process.py")
SECRET = "hf_NobodyMayReadThis"
SECRETS = {
    "HF_TOKEN": "hf_NorThisOfTheEnvironment",
    "WANDB_API_KEY": "nobody0may0read0this0key" + "0" * 16,
    "COMET_API_KEY": "NobodyMayReadThisKeyEither",
}

LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [Path(sys.executable).with_name("accelerate"), "launch"],
    # standalone: on a port of its own, as two tests may run side by side
    "torchrun": [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2"],
}
# Without --multi_gpu, accelerate starts a single process where there is no GPU.
LAUNCHERS["accelerate, two processes"] = [*LAUNCHERS["accelerate"], "--multi_gpu", "--num_processes=2"]
LAUNCHERS["accelerate, two processes"] += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]

# the root user may read and write everything, but for this
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

FAST = {"resolution": 64, "train_batch_size": 1, "report_to": "none", "dataloader_num_workers": 0}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and those that nohup starts ignore this one


def flags(**values):
    """Command-line flags from keywords: True is the bare flag, None leaves it out, of a list each is given."""
    words = []
    for name, value in values.items():
        each = value if isinstance(value, list) else [value]
        words += [f"--{name}" if one is True else f"--{name}={one}" for one in each if one is not None]
    return words


def run(*words, **options):
    """Runs a command as a process and returns it when it is done, whatever its exit status."""
    options = {"capture_output": True, "text": True, "timeout": 600} | options
    return subprocess.run([str(word) for word in words], **options)


def python(*words, **options):
    """Runs Python code (a string) or a file (a path) with the repository on its path; returns the finished process."""
    code = ["-c"] if isinstance(words[0], str) else []
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}} | options
    process = run(sys.executable, *code, *words, **options)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    return process


def train(output_dir, launcher="python", observer=None, cwd=None, env=None, **values):
    """Trains for a few steps at 64 pixels, checks that the run ended well, and returns output_dir.

    `observer` is a function of observers.py, which each process calls before it starts.
    """
    script = [OBSERVERS, observer.__name__, output_dir] if observer else [SCRIPT]
    values = {"output_dir": output_dir, "max_train_steps": 2, "learning_rate": 1e-2} | FAST | values
    # With other variables imports may do something else, and on a GPU a process that was forked can't use CUDA.
    if launcher == "python" and env is None and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        process = fork_script(*script, *flags(**values), cwd=cwd)
    else:
        process = run(*LAUNCHERS[launcher], *script, *flags(**values), cwd=cwd, env=env)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    assert secrets_in(process.stdout, process.stderr) == []
    (Path(output_dir) / "stdout.txt").write_text(process.stdout)
    (Path(output_dir) / "stderr.txt").write_text(process.stderr)
    return Path(output_dir)


# Several calls of main in one process


def in_one_process(calls, prefix=(), **options):
    """Calls main for each of {name: (folder, flags)}; returns {name: {"ended", "printed", "traceback"}}.

    "ended" is "went on", or the message or status of the exit.
    """
    calls = json.dumps({name: (str(folder), words) for name, (folder, words) in calls.items()})
    if prefix or options:
        options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}} | options
        process = run(*prefix, sys.executable, ONE_PROCESS, input=calls, **options)
    else:
        process = fork_script(ONE_PROCESS, stdin=calls)
    assert process.returncode == 0, process.stderr[-6000:]
    return json.loads(process.stdout.splitlines()[-1])


def refusals_of(calls, cwd="."):
    """How calls of main in one process end: {name: error message, or "went on"}."""
    answers = in_one_process({name: (cwd, words) for name, words in calls.items()})
    return {name: answer["ended"] for name, answer in answers.items()}


# Forked processes: they save the seconds that the imports take


def forkserver():
    """The context of processes that are forked from one that has imported the trainer.

    It sees no GPU, as its imports touch one, which a forked process then can't use; `train` starts others.
    """
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "a forked process can't use a GPU; start it with train or run"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    return context


def main_in_child(words, folder, observer, env, cwd):
    """Calls main in a forked process; everything that it prints goes to <folder>.log."""
    for name, value in env.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for workers: a forkserver's would import everything again
    log = os.open(folder.with_name(f"{folder.name}.log{env.get('RANK', '')}"), os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(cwd or ".")
    import train_custom_diffusion

    finish_observing = observer(folder, int(env.get("RANK", 0))) if observer else None
    train_custom_diffusion.main(train_custom_diffusion.parse_args(words))
    if finish_observing:
        finish_observing()


def free_port():
    """A port of this computer that nobody uses."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def start(folder, processes=1, observer=None, env=None, cwd=None, of_rank=None, before=(), **values):
    """Starts main in processes forked from one that has imported the trainer; returns them.

    Several processes find each other as torchrun's do. What each prints is appended to <folder>.log, or <folder>.log0
    and so on. `observer` is a function of observers.py, which each process calls before main. `env` holds more
    environment variables (None removes one), `of_rank` the flags in which a process differs from the others, `before`
    what stands before all flags.
    """
    values = {"output_dir": folder} | FAST | values
    context = forkserver()
    places = [{}]
    if processes > 1:
        place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    children = []
    for rank, place in enumerate(places):
        Path(f"{folder}.log{place.get('RANK', '')}").touch()
        words = [*before, *flags(**values | (of_rank or {}).get(rank, {}))]
        child = context.Process(target=main_in_child, args=(words, Path(folder), observer, place | (env or {}), cwd))
        child.start()
        atexit.register(child.kill)  # a test that fails may leave it waiting for ever
        children.append(child)
    return children


def finish(children, folder, status=0):
    """Waits for started processes, checks how they ended, and returns what they printed."""
    for child in children:
        child.join(300)
    said = "".join(file.read_text() for file in sorted(folder.parent.glob(f"{folder.name}.log*")))
    assert [child.exitcode for child in children] == [status] * len(children), said[-4000:]
    return said


def fork(folder, status=0, **values):
    """Runs main to its end in forked processes; returns the folder."""
    finish(start(folder, **values), folder, status)
    return folder


def script_in_child(script, words, outputs, cwd, stdin):
    """Runs a Python file as `python FILE` does, but that its imports are made."""
    os.setsid()
    for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd or ".")
    multiprocessing.set_start_method("fork", force=True)  # python's own; here it would be that of this process
    sys.argv, sys.stdin = [str(script), *words], io.StringIO(stdin)
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(str(script), run_name="__main__")


def fork_script(script, *words, cwd=None, stdin=""):
    """Runs a Python file in a forked process; returns it as `run` does, whatever its exit status."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.NamedTemporaryFile("r")) for _ in range(2)]
        arguments = ([str(word) for word in words], [output.name for output in outputs], cwd, stdin)
        child = forkserver().Process(target=script_in_child, args=(script, *arguments))
        child.start()
        atexit.register(child.kill)
        child.join(600)
        return subprocess.CompletedProcess([script, *words], child.exitcode, *(output.read() for output in outputs))


def fork_code(code, cwd=None):
    """Runs Python code in a forked process, checks that it ended well, and returns the process."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        process = fork_script(file.name, cwd=cwd)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    return process


def wait_until(condition, seconds=300):
    """Waits until condition() is true, looking every millisecond."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def secrets_in(*places):
    """Which places, texts or folders, have a secret in them; of a folder every file."""
    names = [secret.encode() for secret in (SECRET, *SECRETS.values())]
    found = []
    for place in places:
        files = [file for file in place.rglob("*") if file.is_file()] if isinstance(place, Path) else [place]
        for file in files:
            content = file.encode() if isinstance(file, str) else file.read_bytes() + str(file).encode()
            found += [file] if any(name in content for name in names) else []
    return found
