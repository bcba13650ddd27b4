"""index_put under vmap against a loop over the samples, for every layout of indices."""

from functools import partial

import pytest
import torch

from flashdp_compile.passes.strategies.batched_put import index_put

B = 3
SHAPE = (4, 5, 6)
# the indices by the shapes they have, and the shape of x[indices]
LAYOUTS = [
    ([(7,)], (7, 5, 6)),
    ([(2, 3)], (2, 3, 5, 6)),
    ([()], (5, 6)),
    ([None, (7,)], (4, 7, 6)),
    ([None, None, (2, 3)], (4, 5, 2, 3)),
    ([None, (2, 1), (3,)], (4, 2, 3)),
    ([(2, 1), (3,)], (2, 3, 6)),
    ([(2, 1), None, (3,)], (2, 3, 5)),
]


@pytest.mark.parametrize("own", ["table", "indices", "values", "indices and values", "all"])
@pytest.mark.parametrize(("shapes", "result"), LAYOUTS)
def test_as_a_loop(shapes, result, own):
    def draw(name, *shape):
        """The samples of values come last, those of others first."""
        if name not in own and own != "all":
            return torch.randn(shape, dtype=torch.float64), None
        return (torch.randn(*shape, B, dtype=torch.float64), -1) if name == "values" else (torch.randn(B, *shape), 0)

    table, table_dim = draw("table", *SHAPE)
    values, values_dim = draw("values", *result)
    lead = (B,) if "indices" in own or own == "all" else ()
    given = [torch.randint(-4, 4, (*lead, *s)) for s in shapes if s is not None]

    def put(function, t, v, *given):
        remaining = iter(given)
        return function(t.double(), [None if s is None else next(remaining) for s in shapes], v, True)

    dims = (table_dim, values_dim, *[0 if lead else None for _ in given])
    together = torch.vmap(partial(put, index_put), in_dims=dims)(table, values, *given)
    for b in range(B):
        sample = [t if d is None else t.select(d, b) for t, d in zip((table, values, *given), dims, strict=True)]
        torch.testing.assert_close(together[b], put(torch.ops.aten.index_put, *sample))


def test_values_are_broadcast():
    table, index = torch.zeros(B, 4, 5), torch.arange(B)
    put = torch.vmap(lambda t, i: index_put(t, [None, i.reshape(1)], torch.ones(()), False))
    assert torch.equal(put(table, index), torch.eye(5)[:B].unsqueeze(1).expand(B, 4, 5))
