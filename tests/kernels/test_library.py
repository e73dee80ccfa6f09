"""Which ops the compiled library serves on the CPU: all that it has, or none with `--without-library`."""

import sys

import torch

import dbkernels


def test_no_op_has_a_compiled_kernel_where_the_library_is_hidden(pytestconfig):
    """By the dispatcher's table, which names the file of every registration."""
    served = {op for op in dbkernels.kernels() if "bindings.cpp" in torch._C._dispatch_dump(f"dbkernels::{op}")}
    if pytestconfig.getoption("--without-library"):
        assert dbkernels.compiled() is None and sys.modules["dbkernels._C"] is None and not served
    elif dbkernels.compiled() is not None:
        assert served == set(dbkernels.compiled()["ops"].split(","))
