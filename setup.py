"""Build of the compiled kernels: one library for the CPU, and a second for CUDA where torch and the toolkit
have it.

    MAX_JOBS=4                       compilers at once (as in torch.utils.cpp_extension)
    FORCE_CUDA=1                     build the CUDA library with no GPU here (0: never build it)
    TORCH_CUDA_ARCH_LIST="8.0;9.0a"  GPUs to build it for; by default the ones here

Everything compiled goes through PyTorch's stable ABI and CPython's limited API: one cp310-abi3 wheel serves
Python 3.10 to 3.13 and torch 2.11 and later. pybind11 has no limited-API mode, so the Python-facing module
(build facts, Philox for the tests) is plain C API. Without a working compiler the install succeeds, and the
ops run on their definitions.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # a source checkout being inspected, or an install with no torch yet
    torch = cpp_extension = None

PACKAGES = find_packages(include=["dbkernels", "dbkernels.*"]) + find_packages("python")
# Kernels may use what torch 2.11 offers and nothing later.
TORCH_TARGET = "0x020b000000000000"
COMMON = ["-O3", "-std=c++17", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
# Contraction off: where a multiply-add matters the code says fma, so every build rounds alike. No OpenMP
# flag: threads come from libtorch (torch::stable::parallel_for), and linking OpenMP here could load a second
# runtime beside its own. The ABI warning is about vectors between functions; ours are inlined.
CXX_FLAGS = [*COMMON, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


def say(*words):
    print("[dbkernels]", *words, file=sys.stderr, flush=True)


def cuda_wanted():
    """Whether to build the CUDA library, and why."""
    force = os.environ.get("FORCE_CUDA")
    if force == "0":
        return False, "FORCE_CUDA=0"
    if torch.version.cuda is None:
        if force:
            raise SystemExit(f"FORCE_CUDA={force}, but torch {torch.__version__} is a CPU build: install a CUDA one")
        return False, f"torch {torch.__version__} is a CPU build"
    if cpp_extension.CUDA_HOME is None:
        if force:
            raise SystemExit(f"FORCE_CUDA={force}, but no CUDA toolkit was found: set CUDA_HOME to its folder")
        return False, "no CUDA toolkit found (set CUDA_HOME)"
    if force:
        return True, f"FORCE_CUDA={force}"
    if not torch.cuda.is_available():
        return False, "no GPU here (FORCE_CUDA=1 builds for others)"
    return True, f"torch {torch.__version__} and {cpp_extension.CUDA_HOME}"


def extensions():
    cpu = cpp_extension.CppExtension(
        "dbkernels._C",
        ["csrc/module.cpp", "csrc/bindings.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))],
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("DBK_FLAGS", f'"{" ".join(CXX_FLAGS)}"'), ("DBK_MODULE", "_C")],
        extra_compile_args={"cxx": CXX_FLAGS},
        py_limited_api=True,
    )
    say("CPU library: yes,", " ".join(CXX_FLAGS), "with AVX2 chosen at run time")
    wanted, why = cuda_wanted()
    say("CUDA library:", "yes," if wanted else "no,", why)
    if not wanted:
        return [cpu]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "those of the GPUs here")
    say("CUDA architectures:", archs, "| MAX_JOBS:", os.environ.get("MAX_JOBS", "all cores"))
    cuda = cpp_extension.CUDAExtension(
        "dbkernels._C_cuda",
        ["csrc/module.cpp", "csrc/cuda/bindings.cpp", *map(str, sorted(Path("csrc/cuda").glob("*.cu")))],
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[
            ("DBK_FLAGS", f'"{" ".join(NVCC_FLAGS)}"'),
            ("DBK_MODULE", "_C_cuda"),
            ("USE_CUDA", None),
        ],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )
    return [cpu, cuda]


def build_command():
    class Build(cpp_extension.BuildExtension):
        """Builds what it can: a missing or broken compiler leaves the package on its reference ops, and says
        so."""

        def build_extensions(self):
            every = self.extensions
            for extension in every:
                extension.optional = True
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    say(f"{extension.name}: built")
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    say(f"{extension.name}: NOT built ({type(error).__name__}: {error})")
                    say("the package installs and runs on its PyTorch definitions; see the compiler's words")
            self.extensions = every

    return Build


if cpp_extension is None:
    say("torch isn't importable here, so no kernels are compiled; install it, then use --no-build-isolation")
    setup(packages=PACKAGES)
else:
    setup(
        packages=PACKAGES,
        ext_modules=extensions(),
        cmdclass={"build_ext": build_command()},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
