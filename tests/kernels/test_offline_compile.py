"""Every kernel compiles to machine code for sm_90 without a GPU. Run as a script, this file does the compiling."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from machine_code import disassembled, early_reads

from flashdp_compile.kernels import FAMILIES, clip, hopper, product_sums, tuning

MATRIX = [name for name, family in FAMILIES.items() if family.tiled]
# the Triton of outer_stores is outer_store's, and clipped_product launches that and product_sums
OTHERS = [family for name, family in FAMILIES.items() if name not in ("outer_stores", "clipped_product")]
# also with noise, and with layers of two kinds; 197 tokens end in a block of 16
WARP_SPECIALISED = (
    ("gram_sqnorm", (2, 197, 1024, 2048)),
    ("weighted_matmul", (2, 197, 1024, 2048)),
    ("weighted_matmuls", (2, 256, 768, 768)),
    ("weighted_matmuls", (2, 197, 768, 2304, 3072, 768)),
    ("gram_sqnorms", (2, 197, 2, 768, 2304, 3072, 768)),
    ("outer_stores", (2, 197, 768, 2304, 3072, 768, 768, 768)),
)
ESTIMATES = ("sketch_sqnorm", "tied_sketch_sqnorm", "hutchpp_sqnorm")
NAMES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64"}


def signature(kernel, args, number):
    def kind(a):
        if hasattr(a, "block_shape"):
            return f"tensordesc<{NAMES[str(a.base.dtype)[6:]][1:]}{list(a.block_shape)}>"
        if hasattr(a, "dtype"):
            return NAMES[str(a.dtype)[6:]]
        return number if isinstance(a, float) else "i32"

    return {name: kind(a) for name, a in zip(kernel.arg_names, args, strict=True)}


def compile_all() -> None:
    import torch
    import triton
    from kernel_cases import arguments
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import JITFunction

    launches = []
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **options: launches.append((kernel, args, options))
    tuning.architecture = lambda device: "sm_90"
    tuning.processors = lambda device: 1
    hopper.available = lambda device: False
    for family in OTHERS:
        for dtype, layout in ((torch.float32, "contiguous"), (torch.bfloat16, "last_strided")):
            family.launch(*arguments(family, family.cases[1], dtype, layout=layout))
    for name in MATRIX:
        for p in (2048, 2049):  # rows that descriptors can read, and rows that they cannot
            FAMILIES[name].launch(*arguments(FAMILIES[name], (2, 256, 1024, p), torch.bfloat16))
    wide = arguments(FAMILIES["outer_store"], (1, 64, 4096, 4096), torch.bfloat16)
    FAMILIES["outer_store"].launch(*wide)
    x, g, weights = arguments(FAMILIES["weighted_matmul"], (2, 256, 1024, 2048), torch.bfloat16)
    FAMILIES["weighted_matmul"].launch(x, g, weights, torch.zeros(2, dtype=torch.int64), 1, 0.5)
    sketched = arguments(FAMILIES["sketch_sqnorm"], (2, 256, 1024, 2048, 512), torch.bfloat16)
    FAMILIES["sketch_sqnorm"].launch(*sketched[:-1], 64)
    ids, g, weights, rows = arguments(FAMILIES["embedding_sum"], (2, 65, 129, 9), torch.bfloat16)
    FAMILIES["embedding_sum"].launch(ids, g, weights, rows, torch.zeros(2, dtype=torch.int64), 1, 0.5)  # two kernels
    products, *rest = arguments(FAMILIES["product_sums"], (2, 65, 129), torch.bfloat16)
    product_sums.launch(products, *rest, onto=[torch.zeros(65, 129)])
    counter, sqnorm = torch.zeros((), dtype=torch.int64), torch.ones(3)
    for fn in clip.FUNCTIONS:
        clip.launch(counter, sqnorm, 1.0, fn, torch.tensor(1.0) if fn == "hard" else 1.0, 2.0)
    clip.launch(counter, sqnorm, 1.0, "hard", 1.0, 2.0, others=torch.ones(3, 2), least=clip.LEAST)
    *parts, _, mean, expected = arguments(FAMILIES["group_weights"], FAMILIES["group_weights"].cases[1])
    for fn in clip.FUNCTIONS:
        FAMILIES["group_weights"].launch(*parts, fn, mean, expected)
    hopper.available = lambda device: True
    for name, case in WARP_SPECIALISED:
        for dtype in (torch.bfloat16, torch.float16):
            FAMILIES[name].launch(*arguments(FAMILIES[name], case, dtype))
    knobs.nvidia.dump_ptxas_log = True
    known: dict[str, dict] = {}
    for kernel, args, options in launches:
        # Inductor's code hands numbers over in 64 bits
        number = "fp64" if "group_weights" in kernel.fn.__name__ else "fp32"
        kind = GluonASTSource if kernel.is_gluon() else ASTSource
        source = kind(fn=kernel, signature=signature(kernel, args, number), constexprs={})
        with contextlib.redirect_stdout(io.StringIO()) as log:
            built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        if built.hash not in known:  # several launches are of one kernel
            found = {"name": kernel.fn.__module__, "shared": built.metadata.shared, "gluon": kernel.is_gluon()}
            known[built.hash] = {**found, **described(built, log.getvalue())}
        print(json.dumps(known[built.hash]))


def described(built, log: str) -> dict:
    """Which units a kernel uses, the bytes that its registers spill, and which sums it reads too early."""
    ptx = built.asm["ptx"]
    assert "bytes spill" in log, log
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    wgmma = "wgmma.mma_async" in ptx
    early = early_reads(disassembled(built.asm["cubin"])) if wgmma else []  # what others add is there at once
    return {"wgmma": wgmma, "tma": "cp.async.bulk.tensor" in ptx, "spilled": spilled, "early": early[:4]}


def test_every_kernel_compiles_for_sm_90(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])  # this checkout, whatever else is installed
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    for kernel in built:
        assert kernel["shared"] <= 227 * 1024 and not kernel["early"], kernel
    gluon = [kernel for kernel in built if kernel["gluon"]]
    assert len(gluon) == 2 * len(WARP_SPECIALISED)
    for kernel in gluon:  # what spills is outside of the loop that multiplies: a warp that loads has 40 registers
        assert kernel["tma"] and kernel["wgmma"], kernel
        assert kernel["spilled"] <= (160 if "outer_stores" in kernel["name"] else 64), kernel
    estimates = [kernel for kernel in built if re.search("flashdp_(project|sketch|draw_probes)_", kernel["name"])]
    for name in ("project", "sketch"):  # with 64 probes, and rows that descriptors can read
        widest = max((k for k in estimates if f"_{name}_" in k["name"]), key=lambda kernel: kernel["shared"])
        assert widest["tma"] and widest["wgmma"] and not widest["spilled"], widest
    built = [kernel for kernel in built if kernel not in estimates]
    beside = re.compile("add_noises|guarded_sums")  # of weighted sums and of norms
    built = [kernel for kernel in built if not kernel["gluon"] and not beside.search(kernel["name"])]
    assert len(built) == 2 * (len(OTHERS) - len(ESTIMATES)) + 2 * len(MATRIX) + 6 + 2 * len(clip.FUNCTIONS), done.stdout
    fast = [kernel for kernel in built if kernel["tma"]]
    assert len(fast) == 2 * len(MATRIX) + 2, done.stdout  # one operand of an unaligned product is aligned
    for kernel in fast:
        assert kernel["wgmma"], kernel
    clean = [kernel for kernel in fast if kernel["spilled"] == 0]
    assert len(clean) >= len(MATRIX) + 1, done.stdout  # all whose operands are aligned; noise may spill, at the end


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    compile_all()
