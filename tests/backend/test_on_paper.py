"""The code that Inductor writes for a GPU, on a machine without one."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch

from backend.processes import Forks
from flashdp_compile.kernels import tuning

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="a torch with CUDA asks the driver; see test_inductor"
)


@functools.cache
def forks() -> Forks:
    """Forked from a process that has written the code of a step: half the time goes to what Inductor prepares once."""
    begin = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import on_paper
    on_paper.prepare()
    """
    settings = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return Forks(begin, **settings, TRITON_INTERPRET="0", OMP_NUM_THREADS="1")  # forks have no pool of threads


@pytest.fixture(scope="module", autouse=True)
def _end():
    yield
    forks().close()


@functools.cache
def on_paper(*arguments: str) -> tuple[str, dict[str, list[str]]]:
    """The code of the backward, and how the early compilations of kernels ended."""
    output = forks().output_of(f"on_paper.main({list(arguments)})")
    _, backward, early = json.loads(output.splitlines()[-1])
    return backward, early


def backward_of(*arguments: str) -> str:
    return on_paper(*arguments)[0]


@pytest.fixture(scope="module", params=["per_layer", "flat"])
def backward(request) -> str:
    """By Triton's kernels, which Inductor launches itself: without those of kernels/hopper."""
    return backward_of(request.param, "auto", "--triton")


def calls(code: str, kernel: str) -> list[list[str]]:
    """The arguments of every launch of a kernel."""
    found = re.findall(rf"^ +flashdp_{kernel}_\d+\.run\((.*), stream=", code, re.MULTILINE)
    return [re.split(r", (?![^(]*\))", arguments) for arguments in found]


def layers_summed(code: str) -> list[list[str]]:
    """Product, weights, result and stream of every layer in every launch of product_sums."""
    found = []
    for arguments in calls(code, "product_sums"):
        parts = iter(
            re.sub(r"reinterpret_tensor\([^)]*\([^)]*\)[^)]*\)[^)]*\)", "view", ", ".join(arguments)).split(", ")
        )
        for first in parts:
            if not first.startswith(("buf", "view")):
                break
            found.append([first, *(next(parts) for _ in range(3))])
    return found


def launches(code: str) -> list[str]:
    """Every call that starts something on the device."""
    started = r"^ +(?:\w+ = )?(\w+\.run\(.*, stream=|extern_kernels\.\w+\(.*|torch\.ops\.\w+\.\w+.*)"
    return re.findall(started, code, re.MULTILINE)


def test_nothing_goes_through_the_dispatcher_but_the_key_and_the_count(backward):
    called = re.findall(r"= torch\.ops\.flashdp\.(\w+)\.default\(", backward)
    assert sorted(called) == ["clip_factors", "draw_key"]


def test_every_linear_layer_is_stored_and_summed_by_launches(backward):
    assert len(calls(backward, "outer_store")) == len(layers_summed(backward)) == 2
    assert len(calls(backward, "embedding_sqnorm")) == len(calls(backward, "embedding_sum")) == 1


def test_warps_and_stages_are_those_of_the_tiles(backward):
    """One layer has wide tiles, the other one small ones, whose settings are Triton's defaults: see tuning.json."""
    found = re.findall(r"^    configs=(\[.*\]),(?:\n(?!def ).*)*?\ndef flashdp_outer_store\(", backward, re.MULTILINE)
    assert sorted(found) == ["[]", "[{'num_warps': 8, 'num_stages': 3}]"]
    assert [e[3:5] for e in tuning._table()["sm_90"]["outer_store"]["16"]] == [[8, 3], [4, 3]]


def test_operands_are_described_with_the_strides_that_they_have(backward):
    """Through TMA descriptors: x and g of [16, 512, .] and the product, in the tiles of tuning.json."""
    described = re.findall(r"TensorDescriptor\.from_tensor\((.*), \[1, (\d+), (\d+)\]\)", backward)
    assert len(described) == 3 * 2
    for tensor, *_ in described:
        if "reinterpret_tensor" in tensor:
            shape, stride = re.findall(r"\((\d+), (\d+), (\d+)\)", tensor)
            assert int(stride[0]) == int(shape[1]) * int(stride[1]) and stride[2] == "1"
            assert int(stride[1]) >= int(shape[2]) and int(stride[1]) % 8 == 0


def test_rows_of_odd_length_are_padded_once(backward):
    """The gradient of the logits is one tensor, which both of its products read."""
    made = re.findall(r"^ +(buf\d+) = empty_strided_cuda\((.*1031.*)\), torch\.bfloat16\)$", backward, re.MULTILINE)
    assert [shape for _, shape in made if shape.startswith(("(8192, 1031)", "(16, 512, 1031)"))] == [
        "(8192, 1031), (1088, 1"
    ]


def test_each_gradient_draws_from_a_stream_of_its_own(backward):
    """The sums and the table draw inside, with one key; norm scale and biases are summed by one launch."""
    streams = [stream for *_, stream in layers_summed(backward)]
    streams += [arguments[1] for arguments in calls(backward, "noise")]
    assert len(streams) == len(set(streams)) == 3 and all(stream.isdecimal() for stream in streams)
    assert len(calls(backward, "vector_sums")) == 1
    drawn = re.search(r"^def flashdp_vector_sums\(key_ptr, std, B, (.*)\):$", backward, re.MULTILINE)
    assert drawn and drawn[1].split(", ") == [f"{name}{n}_ptr" for n in range(3) for name in ("v", "w", "out")]


def test_a_buffer_is_read_only_after_the_launch_that_fills_it(backward):
    lines = backward.splitlines()
    for kernel in ("outer_store", "product_sums", "embedding_sqnorm", "embedding_sum", "noise", "vector_sums"):
        for number, line in enumerate(lines):
            if re.match(rf" +flashdp_{kernel}_\d+\.run\(", line):
                for buffer in re.findall(r"\bbuf\d+\b", line):
                    made = [n for n, text in enumerate(lines) if re.match(rf" +{buffer} = ", text)]
                    assert made and made[0] < number, (kernel, buffer)


@pytest.mark.parametrize("strategy, norm", [("gram", "gram_sqnorms"), ("outer", "outer_sqnorm")])
def test_weighted_products_are_summed_in_runs(strategy, norm):
    """One layer is cut into too few tiles for 132 processors: runs of samples, then their sum, with weights of one."""
    code = backward_of("flat", strategy, "--triton")
    assert len(calls(code, norm)) == len(calls(code, "weighted_matmuls")) == 2
    assert len(calls(code, "product_sums")) >= 1


def test_kernels_in_gluon_are_called_with_operands_as_they_lie():
    """Rows of the logits' gradient are padded once here as well: no second tensor of that size."""
    code, early = on_paper("flat", "gram", "--early")
    called = re.findall(r"= torch\.ops\.flashdp\.(\w+)\.default\(", code)
    assert {*called} - {"clip_factors", "draw_key"} == {"gram_sqnorm", "weighted_matmul"}
    assert len(re.findall(r"empty_strided_cuda\(\(16, 512, 1031\)|empty_strided_cuda\(\(8192, 1031\)", code)) == 1
    assert "(16, 512, 1031), (557056, 1088, 1)" in code
    names = {"flashdp_gram_sqnorms", "flashdp_weighted_matmuls", "flashdp_product_sums"}
    assert names <= {*early} and all(error == "None" for errors in early.values() for error in errors), early


def test_products_in_gluon_are_stored_by_one_call_and_summed_by_launches():
    code = backward_of("per_layer", "auto", "--blocks=3", "--limit=10")
    assert re.findall(r"= torch\.ops\.flashdp\.(outer_\w+)\.default\(", code) == ["outer_stores"]
    assert not calls(code, "outer_store")
    assert len(calls(code, "product_sums")) == 1
    assert len({stream for *_, stream in layers_summed(code)}) == 6


def test_layers_that_are_clipped_by_themselves_take_no_launches_for_it():
    """Weights come from one launch for the linear layers, whose sums are one launch as well, and from another for norm
    scales and biases. Left are the norms: a launch for each product, one for the table and one for biases."""
    blocks, samples = 3, 16
    settings = f"--blocks={blocks}", "--limit=10"
    flat, code = (backward_of(clipping, "auto", *settings) for clipping in ("flat", "per_layer"))
    assert len(calls(code, "group_weights")) == 2
    assert len(calls(code, "vector_sums")) == len(calls(code, "product_sums")) == 1
    assert not calls(code, "vector_sqnorms") and not calls(flat, "group_weights")
    of_samples = [line for line in launches(code) if re.search(rf"^triton_.*, {samples}(, \d+)?, stream=$", line)]
    assert len(of_samples) <= 2 * blocks + 2
    assert len(launches(code)) <= len(launches(flat)) + 1


def test_the_count_of_bad_samples_copies_the_norms_of_a_launch_at_once():
    code = backward_of("per_layer", "auto", "--blocks=3", "--limit=10")
    sqnorms = [arguments[1] for arguments in calls(code, "group_weights")]
    readers = [line for line in launches(code) if line.startswith("triton_") and any(f"{s}, " in line for s in sqnorms)]
    assert len(readers) == 1 and all(f"{s}, " in readers[0] for s in sqnorms)


def test_a_head_whose_products_are_made_by_samples_is_one_call():
    """The norms of its bias are known before, and the weights of this bias come from the norms that the call gives."""
    code = backward_of("per_layer", "auto", "--triton", "--parts")
    (made,) = re.findall(r"(\w+) = torch\.ops\.flashdp\.clipped_product\.default\(", code)
    (norms,) = re.findall(rf"(\w+) = {made}\[1\]", code)
    assert len(calls(code, "outer_store")) == 1
    assert any(norms in arguments for kernel in ("group_weights", "clip_weights") for arguments in calls(code, kernel))
