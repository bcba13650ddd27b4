"""Runs a program in a Python process of its own, away from this process's compiled code, caches and imports."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import torch

LIMIT = 300  # seconds of a process


def run(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The finished process; its output is text. The compile cache is a fresh folder unless one is given."""
    return subprocess.run(
        _command(textwrap.dedent(program)),
        env=_environment(environment),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def output_of(program: str, **environment: str) -> str:
    done = run(program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _command(program: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", program]


def _environment(more: dict[str, str]) -> dict[str, str]:
    found = {**os.environ, **more}
    found.pop("FLASHDP_DEBUG", None)
    return found


SERVER = """
{begin}
import gc, json, os, signal, sys, traceback

gc.freeze()
while _told := sys.stdin.readline():
    _child = os.fork()
    if not _child:
        _code = 1
        try:
            signal.alarm({limit})  # ends it
            _told = json.loads(_told)
            for _number, _name in enumerate((os.devnull, *_told["output"])):
                os.dup2(os.open(_name, os.O_RDWR), _number)
            os.environ.update(_told["environment"])
            exec(compile(_told["program"], "<string>", "exec"), globals())
            _code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_code)
    print(os.waitpid(_child, 0)[1], flush=True)
"""


class Forks:
    """Processes that are forked from one that has run `begin`: for what takes long and is the same in all of them.

    What differs from one process to another is the same in all forks of one, as is how it hashes strings.
    """

    def __init__(self, begin: str, **environment: str) -> None:
        self._begin, self._given, self._server = textwrap.dedent(begin), environment, None

    def output_of(self, program: str, **environment: str) -> str:
        program = textwrap.dedent(program)
        if torch.cuda.is_available():  # CUDA is not forked
            return output_of(f"{self._begin}\n{program}", **self._given, **environment)
        if self._server is None:
            self._server = subprocess.Popen(
                _command(SERVER.format(begin=self._begin, limit=LIMIT)),
                env=_environment(self._given),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        with tempfile.TemporaryDirectory() as folder:
            out, err = files = [Path(folder, name) for name in ("out", "err")]
            for file in files:
                file.touch()
            told = {"program": program, "environment": environment, "output": [str(file) for file in files]}
            print(json.dumps(told), file=self._server.stdin, flush=True)
            code = self._server.stdout.readline().strip()
            assert code == "0", code + err.read_text()
            return out.read_text()

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()  # the end of its input is its end
