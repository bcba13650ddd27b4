"""A batch without rows has the structure and the dtypes of one with rows."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from flashdp_compile.data import empty_like_batch

Pair = namedtuple("Pair", "x y")
X = torch.ones(2, 3, dtype=torch.bfloat16)
NONE = torch.empty(0, 3, dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Record:
    x: Tensor
    names: list[str]
    length: Any = field(init=False, default=None)


class Encoding(UserDict):
    def __init__(self, data, secret=None):
        super().__init__(data)
        self.secret = secret


def same(a, b):
    """Equal in type, structure, values, shapes and dtypes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, (dict, UserDict)):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Record):
        return all(same(getattr(a, name), getattr(b, name)) for name in ("x", "names", "length"))
    return a == b


@pytest.mark.parametrize(
    "batch, expected",
    [
        (X, NONE),
        (torch.ones(4), torch.empty(0)),
        (torch.tensor(3.0), torch.tensor(3.0)),
        (np.ones((2, 3), np.int16), np.empty((0, 3), np.int16)),
        (np.float64(3), np.float64(3)),
        ([X, X.long()], [NONE, NONE.long()]),
        ((X, X), (NONE, NONE)),
        ({"x": X, "name": ["a", "b"]}, {"x": NONE, "name": []}),
        ([("a", "b"), (1, 2)], [(), ()]),
        ([None, 1.5, b"c", True], []),
        ([], []),
        (Pair(X, ["a"]), Pair(NONE, [])),
        (OrderedDict(b=X, a=X), OrderedDict(b=NONE, a=NONE)),
        (defaultdict(list, x=X), defaultdict(list, x=NONE)),
        (Record(X, ["a"]), Record(NONE, [])),
        (Encoding({"x": X, "more": {"y": (X,)}}), Encoding({"x": NONE, "more": {"y": (NONE,)}})),
        ("one for the batch", "one for the batch"),
        ({"x": X, "causal": True, "mask": None}, {"x": NONE, "causal": True, "mask": None}),
        ([X, None], [NONE, None]),
    ],
)
def test_structures(batch, expected):
    assert same(empty_like_batch(batch), expected)


def test_the_batch_itself_stays_as_it_is():
    record, mapping = Record(X, ["a"]), defaultdict(list, x=[1, 2])
    empty_like_batch([record, mapping])
    assert record.x is X and record.names == ["a"] and mapping["x"] == [1, 2]


def test_no_value_is_kept_beside_the_rows():
    assert empty_like_batch(torch.ones(2, 3)).untyped_storage().nbytes() == 0
    assert empty_like_batch(Encoding({"x": X}, secret="row 0")).secret is None


def test_a_mapping_that_cannot_be_changed():
    assert same(dict(empty_like_batch(MappingProxyType({"x": X}))), {"x": NONE})


def test_a_batch_of_transformers():
    transformers = pytest.importorskip("transformers")
    found = empty_like_batch(transformers.BatchEncoding({"input_ids": X.long(), "text": ["a", "b"]}))
    assert type(found) is transformers.BatchEncoding
    assert same(dict(found), {"input_ids": NONE.long(), "text": []})


def test_whatever_torch_collates():
    rows = [{"x": torch.ones(3), "y": (1, "a"), "z": [Pair(1.5, np.ones(2))]} for _ in range(2)]
    full, empty = default_collate(rows), empty_like_batch(default_collate(rows))
    assert empty["x"].shape == (0, 3) and full["x"].shape == (2, 3)
    number, names = empty["y"]
    assert number.dtype == torch.int64 and number.shape == (0,) and len(names) == 0
    (pair,) = empty["z"]
    assert type(pair) is Pair and pair.x.dtype == torch.float64 and pair.y.shape == (0, 2)


def test_the_device_is_kept():
    assert empty_like_batch(torch.ones(2, 3, device="meta")).device.type == "meta"
