import pytest

from ranks.processes import Pool, temporary

# Near relatives of others, for `make test-full`: processes that wait for each other are slow on two cores.
RELATIVES = (
    "test_sums_of_all_ranks[none-2]",
    "test_sums_of_all_ranks[none-4]",
    "test_sums_of_all_ranks[inside-4]",
    "test_a_loader_gives_the_run_of_one_rank[4]",
    "test_noise_without_a_seed[4]",
    "test_all_ranks_have_the_same_probes[4]",
    "test_a_run_goes_on_with_other_ranks[(1, 2)]",
    "test_a_run_goes_on_with_other_ranks[(2, 1)]",
    "test_a_rank_that_does_not_come[raises]",
    "test_a_rank_that_does_not_come[sleeps]",
    "test_a_step_that_one_rank_must_not_take[plain_backward-none]",
    "test_a_step_that_one_rank_must_not_take[outside-none]",
    "test_a_step_that_one_rank_must_not_take[fewer_parameters-none]",
    "test_a_step_that_one_rank_must_not_take[two_passes-none]",
    "test_a_step_that_one_rank_must_not_take[no_pass-none]",
    "test_sums_are_those_of_one_process[1]",
    "test_a_seed_gives_the_run_of_one_process[3-ways0]",
    "test_a_seed_gives_the_run_of_one_rank[2-blocks]",
    "test_what_is_refused[all]",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    known = {item.name: item for item in items if "/ranks/" in str(item.path)}
    if not known:
        return
    if missing := [name for name in RELATIVES if name not in known]:
        if len(known) > 100:  # all of them were collected
            raise pytest.UsageError(f"no such tests: {missing}")
    for name in RELATIVES:
        if name in known:
            known[name].add_marker("full")


@pytest.fixture(scope="session")
def pool():
    """Up to four processes for each one of pytest, started by the first test that needs them."""
    with temporary() as folder:
        found = Pool(folder)
        yield found
        found.close()
