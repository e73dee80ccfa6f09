"""What every test shares: GPU tests skip without a GPU, and torch's own generator starts anew for each."""

import gc
import os
import sys
from collections import Counter

import pytest
import torch

# Tests run beside each other, and more threads than cores wait for one another: tens of times slower. Already here,
# since some test files compute what they are parametrized by.
torch.set_num_threads(1)


def pytest_addoption(parser):
    help_ = "run every N-th of a test's parameter sets, the first among them"
    parser.addoption("--thin", type=int, default=1, metavar="N", help=help_)
    help_ = "as after an install without a C++ compiler: every op on its definition"
    parser.addoption("--without-library", action="store_true", help=help_)


def pytest_configure(config):
    os.environ["THIN"] = str(config.getoption("--thin"))  # for the scripts that tests run: numerics.thinned
    if config.getoption("--without-library"):  # an editable install would find it even from a copy that has none
        sys.modules.update({"dbkernels._C": None, "dbkernels._C_cuda": None})


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    gc.disable()  # collecting only ever adds objects: a fifth of its time went into looking for garbage
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(config, items):
    _thin(config, items, config.getoption("--thin"))
    if os.environ.get("DBKERNELS_BACKEND") == "reference":
        for item in items:
            if item.get_closest_marker("kernels"):
                item.add_marker(pytest.mark.skip(reason="of what only the kernels promise"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # not its keywords: a folder called gpu is one of them
            item.add_marker(skip)


def _thin(config, items, step):
    seen, kept, dropped = Counter(), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (dropped if seen[test] % step else kept).append(item)
        seen[test] += 1
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)  # whatever the test before has set
    torch.manual_seed(0)


@pytest.fixture
def compile_counter():
    """Return a torch.compile backend that counts its graphs (`frame_count`), with nothing compiled yet."""
    from torch._dynamo.testing import CompileCounterWithBackend  # two seconds, which collection need not wait for

    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")
