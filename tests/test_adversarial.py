"""Models that mix samples are refused while compiling, with the op and the user's line; nothing is released."""

import copy

import pytest
import torch

from flashdp_compile import FlashDPError
from zoo import REFUSED, coverage


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    refused = REFUSED[name]
    torch._dynamo.reset()
    model = copy.deepcopy(refused.build())
    before = copy.deepcopy(model.state_dict())
    module = torch.compile(
        model, backend="flashdp", fullgraph=True, options={"noise_multiplier": 0.0, "compiler": "eager"}
    )
    with pytest.raises(FlashDPError) as caught:
        output = module(*refused.inputs())
        output.sum().backward()  # reached only if the forward was not refused, and fails the test below
        pytest.fail(f"{name} was compiled and gave gradients")
    text = str(caught.value)
    assert type(caught.value).__name__ in ("Refusal", "InputError")
    # the line "where" quotes the model, which may hold the very words that are looked for
    said = "\n".join(line for line in text.lower().splitlines() if not line.startswith("  where"))
    assert any(word in said for word in refused.words), text
    if "refused_" in (refused.build().function.__code__.co_filename if hasattr(model, "function") else ""):
        assert "refused_" in text, f"the refusal does not name the user's line:\n{text}"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    coverage.rejected(name, caught.value)
