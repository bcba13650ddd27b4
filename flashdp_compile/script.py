"""`flashdp explain script.py`: what flashdp makes of the first model that a script compiles, without training it."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from flashdp_compile.debug import listening
from flashdp_compile.errors import FlashDPError, OptionError
from flashdp_compile.explanation import Explanation, explained
from flashdp_compile.pipeline import Record


class _Seen(BaseException):
    """Ends the script. No handler of ordinary errors catches it."""


def explain_script(path: str | os.PathLike[str], arguments: Sequence[str] = ()) -> tuple[str, Explanation]:
    """Runs a script as if from the command line, until it compiles something that has a backward: its name in the
    user's terms, and the report. What the script prints goes to stderr.

    Raises OptionError if there is no such script, or if it ends before.
    """
    if not Path(path).is_file():
        raise OptionError(f"script={os.fspath(path)!r} is no file")
    found: list[tuple[str, Explanation]] = []

    def listen(label: str, record: Record) -> None:
        error = record.error
        if record.joint is None and error is None:
            return  # an evaluation
        found.append((label, explained(record, error if isinstance(error, FlashDPError) else None)))
        raise _Seen

    before = list(sys.argv), list(sys.path)
    sys.argv[:] = [os.fspath(path), *arguments]
    sys.path.insert(0, str(Path(path).resolve().parent))
    said = ""
    try:
        with listening(listen), contextlib.redirect_stdout(sys.stderr), contextlib.suppress(_Seen):
            runpy.run_path(os.fspath(path), run_name="__main__")
    except SystemExit as end:
        said = "" if end.code is None or isinstance(end.code, int) else f" ({end.code})"
    finally:
        sys.argv[:], sys.path[:] = before
    if not found:
        raise OptionError(
            f"script={os.fspath(path)!r} ended without a backward that flashdp compiled{said}: does it call "
            'torch.compile(model, backend="flashdp"), or a PrivacyEngine\'s compile, and train?'
        )
    return found[0]
