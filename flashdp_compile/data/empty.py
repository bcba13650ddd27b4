"""Batches without samples, of the structure and the dtypes that batches have."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def empty_like_batch(batch: Any) -> Any:
    """The batch with no rows: tensors [B, ...] become [0, ...], with dtype and device; their values are not kept.

    | part of the batch | becomes |
    |---|---|
    | tensor or numpy array with a dimension | without rows |
    | list or tuple of strings, numbers or None | an empty one, as each of them belongs to a row |
    | other lists and tuples, named tuples, mappings (`BatchEncoding` too), dataclasses | the same with empty parts |
    | anything else, such as a scalar or a string on its own | itself: there is one for the batch, not for a row |

    Rows are taken to be the first dimension. A list of tensors is taken for fields, not for one tensor of each row.
    """
    if isinstance(batch, Tensor):
        return batch.new_empty((0, *batch.shape[1:])) if batch.dim() else batch
    if isinstance(batch, np.ndarray):
        return np.empty((0, *batch.shape[1:]), batch.dtype) if batch.ndim else batch
    if isinstance(batch, Mapping):
        return _mapping(batch, {key: empty_like_batch(value) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(empty_like_batch, batch))
    if isinstance(batch, (list, tuple)):
        kind = tuple if isinstance(batch, tuple) else list
        return kind() if all(map(_belongs_to_a_row, batch)) else kind(map(empty_like_batch, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _dataclass(batch)
    return batch


def _belongs_to_a_row(value: Any) -> bool:
    return value is None or isinstance(value, (str, bytes, bool, int, float, complex))


def _mapping(batch: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """By the class's constructor where that takes a dict: a copy would keep what else the object knows of its rows."""
    try:
        return type(batch)(parts)  # type: ignore[call-arg]
    except TypeError:  # a defaultdict, for one
        clone: Any = copy.copy(batch)
        clone.update(parts)
        return clone


def _dataclass(batch: Any) -> Any:
    """Without its constructor, which may take other arguments than the fields, or compute some of them."""
    clone = copy.copy(batch)
    for field in dataclasses.fields(batch):
        object.__setattr__(clone, field.name, empty_like_batch(getattr(batch, field.name)))
    return clone
