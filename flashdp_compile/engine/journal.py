"""A file that knows how many steps may have been spent, whatever happens to the process.

Steps are written down before they are taken, `RESERVED` at a time, as a file that is flushed for every step would slow
training down. What a process that dies has reserved counts as spent: too much is counted, never too little.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from flashdp_compile.checks import first_difference
from flashdp_compile.errors import OptionError

RESERVED = 16


class Journal:
    """`spent` steps of a run with this configuration, from the file if there is one."""

    def __init__(self, path: str | os.PathLike[str], configuration: dict[str, Any]) -> None:
        self.path = Path(path)
        self._configuration = json.loads(json.dumps(configuration))
        self.spent = 0
        if self.path.exists():
            try:
                held = json.loads(self.path.read_text())
                known, self.spent = held["configuration"], int(held["spent"])
            except (ValueError, KeyError, TypeError) as error:
                raise OptionError(f"journal={str(self.path)!r} cannot be read as a journal ({error})") from error
            if (name := first_difference(known, self._configuration)) is not None:
                raise OptionError(
                    f"journal={str(self.path)!r} belongs to a run with {name}={known.get(name)!r}, this one has "
                    f"{self._configuration.get(name)!r}: a run is resumed as it was begun, or has a file of its own"
                )
        self._reserved = self.spent
        self._lock = self._locked()

    def _locked(self) -> Any:
        """A lock that no other process or journal has, as long as this one lives: two would each count for itself."""
        try:
            lock = self.path.with_name(f"{self.path.name}.lock").open("w")
        except OSError as error:
            raise OptionError(f"journal={str(self.path)!r} cannot be written ({error})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OptionError(f"journal={str(self.path)!r} is in use by another run") from error
        return lock

    def reserve(self, steps: int, limit: int | None) -> None:
        """Returns once the file says that `steps` may have been spent."""
        if steps > self._reserved:
            ahead = steps - 1 + RESERVED
            self._write(max(steps, ahead if limit is None else min(ahead, limit)))

    def settle(self, steps: int) -> None:
        """Gives back what was reserved and not spent."""
        if self._reserved != steps:
            self._write(steps)

    def _write(self, steps: int) -> None:
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        with draft.open("w") as file:
            json.dump({"configuration": self._configuration, "spent": steps}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._reserved = steps
