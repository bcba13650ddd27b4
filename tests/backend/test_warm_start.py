"""A second process that finds the caches of a first: it runs no pass, and is as private and as strict as the first."""

import json
import textwrap

import pytest

from backend.processes import Forks

# What takes long in a process that compiles: modules of torch, and asking the compiler what the processor can do.
TORCH = """
import torch._inductor.codecache, torch._inductor.compile_fx, torch._inductor.cpu_vec_isa
torch._inductor.codecache.torch_key()
torch._inductor.cpu_vec_isa.pick_vec_isa()
"""
START = """
import json
import os
import torch
from torch import nn
from torch._dynamo.utils import counters
from flashdp_compile import FlashDPError, InputError, Refusal, UnprotectedGradientError, pipeline
from flashdp_compile.runtime import guard

OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "loss_reduction": "sum"}
torch.manual_seed(0)
passes = []
run = pipeline.run
pipeline.run = lambda graph, record: (passes.append(1), run(graph, record))


class Stopped(FlashDPError):
    pass


def stop(graph, record):  # what follows would take long and is of no interest
    raise Stopped("the passes run")


def compiled(model, **options):
    return torch.compile(model, backend="flashdp", fullgraph=True, options={**OPTIONS, **options})


def outcome(call):
    try:
        return call()
    except FlashDPError as error:
        return f"{type(error).__name__}: {error}"


def report(*found):
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    print(json.dumps({"hits": hits, "passes": len(passes), "found": found}))


"""


@pytest.fixture(scope="module")
def start():
    """Starts a process for a program and a cache folder and gives what it reports: a cold start, or a warm one.

    They are forked from two processes, since what is cached must not depend on how a process hashes strings."""
    kinds = {warm: Forks(TORCH, TORCHINDUCTOR_COMPILE_THREADS="1") for warm in (False, True)}

    def start(program: str, folder, warm: bool = False) -> dict:
        output = kinds[warm].output_of(START + textwrap.dedent(program), TORCHINDUCTOR_CACHE_DIR=str(folder))
        return json.loads(output.splitlines()[-1])

    yield start
    for forks in kinds.values():
        forks.close()


def twice(start, program: str, folder) -> tuple[dict, dict]:
    """The reports of a cold and of a warm start."""
    cold, warm = start(program, folder), start(program, folder, warm=True)
    assert cold["hits"] == 0 and cold["passes"] > 0
    assert warm["hits"] > 0 and warm["passes"] == 0
    return cold, warm


def test_receipts_and_noise(start, tmp_path):
    """One release is stepped on; plain gradients, two releases, and parameters outside of the region are not."""
    cold, warm = twice(
        start,
        """
        model, outside = nn.Linear(5, 3), nn.Linear(3, 3)
        step, x = compiled(model), torch.randn(4, 5)
        optimizer = torch.optim.SGD([*model.parameters(), *outside.parameters()], lr=0.0)

        def after(*backwards):
            optimizer.zero_grad()
            for backward in backwards:
                backward()
            return outcome(lambda: optimizer.step())

        private, plain = lambda: step(x).sum().backward(), lambda: model(x).sum().backward()
        uncovered = lambda: outside(step(x)).sum().backward()
        before = guard.releases()
        judged = [after(private), after(private, private), after(plain), after(private, plain), after(uncovered)]
        released = guard.releases() - before
        private()
        first = model.weight.grad.clone()
        model.zero_grad()
        private()
        report(judged, released, first.tolist(), (model.weight.grad - first).abs().max().item())
        """,
        tmp_path,
    )
    for found in (cold["found"], warm["found"]):
        judged, released, _, difference = found
        assert judged[0] is None and released == 5
        assert all("UnprotectedGradientError" in text for text in judged[1:])
        assert difference > 0.1, "every release draws noise of its own"
    assert warm["found"][0] == cold["found"][0]
    assert warm["found"][2] != cold["found"][2], "a warm start draws noise of its own"


def test_what_is_refused_is_refused_again(start, tmp_path):
    program = """
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    report(outcome(lambda: compiled(Centred(5, 3))(torch.randn(4, 5))))
    """
    cold, warm = start(program, tmp_path), start(program, tmp_path, warm=True)
    for found in (cold, warm):
        assert found["hits"] == 0 and found["passes"] == 1
        assert found["found"][0].startswith("Refusal: flashdp cannot prove that samples are independent")


SCALED = """
class Scaled(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


def scaled(freeze=False, **options):
    torch._dynamo.reset()
    counters.clear()
    model = Scaled(5, 4)
    model.bias.requires_grad_(not freeze)
    found = outcome(lambda: compiled(model, **options)(torch.randn(4, 5), torch.randn(4)).sum().backward())
    return counters["aot_autograd"]["autograd_cache_hit"], found


PUBLIC = {"public_inputs": ["scale"]}
"""


def test_what_is_cached_is_not_taken_for_something_else(start, tmp_path):
    """Options, sources, versions, roles of inputs, and what is trained."""
    twice(start, SCALED + "scaled(**PUBLIC); report()", tmp_path)
    changed = """
    report(scaled())  # the scale may be a sample's data now
    """
    (roles,) = start(SCALED + textwrap.dedent(changed), tmp_path, warm=True)["found"]
    assert roles[0] == 0 and roles[1].startswith("Refusal: flashdp cannot prove that samples are independent")
    changed = """
    found = {"nothing": scaled(**PUBLIC)}
    pipeline.run = stop
    found["a bound"] = scaled(**PUBLIC, max_grad_norm=2.0)
    found["no noise"] = scaled(**PUBLIC, noise_multiplier=0.0)
    found["the debug flag"] = scaled(**PUBLIC, debug=os.environ["TORCHINDUCTOR_CACHE_DIR"] + "/debug")
    found["what is trained"] = scaled(**PUBLIC, freeze=True)
    digest, versions = pipeline.sources_digest, pipeline.versions
    pipeline.sources_digest = lambda: "of other sources"
    found["sources"] = scaled(**PUBLIC)
    pipeline.sources_digest, pipeline.versions = digest, lambda: ["another torch", "another triton"]
    found["versions"] = scaled(**PUBLIC)
    pipeline.versions = versions
    found["nothing, again"] = scaled(**PUBLIC)
    report(found)
    """
    (found,) = start(SCALED + textwrap.dedent(changed), tmp_path, warm=True)["found"]
    assert found.pop("nothing") == found.pop("nothing, again") == [1, None]
    assert len(found) == 6
    for hits, text in found.values():
        assert hits == 0 and text.startswith("Stopped: the passes run")


def test_conditions_on_sizes_hold_for_cached_code(start, tmp_path):
    """A batch of one sample is no case of the code for several: what depends on this is asked in a warm start too."""
    cold, warm = twice(
        start,
        """
        model = nn.Linear(5, 3)
        step = compiled(model, noise_multiplier=0.0)
        norms = []
        for size in (4, 6, 1):
            model.zero_grad()
            x = 100 * torch.ones(size, 5)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            step(x).sum().backward()
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        report(norms)
        """,
        tmp_path,
    )
    for found in (cold, warm):
        assert found["found"][0] == pytest.approx([4, 6, 1], rel=1e-2)
    assert warm["hits"] == cold["passes"]


CENTRED = """
@torch.library.custom_op("example::centre", mutates_args=())
def centre(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x - x.mean(dim, keepdim=True)

centre.register_fake(lambda x, dim: torch.empty_like(x))
centre.register_autograd(
    lambda ctx, grad: (centre(grad, 0), None), setup_context=lambda ctx, inputs, output: None
)

class Centred(nn.Linear):
    def forward(self, x):
        return centre(super().forward(x), 0)

from flashdp_compile.passes.axes.registry import RULES
{rule}
report(outcome(lambda: compiled(Centred(5, 3))(torch.randn(4, 5)).sum().backward()))
"""


def test_a_rule_from_outside_is_asked_again(start, tmp_path):
    """A wrong rule accepted the graph. The process in which it is gone must not go on with what it accepted."""
    wrong = "RULES[torch.ops.example.centre.default] = lambda site, x, dim: x"
    accepted = start(CENTRED.format(rule=wrong), tmp_path)
    assert accepted["found"] == [None] and accepted["passes"] == 1
    refused = start(CENTRED.format(rule=""), tmp_path, warm=True)
    assert (refused["hits"], refused["passes"]) == (0, 1)
    assert "has no rule" in refused["found"][0]
