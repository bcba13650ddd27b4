"""What the tests of layers found, and the tables that docs/layers.md makes of it.

    FLASHDP_COVERAGE=docs/coverage pytest tests/test_exactness.py tests/test_adversarial.py tests/test_modes.py \\
        tests/generate/test_generated_layers.py
    PYTHONPATH=.:tests python -m zoo.coverage       puts the files into order and writes the tables anew

Results of one case and one setting are one line: the largest error, the longest release.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import found
from zoo import CASES, REFUSED

PAGE = found.DOCS / "layers.md"
TWIN = "_all_8"  # of a case, with all sizes equal
SETTINGS = ("flat", "per_layer", "groups", "bf16 autocast", "one sample")


def exact(case: str, setting: str, error: float) -> None:
    """`error`: the largest relative error of a parameter's gradient."""
    found.record("layers", case=case.removesuffix(TWIN), setting=setting, value=error)


def bounded(case: str, part: float) -> None:
    """`part`: the longest release of one sample, in units of the bound."""
    found.record("layers", case=case.removesuffix(TWIN), setting="one sample", value=part)


def refused(case: str, refusal: Exception) -> None:
    """Of a case that may be refused as well as exact."""
    found.record("layers", case=case.removesuffix(TWIN), setting="refused", text=found.what(refusal))


def rejected(model: str, refusal: Exception) -> None:
    """Of a model that has to be refused."""
    found.record("layers", model=model, text=found.what(refusal))


def drawn(kind: str, number: int, outcome: str) -> None:
    """`outcome` of a random model that begins with this kind of layer: "exact", "unresolved" or why it is refused."""
    found.record("layers", kind=kind, number=number, text=outcome)


def mode(name: str, outcome: str) -> None:
    found.record("layers", mode=name, text=outcome)


def merged(lines: Iterable[found.Line]) -> list[found.Line]:
    """One line for each case and setting, each random model and each mode; numbers are the largest."""
    result: dict[tuple, found.Line] = {}
    for line in lines:
        key = tuple(line.get(name) for name in ("case", "setting", "model", "kind", "number", "mode"))
        before = result.get(key, line)
        result[key] = {**line, "value": max(line["value"], before["value"])} if "value" in line else line
    position = {name: n for n, name in enumerate([*CASES, *REFUSED])}

    def order(line: found.Line) -> tuple[Any, ...]:
        first = position.get(line.get("case") or line.get("model"), len(position))
        return (
            first,
            "model" in line,
            line.get("setting", ""),
            line.get("kind", ""),
            line.get("number", 0),
            line.get("mode", ""),
        )

    return sorted(result.values(), key=order)


def lines() -> list[found.Line]:
    return [line for path in found.files("layers") for line in found.lines(path)]


def cases(read: list[found.Line]) -> list[list[str]]:
    """A row for each case, by the file of tests/zoo that it is in."""
    of_case: dict[str, dict[str, found.Line]] = defaultdict(dict)
    for line in read:
        if line.get("case") in CASES:
            of_case[line["case"]][line["setting"]] = line
    result = []
    for name, own in of_case.items():
        cells = [_cell(setting, own[setting]) if setting in own else "" for setting in SETTINGS]
        if "refused" in own:
            cells = [f"refused: {own['refused']['text']}", *cells[1:]]
        result.append([Path(inspect.getsourcefile(CASES[name].build)).stem, name.replace("_", " "), *cells])
    return sorted(result, key=lambda row: row[0])


def _cell(setting: str, line: found.Line) -> str:
    return f"{line['value']:.6f} C" if setting == "one sample" else f"{line['value']:.0e}"


def refusals(read: list[found.Line]) -> list[list[str]]:
    return [[line["model"].replace("_", " "), line["text"]] for line in read if line.get("model") in REFUSED]


def random_layers(read: list[found.Line]) -> list[list[str]]:
    """How many models that begin with each kind of layer are exact, and the reasons for which the others are not."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for line in read:
        if "kind" in line:
            outcomes[line["kind"]][line["text"]] += 1
    result = []
    for kind, counts in outcomes.items():
        of_exact, unresolved = counts.pop("exact", 0), counts.pop("unresolved", 0)
        reasons = "; ".join(sorted(counts))
        total = of_exact + unresolved + counts.total()
        result.append([kind.replace("_", " "), str(total), str(of_exact), str(unresolved or ""), reasons])
    return result


def modes(read: list[found.Line]) -> list[list[str]]:
    return [[line["mode"], line["text"]] for line in read if "mode" in line]


def filled(page: str) -> str:
    read = lines()
    tables = {
        "cases": (("tests/zoo/", "case", *SETTINGS), cases(read)),
        "modes": (("mode", "outcome"), modes(read)),
        "refused": (("model", "refused: what"), refusals(read)),
        "random": (("first layer", "models", "exact", "not resolved", "refused: what"), random_layers(read)),
    }
    for name, (header, rows) in tables.items():
        page = found.filled(page, name, found.table(header, rows))
    return page


def main() -> None:
    for path in found.files("layers"):
        found.write(path, merged(found.lines(path)))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
