"""A function of this folder, called in a fresh process with caches of its own.

One process each: peaks of memory, compile caches and the state of the device are then those of one run alone.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def call(function: str, arguments: dict[str, Any], caches: str | Path) -> dict[str, Any]:
    """What "module:function" returns for these keyword arguments, both as JSON. Compile caches lie in `caches`.

    A call that fails gives {"failed": reason}; its traceback is on stderr.
    """
    caches = Path(caches)
    places = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.processes", function, json.dumps(arguments), str(result)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **places})
        if result.exists():
            return json.loads(result.read_text())
    return {"failed": f"the process ended with code {done.returncode}"}


def main() -> None:
    function, arguments, result = sys.argv[1:]
    module, _, name = function.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        value = {"failed": f"{type(error).__name__}: {first_line}"}
    Path(result).write_text(json.dumps(value))
    sys.exit("failed" in value)


if __name__ == "__main__":
    main()
