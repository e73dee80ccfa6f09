"""What all tests of runs share."""

import pytest

import spared as helper


@pytest.fixture(scope="module", autouse=True)
def spared():
    """Runs draw no pictures; a module that looks at them has a `spared` of its own."""
    with pytest.MonkeyPatch.context() as patch:
        helper.spare(patch)
        yield
