"""Batches as a training loop gets them: with workers or without, read ahead, cut short, empty, and filled up."""

import logging
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, get_worker_info

from flashdp_compile import accounting
from flashdp_compile.data import PoissonSampler, PrivateLoader, private_loader
from flashdp_compile.errors import OptionError

RUN = {"sample_rate": 0.2, "steps": 10, "physical_batch_size": 3, "seed": 4}
SIZE = 30
WORKERS = [{}, {"num_workers": 2, "prefetch_factor": 4}, {"num_workers": 2, "persistent_workers": True}]
NAMES = ["no workers", "far ahead", "persistent"]
Row = namedtuple("Row", "index name")


class Rows(Dataset):
    """A row is its own index, so that a batch shows which indices were drawn."""

    offset = 0

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return torch.tensor(index + self.offset)


def loader(dataset=None, **changes):
    return private_loader(Rows() if dataset is None else dataset, **{**RUN, **changes})


def drawn(**changes):
    """[(indices, last, steps done, micro-batches)] as the sampler has them."""
    run = {name: value for name, value in {**RUN, **changes}.items() if name != "pad"}
    sampler, found, done, micro = PoissonSampler(SIZE, run.pop("sample_rate"), **run), [], 0, 0
    for batch in sampler:
        last = sampler.received().last
        done, micro = done + last, micro + 1
        found.append((batch, last, done, micro))
        micro = 0 if last else micro
    return found


def take(one, number=None):
    """As `drawn`, of the first batches that the loader gives."""
    found = []
    for batch in one:
        found.append((batch.tolist(), one.last, one.steps_done, one.micro_batches))
        assert one.state_dict()["steps_done"] == one.steps_done
        if len(found) == number:
            break
    return found


@pytest.mark.parametrize("workers", WORKERS, ids=NAMES)
def test_what_is_read_ahead_is_not_yet_there(workers):
    one = loader(**workers)
    assert (one.last, one.steps_done, one.micro_batches) == (False, 0, 0)
    assert take(one) == drawn()
    assert take(one) == []  # the run is over
    assert len(drawn()) > 20 and [] in [batch for batch, *_ in drawn(sample_rate=0.02)]


@pytest.mark.parametrize("workers", WORKERS, ids=NAMES)
@pytest.mark.parametrize("where", ["in the middle", "at the end"])
def test_going_on_with_a_state(workers, where):
    whole = drawn()
    number = next(n for n in range(9, 30) if whole[n - 1][1] == (where == "at the end"))
    one = loader(**workers)
    assert take(one, number) == whole[:number]
    done = whole[number - 1][2]
    rest = [batch for batch in whole if batch[2] - batch[1] >= done]  # the logical batch that was cut short, whole
    assert len(rest) + number > len(whole) or where == "at the end"
    other = loader(**workers)
    other.load_state_dict(one.state_dict())
    assert (other.last, other.steps_done, other.micro_batches) == (False, done, 0)
    assert take(other) == rest
    assert take(one) == rest  # and so does the loader itself


def test_an_older_iteration_has_ended():
    for workers in ({}, {"num_workers": 1, "persistent_workers": True}):
        one = loader(**workers)
        older = iter(one)
        next(older)
        newer = iter(one)
        assert drawn()[0][1] and next(newer).tolist() == drawn()[1][0]  # the first logical batch is a single one
        with pytest.raises(RuntimeError, match="has ended"):
            next(older)
        assert next(newer).tolist() == drawn()[2][0]
        assert one.micro_batches == 2
        one.load_state_dict(loader().state_dict())
        assert (one.last, one.steps_done, one.micro_batches) == (False, 0, 0)
        with pytest.raises(RuntimeError, match="has ended"):
            next(newer)


@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_error_the_logical_batch_begins_anew(workers, tmp_path):
    broken = tmp_path / "broken"
    bad = drawn()[5][0][0]

    class Sometimes(Rows):
        def __getitem__(self, index):
            if index == bad and broken.exists():
                raise ValueError("no such row")
            return torch.tensor(index)

    one = loader(Sometimes(), num_workers=workers)
    broken.touch()
    with pytest.raises(ValueError, match="no such row"):
        take(one)
    broken.unlink()
    done = one.steps_done
    assert take(one) == [batch for batch in drawn() if batch[2] - batch[1] >= done]


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_batches(workers):
    def collate(rows):
        return {"index": torch.stack([row.index for row in rows]), "name": [row.name for row in rows]}

    class Named(Rows):
        def __getitem__(self, index):
            return Row(torch.tensor(index), str(index))

    one = loader(Named(), sample_rate=0.02, collate_fn=collate, num_workers=workers)
    batches = list(one)
    assert [batch["index"].tolist() for batch in batches] == [batch for batch, *_ in drawn(sample_rate=0.02)]
    assert [batch["name"] for batch in batches] == [[*map(str, batch)] for batch, *_ in drawn(sample_rate=0.02)]
    assert {batch["index"].dtype for batch in batches} == {torch.int64}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_filled_batches(workers, rate):
    seen = []

    def collate(rows):
        seen.append(len(rows))
        return torch.stack(rows).tolist()

    one = loader(sample_rate=rate, pad=True, collate_fn=collate, num_workers=workers)
    for (batch, weight), (indices, last, *_) in zip(one, drawn(sample_rate=rate), strict=True):
        filling = [indices[0] if indices else 0] * (3 - len(indices))
        assert batch == indices + filling and one.last == last
        assert weight.dtype == torch.float32
        assert weight.tolist() == [1.0] * len(indices) + [0.0] * len(filling)
    assert set(seen) == (set() if workers else {3})


def test_rows_by_list_as_hugging_face_datasets_give_them():
    class Listed(Rows):
        asked = []

        def __getitems__(self, indices):
            self.asked.append(indices)
            return [{"index": index} for index in indices]

    dataset = Listed()
    batches = [batch["index"].tolist() for batch in loader(dataset, sample_rate=0.02)]
    expected = [batch for batch, *_ in drawn(sample_rate=0.02)]
    assert batches == expected
    assert dataset.asked == [batch or [0] for batch in expected]
    assert all(type(index) is int for indices in dataset.asked for index in indices)


def test_a_list_and_a_subset_are_data_sets():
    expected = [batch for batch, *_ in drawn()]
    assert [batch.tolist() for batch in loader(list(range(SIZE)))] == expected
    assert [batch.tolist() for batch in loader(Subset(Rows(), range(SIZE)))] == expected


def test_workers_are_prepared_and_see_the_users_data_set():
    def prepare(worker):
        get_worker_info().dataset.offset = 1000

    found = take(loader(num_workers=2, worker_init_fn=prepare))
    assert [batch for batch, *_ in found] == [[index + 1000 for index in batch] for batch, *_ in drawn()]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("pad", [False, True])
def test_pinned_memory(pad):
    for batch in loader(TensorDataset(torch.arange(SIZE)), pin_memory=True, pad=pad):
        tensors = (batch[0][0], batch[1]) if pad else batch
        assert all(tensor.is_pinned() == torch.cuda.is_available() for tensor in tensors if len(tensor))


@pytest.mark.parametrize("changes", [{"physical_batch_size": None}, {"physical_batch_size": 4, "cap": 4, "pad": True}])
def test_length(changes):
    one = loader(**changes)
    assert len(one) == 10
    for number, _ in enumerate(one):
        assert len(one) == 10  # for `if number == len(loader) - 1`
        if number == 3:
            break
    assert len(one) == 6
    other = loader(**changes)
    other.load_state_dict(one.state_dict())
    assert len(other) == len(list(other)) == 6
    assert len(other) == 0


def test_no_length_where_it_is_a_matter_of_chance():
    with pytest.raises(TypeError, match="number of micro-batches is random"):
        len(loader())
    assert list(loader())  # which asks for it


def test_the_sampling_for_the_accounting():
    assert loader().sampling == accounting.Poisson(0.2, SIZE)
    assert loader(cap=3).sampling == accounting.TruncatedPoisson(0.2, 3, SIZE)
    assert max(len(batch) for batch, *_ in take(loader(cap=2))) == 2


class Stream(IterableDataset):
    def __len__(self):
        return SIZE

    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    "name, options",
    [
        ("batch_size", {"batch_size": 4}),
        ("shuffle", {"shuffle": True}),
        ("shuffle", {"shuffle": False}),
        ("sampler", {"sampler": range(3)}),
        ("batch_sampler", {"batch_sampler": [[0]]}),
        ("drop_last", {"drop_last": True}),
        ("in_order", {"in_order": False}),
        ("dataset", {"dataset": Stream()}),
        ("dataset", {"dataset": iter([])}),
        ("dataset", {"dataset": []}),
        ("physical_batch_size", {"physical_batch_size": None, "pad": True}),
        ("pad", {"pad": 1}),
        ("sample_rate", {"sample_rate": 2}),
        ("steps", {"steps": -1}),
        ("cap", {"cap": 0}),
    ],
)
def test_refusals(name, options):
    with pytest.raises(OptionError, match=f"^{name}\\b"):
        loader(**options)


def test_what_torch_refuses_it_still_refuses():
    with pytest.raises(TypeError, match="wrokers"):
        loader(wrokers=2)
    assert take(loader(in_order=True)) == drawn()


def test_the_class_takes_a_sampler(caplog):
    with caplog.at_level(logging.WARNING, logger="flashdp_compile"):
        one = PrivateLoader(Rows(), PoissonSampler(SIZE, 0.2, steps=3))
    assert not caplog.records
    assert len(list(one)) == 3 and one.steps_done == 3 and one.sampler.steps_done == 3
    for name, options in {"in_order": {"in_order": False}, "physical_batch_size": {"pad": True}}.items():
        with pytest.raises(OptionError, match=f"^{name}="):
            PrivateLoader(Rows(), PoissonSampler(SIZE, 0.2, steps=3), **options)
    with pytest.raises(OptionError, match="^sample_size=31 .*30 rows"):
        PrivateLoader(Rows(), PoissonSampler(SIZE + 1, 0.2, steps=3))


def test_the_filling_has_no_part_in_the_gradient():
    """Nor does its weight change what the backend makes of a mean: the clipped sum over the expected batch size."""
    run = {"physical_batch_size": 20, "steps": 4, "sample_rate": 0.1}
    bound, expected = 0.5, 6
    x, model = torch.randn(SIZE, 4), nn.Linear(4, 1, bias=False)
    options = {"max_grad_norm": bound, "noise_multiplier": 0.0, "expected_batch_size": expected, "compiler": "eager"}
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    batches = loader(TensorDataset(x), pad=True, **run)
    for ((rows,), weight), (indices, *_) in zip(batches, drawn(**run), strict=True):
        (compiled(rows).square().squeeze(1) * weight).mean().backward()
        own = 2 * model(x[indices]).detach() * x[indices]  # [B, 4], the gradient of each sample
        clipped = own * (bound / own.norm(dim=1, keepdim=True)).clamp(max=1)
        torch.testing.assert_close(model.weight.grad, clipped.sum(0, keepdim=True) / expected, rtol=1e-4, atol=1e-6)
        model.weight.grad = None
