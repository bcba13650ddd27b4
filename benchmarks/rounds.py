"""Runs that get ready together and have the device one by one: most of a benchmark is compilation, on one core.

The processes of a round share a folder. Each leaves its mark there once it is ready to be timed, or has ended, and
nobody is timed before all marks are there: until then others compile and run their first steps.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

POLL_S = 0.1
PAUSE_S, TRIES = 5.0, 12  # while others of a round have the memory
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One run's place in a round of `size`; the folder None stands for a run that has the device to itself."""

    folder: str | None = None
    name: str = ""
    size: int = 1

    def leave_mark(self) -> None:
        """The others need not wait for this one any more."""
        if self.folder is not None:
            (Path(self.folder) / f"{self.name}.mark").touch()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other run of the round is within."""
        if self.folder is None:
            yield
            return
        with open(Path(self.folder) / "device", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            yield

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Within, the device is this run's: all others are ready and wait, or have ended."""
        parent = os.getppid()
        while self.folder is not None:
            if os.getppid() != parent or not Path(self.folder).exists():
                raise RuntimeError("the process that began this round has ended")
            self.leave_mark()
            if len(list(Path(self.folder).glob("*.mark"))) >= self.size:
                break
            time.sleep(POLL_S)
        with self.alone():
            yield


ALONE = Place()


def patiently(call: Callable[[], T], place: Place) -> T:
    """What `call` returns; tried again for a while where the others of a round may have had the memory that it lacked.

    Raises:
        torch.OutOfMemoryError: there is not enough, or none of the others gave theirs back.
    """
    for _ in range(TRIES if place.size > 1 else 0):
        try:
            return call()
        except torch.OutOfMemoryError:
            pass  # behind here, so that the frames of the failure and what they hold are gone
        torch.cuda.empty_cache()
        time.sleep(PAUSE_S)
    return call()
