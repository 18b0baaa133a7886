"""`python FILE` and `accelerate launch FILE` without the seconds of the imports, for commands that are run as printed.

A server has made the imports and forks a process for each command, which gets the command's folder, environment and
streams. What else these programs are asked for, such as launching with flags, they do themselves.
"""

import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

COMMAND = """#!{python} -IS
import json, os, socket, sys

words = sys.argv[1:]
if {is_launcher} and words[:1] == ["launch"]:
    words = words[1:]
if not words or not words[0].endswith(".py"):
    os.execv({program!r}, [{program!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
socket.send_fds(server, [json.dumps([words, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
sys.exit(server.recv(1)[0])
"""


@contextlib.contextmanager
def warm_commands(folder, place, environment):
    """Yields a folder with both programs, for commands in `folder`; the imports are made in this environment."""
    place.mkdir()
    address = str(place / "server")
    for name in ("python", "accelerate"):
        program = str(Path(sys.executable).with_name(name))
        (place / name).write_text(
            COMMAND.format(python=sys.executable, program=program, address=address, is_launcher=name == "accelerate")
        )
        (place / name).chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, address], cwd=folder, env=environment) as server:
        try:
            while not Path(address).exists():
                assert server.poll() is None, "the server's imports failed"
                time.sleep(0.01)
            yield place
        finally:
            server.kill()


def next_command(server):
    """Waits for commands, and returns each in a process of its own, whose exit status goes to who gave it."""
    while True:
        connection, _ = server.accept()
        if os.fork():
            connection.close()
            continue
        message, streams, *_ = socket.recv_fds(connection, 2**17, 3)
        process = os.fork()
        if not process:
            return *json.loads(message), streams
        _, status = os.waitpid(process, 0)
        connection.send(bytes([os.waitstatus_to_exitcode(status) & 255]))
        os._exit(0)


if __name__ == "__main__":
    import preloaded  # noqa: F401

    # Under another name until it listens
    unfinished = f"{sys.argv[1]}.unfinished"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(unfinished)
    listening.listen()
    os.rename(unfinished, sys.argv[1])
    sys.argv, folder, variables, streams = next_command(listening)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # The old ones know what they wrote to, such as whether one can seek in it.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
