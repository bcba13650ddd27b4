"""Real data that comes with Python and scikit-learn, so that nothing is downloaded.

What counts as one sample is what the guarantee protects: here one stretch of consecutive characters, or one image.
"""

import importlib.resources
import string
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_digits
from torch import Tensor

# Fixed beforehand, not collected from the text: an alphabet that depends on the data would leak which characters occur.
ALPHABET = "\n" + "".join(c for c in string.printable if c.isprintable())


@dataclass(frozen=True)
class Split:
    """Inputs and targets, one sample per row; the test part shares no document with the training part."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def text(length: int) -> Split:
    """Half a million characters of English: the topics of Python's help() and scikit-learn's descriptions of its data.

    Each document is cut into stretches of `length` characters; the target of each character is the one after it.
    Returns integer tensors [N, length].
    """
    folder = importlib.resources.files("sklearn.datasets.descr")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".rst")), key=lambda f: f.name)
    documents = [*topics.values(), *(f.read_text(encoding="utf-8") for f in files)]
    stretches = [encode(document).unfold(0, length + 1, length) for document in documents if len(document) > 2 * length]
    test = set(_shuffled(len(stretches))[: len(stretches) // 8].tolist())
    rows = [torch.cat([s for i, s in enumerate(stretches) if (i in test) == held_out]) for held_out in (False, True)]
    train, held = ((part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows)
    return Split(train=train, test=held)


def encode(document: str) -> Tensor:
    """Indices into ALPHABET; anything else is dropped, and runs of spaces become one."""
    lines = (" ".join(line.split()) for line in document.splitlines())
    place = {character: index for index, character in enumerate(ALPHABET)}
    return torch.tensor([place[c] for c in "\n".join(lines) if c in place])


def digits() -> Split:
    """1797 handwritten digits of 8 x 8 pixels. Images [N, 1, 8, 8] with values about in [-1, 1], classes [N]."""
    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # fixed constants, not this data's own mean
    y = torch.tensor(classes)
    order = _shuffled(len(y))
    test, train = order[:360], order[360:]
    return Split(train=(x[train], y[train]), test=(x[test], y[test]))


def _shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))
