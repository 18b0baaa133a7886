"""Calls the trainer's main several times in one process, as the cells of a notebook do.

Reads {name: [folder, flags]} as JSON from standard input, works in each folder in turn, and prints as its last line
{name: {"ended", "printed", "traceback"}}: "went on" or what SystemExit carries, everything that the call wrote to
standard output and standard error, and the traceback of its exception.
"""

import gc
import json
import os
import sys
import tempfile
import traceback

from train_custom_diffusion import main, parse_args


def call(folder, words):
    """Calls main in a folder and returns how that ended."""
    os.chdir(folder)
    ended, trace = "went on", ""
    with tempfile.TemporaryFile("w+") as printed:
        kept = [os.dup(number) for number in (1, 2)]
        os.dup2(printed.fileno(), 1), os.dup2(printed.fileno(), 2)
        try:
            main(parse_args(words))
        except SystemExit as error:
            ended, trace = error.code, traceback.format_exc()
        except BaseException as error:
            ended, trace = f"traceback of {error!r}", traceback.format_exc()
        sys.stdout.flush(), sys.stderr.flush()
        for number, stream in zip((1, 2), kept, strict=True):
            os.dup2(stream, number)
        printed.seek(0)
        return {"ended": ended, "printed": printed.read(), "traceback": trace}


gc.freeze()  # as the script does
answers = {name: call(*arguments) for name, arguments in json.loads(sys.stdin.read()).items()}
print(json.dumps(answers))
