import pytest

from ranks.processes import Pool, temporary


@pytest.fixture(scope="session")
def pool():
    """Up to four processes for each one of pytest, started by the first test that needs them."""
    with temporary() as folder:
        found = Pool(folder)
        yield found
        found.close()
