"""What the tests of whole models found, and the table that docs/coverage.md makes of it.

    FLASHDP_COVERAGE=docs/coverage pytest tests/libraries     see tests/found.py
    PYTHONPATH=.:tests python -m libraries.coverage           sorts the files and writes the table anew

A file holds what one machine found; a later line replaces an earlier one of the same model and test.
"""

import re
from pathlib import Path
from typing import Any

import found
import libraries

PAGE = found.DOCS / "coverage.md"
TESTS = ("flat", "per_layer", "one sample", "labels=")
HEADER = ("model", "made by", "flat", "per_layer", "one sample", "labels=", "run on")
COMPLETE = TESTS[:3]  # what every row has that was run at all

Lines = dict[tuple[str, str], found.Line]


def record(model: str, test: str, **results: Any) -> None:
    found.record("models", model=model, test=test, **{"made by": libraries.MODELS[model].version}, **results)


def reason(refusal: Exception) -> str:
    """What was refused, without the line of the library that it quotes."""
    return re.search(r"^ *what +(.*?)(?: \(|$)", str(refusal), re.MULTILINE)[1]


def load(path: Path) -> Lines:
    """The last line of each model and test."""
    return {(line["model"], line["test"]): line for line in found.lines(path)}


def rows() -> list[list[str]]:
    """One row for each model and machine, in the order of MODELS; a model that ran nowhere has one too."""
    files = [load(path) for path in found.files("models")]
    result = []
    for model, whole in libraries.MODELS.items():
        ran = [own for file in files if (own := {t: file[model, t] for t in TESTS if (model, t) in file})]
        result += [[whole.title, *_row(own)] for own in ran] or [
            [whole.title, whole.library, "", "", "", "", "nowhere"]
        ]
    return result


def _row(lines: dict[str, found.Line]) -> list[str]:
    last = list(lines.values())[-1]
    results = [_result(lines[test]) if test in lines else "" for test in TESTS]
    return [last["made by"], *results, f"{last['device']}, torch {last['torch'].partition('+')[0]}"]


def _result(line: found.Line) -> str:
    if "error" in line:
        return f"exact, {line['error']:.0e}"
    return f"{line['norm']:.6f} C" if "norm" in line else "refused"


def refusals() -> list[str]:
    """Every reason that was given for a refusal."""
    lines = [line for path in found.files("models") for line in load(path).values()]
    return sorted({line["refused"] for line in lines if "refused" in line})


def filled(page: str) -> str:
    """The page with its table written anew, and below it what was refused with which words."""
    said = "\n".join(f"- refused: `{text}`" for text in refusals())
    return found.filled(page, "coverage", f"{found.table(HEADER, rows())}\n\n{said}")


def main() -> None:
    order = {name: n for n, name in enumerate(libraries.MODELS)}
    for path in found.files("models"):
        read = load(path).values()
        found.write(path, sorted(read, key=lambda line: (order[line["model"]], TESTS.index(line["test"]))))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
