"""The record of a kernel family, and its registration as a custom op of torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def tensors(args: tuple) -> Iterator[Tensor]:
    """The tensors among op arguments, those inside lists included."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors(tuple(arg))


def supported(*args: Any) -> bool:
    """True if every floating operand has a dtype that the Triton templates read (16 or 32 bits)."""
    return all(t.dtype in KERNEL_DTYPES for t in tensors(args) if t.is_floating_point())


REMEMBERED = 1000  # geometries, of each family


def geometry(args: tuple | list) -> tuple:
    """All of an op's arguments but the tensors' values: dtypes, sizes, strides, alignment and devices of these."""
    found = list[Any]()
    for arg in args:
        if isinstance(arg, Tensor):
            found.append((arg.dtype, arg.shape, arg.stride(), arg.data_ptr() % 16, arg.device))
        else:
            found.append(geometry(arg) if isinstance(arg, (list, tuple)) else arg)
    return tuple(found)


class Template(NamedTuple):
    """A Triton template alone, for a kernel that is no op of its own."""

    name: str
    template: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One kernel family. All callables take the op's arguments, in the op's order.

    schema      the op's signature in torch's schema language, without the name
    reference   the twin in plain torch: any device, any dtype; float64 in, float64 out
    launch      the Triton version: CUDA tensors, or CPU tensors under TRITON_INTERPRET=1
    fake        shapes and dtypes of the result, with symbolic sizes and no look at data
    supports    whether launch can take these arguments (their device aside)
    stays_op    whether launch takes a kernel in Gluon for them, which Inductor cannot write into its own code
    tiled       whether its operands are matrices, read in the tiles of tuning.json, by descriptors where rows allow
    prepare     what launch does for arguments of this geometry, as a function of the arguments; for those that stay op
    specialise  the frozen dataclass of settings that the template is rendered with
    template    jinja2 text of the Triton source
    cases       shapes for tests; what the numbers mean is the family's own affair
    example     (case, dtype, device, generator) -> arguments
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    fake: Callable[..., Any]
    specialise: Callable[..., Any]
    template: str
    cases: tuple[tuple[int, ...], ...]
    example: Callable[..., tuple]
    supports: Callable[..., bool] = supported
    stays_op: Callable[..., bool] = lambda *args: False
    tiled: bool = False
    prepare: Callable[..., Callable[..., Any]] | None = None
    _chosen: dict[Any, Callable[..., Any]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        op = torch.library.custom_op(f"flashdp::{self.name}", self.run, mutates_args=(), schema=self.schema)
        op.register_fake(self.fake)

    def run(self, *args: Any) -> Any:
        """The op's body: Triton where it applies, else the twin; which is remembered by the arguments' geometry."""
        where = geometry(args)
        if (chosen := self._chosen.get(where)) is None:
            if len(self._chosen) >= REMEMBERED:
                self._chosen.clear()
            chosen = self._chosen[where] = self._choose(*args)
        return chosen(*args)

    def _choose(self, *args: Any) -> Callable[..., Any]:
        if not all(t.is_cuda for t in tensors(args)) or not self.supports(*args):
            return self.reference
        return self.prepare(*args) if self.prepare is not None and self.stays_op(*args) else self.launch

    def compile_early(self, *args: Any) -> None:
        """Compiles, in other threads, what an op that stays one will launch for arguments like these fake ones."""
        if self.prepare is not None:
            self.prepare(*args)(*args)

    @property
    def draws(self) -> bool:
        """Whether the op adds noise to its result, if a key is given."""
        return "Tensor? key=None, int stream" in self.schema

    @property
    def op(self) -> Any:
        return getattr(torch.ops.flashdp, self.name)
