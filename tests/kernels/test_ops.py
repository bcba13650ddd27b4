"""The custom ops as torch.compile sees them, and the rendered sources."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from kernel_cases import arguments, each, outputs
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from flashdp_compile.kernels import FAMILIES, codegen


@pytest.mark.parametrize("name", FAMILIES)
def test_opcheck(name, device):
    torch.library.opcheck(FAMILIES[name].op.default, arguments(FAMILIES[name], FAMILIES[name].cases[0], device=device))


@pytest.mark.parametrize("name", FAMILIES)
def test_fake_takes_sizes_that_nobody_knows(name):
    args = arguments(FAMILIES[name], FAMILIES[name].cases[0])
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):

        def unbacked(t):
            if t.dim() == 1 and t.dtype == torch.int64:
                return torch.empty(2, dtype=torch.int64)  # a noise key
            return torch.empty([shape_env.create_unbacked_symint() for _ in t.shape], dtype=t.dtype)

        results = outputs(FAMILIES[name].op(*each(args, unbacked)))
    for value, real in zip(results, outputs(FAMILIES[name].op(*args)), strict=True):
        assert value.dtype == real.dtype and value.dim() == real.dim()


@pytest.mark.parametrize("name", FAMILIES)
def test_results_are_not_views_of_arguments(name, device):
    smallest = min((case for case in FAMILIES[name].cases if 0 not in case), key=sum)
    args = arguments(FAMILIES[name], smallest, device=device)
    held = set()
    each(args, lambda t: held.add(t.untyped_storage().data_ptr()))
    for path in ("launch", "reference"):
        for value in outputs(getattr(FAMILIES[name], path)(*args)):
            assert value.untyped_storage().data_ptr() not in held


def test_source_is_headed_by_its_specialisation_and_listed(device):
    family = FAMILIES["gram_sqnorms"]
    args = arguments(family, family.cases[0], device=device)
    spec = family.specialise(*args)
    text = codegen.source(family, spec)
    assert text.startswith("# flashdp kernel gram_sqnorms") and "Tiles(rows=64" in text.splitlines()[1]
    family.launch(*args)
    assert codegen.rendered()["gram_sqnorms", spec] == text
    assert "g1_ptr" not in text
    assert "g1_ptr" in codegen.source(family, family.specialise(*arguments(family, (1, 1, 3, 1, 1, 1))))


def test_only_the_user_can_write_where_kernels_are_imported_from(tmp_path, monkeypatch):
    monkeypatch.setattr(codegen.tempfile, "tempdir", str(tmp_path))
    codegen._folder.cache_clear()
    try:
        path = codegen._written("x = 1\n")
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700 and path.parent.parent == tmp_path
        path.write_text("x = 2\n")  # damaged: it is written again
        assert codegen._written("x = 1\n").read_text() == "x = 1\n"
        path.parent.chmod(0o777)  # anyone could have put a file there
        codegen._folder.cache_clear()
        assert codegen._written("x = 1\n").parent != path.parent
    finally:
        codegen._folder.cache_clear()


def test_importing_the_package_does_not_import_triton():
    code = "import sys, flashdp_compile.kernels; sys.exit('triton' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
