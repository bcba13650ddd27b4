"""What tests find, written down for the pages that are made of it.

    FLASHDP_COVERAGE=docs/coverage pytest ...      one line more in TABLE-DEVICE.jsonl for everything that is found

Without the variable nothing is written. A page holds a table between `<!-- NAME -->` and `<!-- end -->`.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOLDER = DOCS / "coverage"

Line = dict[str, Any]


def record(table: str, **found: Any) -> None:
    """Adds a line, with the torch and the device that it was found on."""
    if folder := os.environ.get("FLASHDP_COVERAGE"):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        name = f"{table}-{re.sub(r'[^a-z0-9]+', '-', device.lower())}.jsonl"
        with open(Path(folder) / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({**found, "torch": torch.__version__, "device": device}) + "\n")


def files(table: str) -> list[Path]:
    return sorted(FOLDER.glob(f"{table}-*.jsonl"))


def lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, found: Iterable[Line]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")


def what(refusal: Exception) -> str:
    """What was refused: without the place in the model, the lines of the model that it quotes, and names in a graph."""
    text = str(refusal)
    said = re.search(r"^ *what +(.*)$", text, re.MULTILINE)
    return re.sub(r" \([a-z_0-9]+\)", "", said[1] if said else text.splitlines()[0])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells)


def filled(page: str, name: str, text: str) -> str:
    """The page with `text` as what it holds under that name."""
    held = re.compile(rf"(?<=<!-- {name} -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)
    assert held.search(page), name
    return held.sub(lambda match: text, page)
