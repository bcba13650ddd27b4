"""docs/layers.md is what the tests of layers found, and leaves out none of them."""

import pytest
import torch

from generate.test_generated_layers import ON_PAGE
from zoo import CASES, REFUSED, coverage
from zoo.schedule import CLIPPINGS, ONCE

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 12), reason="the page is of the torch that CI pins")

ALLOWED = {**dict.fromkeys(CLIPPINGS, 1e-5), "bf16 autocast": 2e-2, "one sample": 1 + 1e-5}


def test_the_page_is_what_was_found():
    page = coverage.PAGE.read_text(encoding="utf-8")
    assert coverage.filled(page) == page, "PYTHONPATH=.:tests python -m zoo.coverage writes it anew"


def test_the_page_leaves_nothing_out():
    lines = coverage.lines()
    settings = {name: {line["setting"] for line in lines if line.get("case") == name} for name in CASES}
    for name, case in CASES.items():
        if "equal" not in case.tags:
            assert settings[name] >= {*CLIPPINGS, "one sample"} or (case.tags & ONCE and settings[name]), name
    assert {line["model"] for line in lines if "model" in line} == set(REFUSED)
    assert {line["number"] for line in lines if "kind" in line} == set(range(ON_PAGE))
    assert all(line["value"] < ALLOWED[line["setting"]] for line in lines if "value" in line)
