"""What Inductor is told about launches: what they write, found out once for equal ones, and what descriptors hold."""

from types import SimpleNamespace

import pytest
import sympy
import torch
import torch._higher_order_ops.triton_kernel_wrap as analysis

from flashdp_compile.compat.launches import analysed_once, descriptors_are_views

NAME = "identify_accessed_tensors" if hasattr(analysis, "identify_accessed_tensors") else "identify_mutated_tensors"


def kernel(constexpr: bool = False) -> SimpleNamespace:
    return SimpleNamespace(params=[SimpleNamespace(is_constexpr=constexpr)])


@pytest.fixture
def analysed(monkeypatch) -> list[dict]:
    """The arguments of every analysis that is made."""
    made: list[dict] = []

    def analyse(kernel, arguments, descriptors):
        made.append(arguments)
        return ["out"]

    monkeypatch.setattr(analysis, NAME, analyse)
    return made


def asked(*launches: tuple) -> list:
    """The answers to questions that are asked while one graph is compiled."""
    return analysed_once(lambda: [getattr(analysis, NAME)(*launch) for launch in launches])()


def test_equal_launches_are_analysed_once(analysed):
    one = kernel()
    x, y = torch.empty(3), torch.empty(5, 7)
    answers = asked(
        (one, {"x": x, "n": 48, "std": 0.5}, {}),
        (one, {"x": y, "n": 64, "std": 0.7}, {}),
        (SimpleNamespace(fn=one), {"x": x, "n": 32, "std": 0.5}, {}),  # an autotuner
    )
    assert len(analysed) == 1
    assert answers == [["out"]] * 3
    assert answers[0] is not answers[1], "whoever changes an answer changes no other"


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.empty(3, dtype=torch.bfloat16), "n": 48},
        {"x": torch.empty(3), "n": 1},
        {"x": torch.empty(3), "n": 47},
        {"x": torch.empty(3), "n": 2**40},
        {"x": torch.empty(3), "n": 48.0},
        {"x": torch.empty(3), "m": 48},
    ],
)
def test_launches_that_triton_compiles_apart_are_analysed_apart(other, analysed):
    one = kernel()
    asked((one, {"x": torch.empty(3), "n": 48}, {}), (one, other, {}))
    assert len(analysed) == 2


@pytest.mark.parametrize("n", [sympy.Symbol("n"), None])
def test_what_is_not_understood_is_analysed_every_time(n, analysed):
    one = kernel()
    asked((one, {"n": n}, {}), (one, {"n": n}, {}))
    assert len(analysed) == 2


def test_other_kernels_other_descriptors_and_compile_time_constants(analysed):
    one, constant = kernel(), kernel(constexpr=True)
    asked((one, {"n": 48}, {}), (kernel(), {"n": 48}, {}), (one, {"n": 48}, {"x": [64]}))
    assert len(analysed) == 3
    asked((constant, {"n": 48}, {}), (constant, {"n": 48}, {}))
    assert len(analysed) == 5


def test_torch_is_left_as_it_was(analysed):
    before = getattr(analysis, NAME)

    def fails():
        assert getattr(analysis, NAME) is not before
        raise RuntimeError("compilation failed")

    with pytest.raises(RuntimeError, match="compilation failed"):
        analysed_once(fails)()
    assert getattr(analysis, NAME) is before


def held(size: int, *readers: str) -> SimpleNamespace:
    return SimpleNamespace(size_alloc=size, size_free=size, succ_nodes=set(readers))


@pytest.mark.parametrize("mutated", [False, True])
@pytest.mark.parametrize("where", ["buffers", "inputs"])
def test_a_descriptor_holds_its_tensor_and_no_memory_of_its_own(where, mutated, monkeypatch):
    """Also where the tensor goes by another name since a launch has written into it."""
    import torch._inductor.memory as memory
    from torch._inductor.ir import TMADescriptor

    node = object.__new__(TMADescriptor)
    object.__setattr__(node, "tensor", SimpleNamespace(get_name=lambda: "x1" if mutated else "x"))
    scheduler = SimpleNamespace(mutation_real_name={"x1": "x"})
    x = SimpleNamespace(node=None, mpi_buffer=held(100, "describe"))
    y = SimpleNamespace(node=None, mpi_buffer=held(30, "launch"))
    descriptor = SimpleNamespace(node=node, scheduler=scheduler, mpi_buffer=held(100, "launch"))
    buffers, inputs = {"d": descriptor, "y": y}, {}
    {"buffers": buffers, "inputs": inputs}[where]["x"] = x
    seen = []
    name = "assign_memory_planning_info_for_scheduler_nodes"
    monkeypatch.setattr(memory, name, lambda *given: seen.append(given))
    before = getattr(memory, name)
    descriptors_are_views(lambda: getattr(memory, name)([], {}, buffers, inputs))()
    assert seen == [([], {}, buffers, inputs)]
    assert getattr(memory, name) is before
    assert x.mpi_buffer == held(100, "describe", "launch")
    assert descriptor.mpi_buffer == held(0, "launch") and y.mpi_buffer == held(30, "launch")
