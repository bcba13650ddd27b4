"""Canaries for DP-SGD: each moves coordinates of its own, by the whole bound, and is looked for there (white box)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flashdp_compile.checks import flag, integer, number
from flashdp_compile.engine.privacy_engine import PrivacyEngine
from flashdp_compile.errors import OptionError


class _Layers(nn.Module):
    """The sum of linear layers without bias, of one-hot rows, or of the places of their ones: a lookup."""

    def __init__(self, count: int, layers: int, lookup: bool) -> None:
        super().__init__()
        made = [nn.Embedding(count, 1) if lookup else nn.Linear(count, 1, bias=False) for _ in range(layers)]
        self.layers = nn.ModuleList(made)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        total = self.layers[0](x)
        for layer in self.layers[1:]:
            total = total + layer(x)
        return total.flatten(1)


class DiracCanaries:
    """`count` samples, the i-th of which has a gradient in coordinate i of each of `layers` linear layers, and nowhere
    else: directions are orthogonal, so the guesses do not disturb each other.

    The loss of a sample is plus or minus `gain` times its output, the sign changing with each step. Independent noise
    has no part in which sign is used; noise that is drawn again in the next step cancels, and the canary shows.

    `gain` sqrt(`layers`) is the norm of a canary's gradient, far above any bound, so that clipping is what holds it.
    `lookup` replaces linear layers and one-hot rows, count x count numbers, by embeddings: for many canaries.
    """

    def __init__(self, count: int, *, layers: int = 1, gain: float = 1e3, lookup: bool = False) -> None:
        self.count, self.layers = integer("count", count, 1), integer("layers", layers, 1)
        self.gain = number("gain", gain, positive=True)
        self.lookup = flag("lookup", lookup)

    def model(self) -> nn.Module:
        """All zero at the start; its gradient does not depend on its parameters."""
        return _Layers(self.count, self.layers, self.lookup)

    def samples(self, included: Tensor) -> Tensor:
        """The inputs of the canaries that take part."""
        ids = included.nonzero().flatten()
        return ids[:, None] if self.lookup else nn.functional.one_hot(ids, self.count).float()

    def scores(self, engine: PrivacyEngine, included: Tensor, steps: int) -> Tensor:
        """Trains by SGD on all that are included, in every step, and gives for each canary the inner product of the
        parameters' movement in a step with its direction, summed over the steps: the best test there is for
        independent noise.

        The engine must be new, and made with `sampling=accounting.Fixed(1)`: every sample is in every step.
        """
        if not bool(included.any()):
            return torch.zeros(self.count)
        if engine.steps_done:
            raise OptionError(f"the engine has taken {engine.steps_done} steps: an audit needs one for itself")
        model = self.model()
        compiled = engine.compile(model)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
        parts = self.samples(included).tensor_split(engine.micro_batches)
        found = torch.zeros(self.count)
        for step in range(integer("steps", steps, 1)):
            before, sign = copy.deepcopy(model.state_dict()), -1 if step % 2 else 1
            for part in parts:
                (sign * self.gain * compiled(part).sum(1)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, now in model.state_dict().items():
                found += sign * (before[name] - now).flatten()
        return found
