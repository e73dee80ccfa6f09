"""A fake GPU: Triton compiles for sm_90, loads and launches by a driver that does nothing.

Run in a process of its own (`run_faked`), since Triton's driver is one for a process. Kernels don't run, so outputs
hold anything; what can be seen is the host's side: launches, grids, arguments, and how many Python functions a call
enters. That number stands for host time, which depends on what else the machine does, so tests don't measure it.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def run_faked(script, *arguments):
    """Run a script of this folder that calls `activate`; it prints "faked: ok" where all its checks held."""
    import warm  # not at the top: the scripts import this module, and have no path to that one

    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE), str(HERE.parents[1])]),
    }
    for name in ("TRITON_INTERPRET", "DBKERNELS_BACKEND"):
        environment.pop(name, None)
    run = warm.run(HERE / script, *arguments, env=environment)
    assert run.returncode == 0 and "faked: ok" in run.stdout, run.stdout + run.stderr
    return run.stdout


def entered(call):
    """Return how many Python functions a call enters, once it is prepared."""
    call()
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


class FakeGPU:
    """The calls that the driver recorded."""

    def __init__(self, library):
        self.library = library

    def launches(self):
        """Return how many kernels were launched since the last call."""
        counter = ctypes.c_int.in_dll(self.library, "fake_launches")
        count, counter.value = counter.value, 0
        return count

    def grid(self):
        """Return the last launch's grid."""
        return tuple((ctypes.c_uint * 3).in_dll(self.library, "fake_grid"))


def activate(*modules):
    """Make CPU tensors count as the fake GPU's, for Triton and for the `direct` of the given op modules."""
    folder = tempfile.mkdtemp()
    path = f"{folder}/libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *flags, "-o", path, str(HERE / "fake_cuda" / "libcuda.c")], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # by its soname, Triton's modules find it loaded
    import torch
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    fake = CudaDriver()
    fake.get_current_device = lambda: -1  # the index that CPU tensors have
    fake.get_current_stream = lambda device: 0
    driver.set_active(fake)
    for module in modules:
        module.direct = lambda *tensors: True
    return FakeGPU(library)
