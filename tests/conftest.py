"""What every test shares: GPU tests skip without a GPU, and torch's own generator starts anew for each."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # not its keywords: a folder called gpu is one of them
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    # Tests run beside each other, and more threads than cores wait for one another: tens of times slower.
    torch.set_num_threads(1)
    torch.manual_seed(0)
