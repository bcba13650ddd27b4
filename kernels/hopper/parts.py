"""What the kernels of this folder have in common, in Gluon. Only their source imports it: it loads Triton.

The ring: `stages` buffers, each with a barrier `full`, which a load completes, and a barrier `empty`, on which both
groups arrive when they have read it. Steps are counted through all tiles of a program; step n uses buffer n % stages,
and the parity of n // stages is the phase that its barriers complete.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
# of a group's half of a tile, [64, 256] in float32
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
# of a group's half of a pair of blocks of 128 tokens
PAIR = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
# and of its left half
NARROW_PAIR = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))


@gluon.jit
def place(number, TILES_D, TILES_P):
    """Where the tile of that number starts: in bands of 8 rows of tiles, for which the other operand stays in the L2
    cache."""
    band = number // (8 * TILES_P)
    inside = number % (8 * TILES_P)
    height = gl.minimum(TILES_D - 8 * band, 8)
    return (8 * band + inside % height) * 128, (inside // height) * 256


@gluon.jit
def pair_of(number):
    """(i, j) with j <= i and i (i + 1) / 2 + j = number; the root in float32 may be off by one."""
    i = ((gl.sqrt(8.0 * number.to(gl.float32) + 1.0) - 1.0) * 0.5).to(gl.int32)
    i = gl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = gl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    return i, number - i * (i + 1) // 2


@gluon.jit
def next_pair(number):
    """What a program computes after the pair of that number, among all pairs: of the next so many, the one that is a
    place further. Those of equal places in their samples take equally long, and programs that always had the short ones
    would run ahead, out of reach of the L2 cache."""
    programs = gl.num_programs(0)
    return gl.where(number % programs == programs - 1, number + 1, number + programs + 1)


@gluon.jit
def barriers(number: gl.constexpr, count: gl.constexpr):
    """So many, each of which `count` arrivals complete."""
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for one in gl.static_range(number):
        mbarrier.init(made.index(one), count=count)
    return made


@gluon.jit
def ring(stages: gl.constexpr):
    """The barriers (full, empty)."""
    return barriers(stages, 1), barriers(stages, 2)


@gluon.jit
def claim(step, full, empty, stages: gl.constexpr):
    """The buffer of a step, once both groups have read it, and the barrier that loads into it complete."""
    stage = step % stages
    mbarrier.wait(empty.index(stage), ((step // stages) & 1) ^ 1)
    return stage, full.index(stage)


@gluon.jit
def load_step(x_desc, g_desc, b, t, d, p, step, xs, gs, full, empty, stages: gl.constexpr):
    """Loads 64 tokens of a sample from t on, for the tile that begins at (d, p): in two halves of x, and of g at
    once."""
    stage, ready = claim(step, full, empty, stages)
    mbarrier.expect(ready, 64 * (128 + 256) * 2)
    tma.async_copy_global_to_shared(x_desc, [b, t, d], ready, xs.index(2 * stage))
    tma.async_copy_global_to_shared(x_desc, [b, t, d + 64], ready, xs.index(2 * stage + 1))
    tma.async_copy_global_to_shared(g_desc, [b, t, p], ready, gs.index(stage))
    return step + 1


@gluon.jit
def loaded(step, full, stages: gl.constexpr):
    """The buffer of a step, once it has been loaded."""
    mbarrier.wait(full.index(step % stages), (step // stages) & 1)
    return step % stages


@gluon.jit
def add_product(total, step, half: gl.constexpr, depth: gl.constexpr, xs, gs, full, stages: gl.constexpr):
    """Starts total += x^T g for the first `depth` of the 64 tokens of a step."""
    stage = loaded(step, full, stages)
    x = xs.index(2 * stage + half).reshape([64, 64]).slice(0, depth, dim=0).permute((1, 0))
    g = gs.index(stage).reshape([64, 256]).slice(0, depth, dim=0)
    return warpgroup_mma(x, g, total, is_async=True)


@gluon.jit
def add_products(
    total, step, tokens, half: gl.constexpr, tail: gl.constexpr, xs, gs, full, empty, stages: gl.constexpr
):
    """total += x^T g for so many tokens, of which the last 64 or less are in the first `tail` of a step.

    Nothing stands between the last product and the wait for it: with a branch there, and a wait for the product before,
    ptxas 12.8 read sums that were still being added to (tests/kernels/test_machine_code.py).
    """
    steps = (tokens + 63) // 64
    for n in range(steps - 1):
        total = add_product(total, step + n, half, 64, xs, gs, full, stages)
        total = warpgroup_mma_wait(1, deps=[total])
        if n > 0:
            leave(step + n - 1, empty, stages)
    total = add_product(total, step + steps - 1, half, tail, xs, gs, full, stages)
    total = warpgroup_mma_wait(0, deps=[total])
    if steps > 1:
        leave(step + steps - 2, empty, stages)
    leave(step + steps - 1, empty, stages)
    return total, step + steps


@gluon.jit
def leave(step, empty, stages: gl.constexpr):
    """This group has read the buffer of a step."""
    mbarrier.arrive(empty.index(step % stages), count=1)


@gluon.jit
def landed(until, step, full, stages: gl.constexpr):
    """Returns when all loads before step `until` have arrived, of which `step` are under way or done: only then may a
    descriptor that they use be written anew. What is further back than the ring is long has arrived, else its buffer
    would not have been claimed again."""
    for back in gl.static_range(1, stages + 1):
        at = step - back
        mbarrier.wait(full.index(gl.where(at < 0, 0, at) % stages), (at // stages) & 1, pred=(at >= 0) & (at < until))
