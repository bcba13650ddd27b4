"""Runs a program in a Python process of its own, away from this process's compiled code, caches and imports."""

import os
import subprocess
import sys
import textwrap


def run(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The finished process; its output is text. The compile cache is a fresh folder unless one is given."""
    environment = {**os.environ, **environment}
    environment.pop("FLASHDP_DEBUG", None)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def output_of(program: str, **environment: str) -> str:
    done = run(program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
