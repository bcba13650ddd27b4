"""Every kernel compiles to machine code for sm_90 without a GPU. Run as a script, this file does the compiling."""

import os
import subprocess
import sys
from pathlib import Path

NAMES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64"}


def signature(kernel, args):
    def kind(a):
        if hasattr(a, "dtype"):
            return NAMES[str(a.dtype)[6:]]
        return "fp32" if isinstance(a, float) else "i32"

    return {name: kind(a) for name, a in zip(kernel.arg_names, args, strict=True)}


def compile_all() -> None:
    import torch
    import triton
    from kernel_cases import arguments
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from flashdp_compile.kernels import FAMILIES, clip

    launches = []
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **options: launches.append((kernel, args, options))
    for family in FAMILIES.values():
        for dtype, layout in ((torch.float32, "contiguous"), (torch.bfloat16, "last_strided")):
            family.launch(*arguments(family, family.cases[1], dtype, layout=layout))
    counter, sqnorm = torch.zeros((), dtype=torch.int64), torch.ones(3)
    for fn in clip.FUNCTIONS:
        clip.launch(counter, sqnorm, 1.0, fn, torch.tensor(1.0) if fn == "hard" else 1.0, 2.0)
    for kernel, args, options in launches:
        source = ASTSource(fn=kernel, signature=signature(kernel, args), constexprs={})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(kernel.fn.__module__, len(built.asm["cubin"]))


def test_every_kernel_compiles_for_sm_90(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 2 * 9 + 3, done.stdout


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    compile_all()
