"""Noise onto several tensors in one launch, in place: to each what add_noise would add for its stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from flashdp_compile.kernels import several
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import Launch, cdiv
from flashdp_compile.kernels.family import Template
from flashdp_compile.kernels.gaussian import word


@dataclass(frozen=True)
class Spec:
    kinds: tuple[int, ...]  # how many tensors are of each
    block: int = 256


# What Triton compiles knows nothing of the streams: it serves others as well.
TEMPLATE = Template(
    "add_noises",
    """
{%- set names = ["grad_ptr"], ["noise_stream"], ["PROGRAMS", "N"], [], kinds -%}
import triton
import triton.language as tl


@triton.jit(do_not_specialize=[{% for layer in range(kinds | sum) %}"noise_stream_{{ layer }}", {% endfor %}])
def kernel(
    {{ parameters(*names) | indent(4) -}}
    {{ "    " }}key_ptr, std,
):
    {{ selected("tl.program_id(0)", *names) | indent(4) }}
    first = number.to(tl.int64) * {{ block }}
    {{ draw_normals("first + tl.arange(0, %d)" % block, "%d, 4" % block) | indent(4) }}
    n = 4 * i[:, None] + tl.arange(0, 4)[None, :]
    grad = tl.load(grad_ptr + n, mask=n < N, other=0.0)
    tl.store(grad_ptr + n, grad + tl.full([], std, tl.float32) * normals, mask=n < N)
""",
)


def add_noises(grads: list[Tensor], key: Tensor, streams: Sequence[int], std: float) -> None:
    """`grads` are contiguous float32 tensors; key and streams as of add_noise."""
    prepare(grads)(grads, key, streams, std)


def prepare(grads: list[Tensor]) -> Callable[[list[Tensor], Tensor, Sequence[int], float], None]:
    """add_noises for tensors of these sizes."""
    by_kind = several.kinds(grads)
    spec = Spec(tuple(map(len, by_kind)))
    programs = [cdiv(t.numel(), 4 * spec.block) for t in grads]
    common = [(programs[numbers[0]], grads[numbers[0]].numel()) for numbers in by_kind]
    launch = Launch(kernel(TEMPLATE, spec), sum(programs))

    def add(grads: list[Tensor], key: Tensor, streams: Sequence[int], std: float) -> None:
        own = [(grad, word(stream)) for grad, stream in zip(grads, streams, strict=True)]
        launch(key, *several.arguments(own, common, by_kind), key, float(std))

    return add
