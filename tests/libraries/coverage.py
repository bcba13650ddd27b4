"""What the tests of whole models found, and the table that docs/coverage.md makes of it.

    FLASHDP_COVERAGE=docs/coverage/cpu.jsonl pytest tests/libraries    one line more for every test that passes
    PYTHONPATH=.:tests python -m libraries.coverage                    sorts the files and writes the table anew

A file holds what one machine found; a later line replaces an earlier one of the same model and test.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

import libraries

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
FOLDER = PAGE.parent / "coverage"
TABLE = re.compile(r"(?<=<!-- coverage -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)
TESTS = ("flat", "per_layer", "one sample", "labels=")
HEADER = ("model", "made by", "flat", "per_layer", "one sample", "labels=", "run on")
COMPLETE = TESTS[:3]  # what every row has that was run at all

Lines = dict[tuple[str, str], dict[str, Any]]


def record(model: str, test: str, **found: Any) -> None:
    """Adds a line to the file that FLASHDP_COVERAGE names; without it nothing happens."""
    path = os.environ.get("FLASHDP_COVERAGE")
    if path:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        made_by = libraries.MODELS[model].version
        line = {"model": model, "test": test, "made by": made_by, "torch": torch.__version__, "device": where, **found}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def reason(refusal: Exception) -> str:
    """What was refused, without the line of the library that it quotes."""
    return re.search(r"^ *what +(.*?)(?: \(|$)", str(refusal), re.MULTILINE)[1]


def load(path: Path) -> Lines:
    """The last line of each model and test."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(line["model"], line["test"]): line for line in lines}


def rows() -> list[list[str]]:
    """One row for each model and machine, in the order of MODELS; a model that ran nowhere has one too."""
    files = [load(path) for path in sorted(FOLDER.glob("*.jsonl"))]
    found = []
    for model, whole in libraries.MODELS.items():
        ran = [own for file in files if (own := {t: file[model, t] for t in TESTS if (model, t) in file})]
        found += [[whole.title, *_row(own)] for own in ran] or [[whole.title, whole.library, "", "", "", "", "nowhere"]]
    return found


def _row(lines: dict[str, dict[str, Any]]) -> list[str]:
    last = list(lines.values())[-1]
    results = [_result(lines[test]) if test in lines else "" for test in TESTS]
    return [last["made by"], *results, f"{last['device']}, torch {last['torch'].partition('+')[0]}"]


def _result(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"exact, {line['error']:.0e}"
    return f"{line['norm']:.6f} C" if "norm" in line else "refused"


def refusals() -> list[str]:
    """Every reason that was given for a refusal."""
    lines = [line for path in FOLDER.glob("*.jsonl") for line in load(path).values()]
    return sorted({line["refused"] for line in lines if "refused" in line})


def filled(page: str) -> str:
    """The page with its table written anew, and below it what was refused with which words."""
    cells = [list(HEADER), ["---"] * len(HEADER), *rows()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    said = "\n".join(f"- refused: `{text}`" for text in refusals())
    return TABLE.sub(lambda match: f"{table}\n\n{said}", page)


def main() -> None:
    for path in FOLDER.glob("*.jsonl"):
        order = {name: n for n, name in enumerate(libraries.MODELS)}
        lines = sorted(load(path).values(), key=lambda line: (order[line["model"]], TESTS.index(line["test"])))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
