"""Build of the compiled kernels: one library for the CPU, and a second for CUDA where torch and the toolkit
have it.

    MAX_JOBS=4                       compilers at once (as in torch.utils.cpp_extension)
    FORCE_CUDA=1                     build the CUDA library with no GPU here (0: never build it)
    TORCH_CUDA_ARCH_LIST="8.0;9.0a"  GPUs to build it for; by default the ones here

Kernels go through PyTorch's stable ABI, so a build serves torch 2.11 and later; the Python-facing module
(build facts, Philox for the tests) is pybind11, so a wheel serves one version of Python. Without a working C++
compiler, or without torch or pybind11, the install succeeds, and the ops run on their definitions; pip shows none of
this output, so the reason is installed, too, as dbkernels/_C.not_built.txt: the first op and `python -m dbkernels`
tell it. A CUDA library that was begun must build: else the install fails, with the compiler's first error.
"""

import contextlib
import os
import re
import sys
import threading
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except (ImportError, OSError):  # a source checkout being inspected, an install with no torch yet, or a broken one
    torch = cpp_extension = None
try:
    import pybind11
except ImportError:
    pybind11 = None

# Kernels may use what torch 2.11 offers and nothing later.
COMMON = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Contraction off: where a multiply-add matters the code says fma, so every build rounds alike. No OpenMP
# flag: threads come from libtorch (torch::stable::parallel_for), and linking OpenMP here could load a second
# runtime beside its own. The ABI warning is about vectors between functions; ours are inlined.
CXX_FLAGS = [
    *COMMON,
    *["-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"],
    "-Wno-psabi",
]
# Beside torch's own, cpp_extension.COMMON_NVCC_FLAGS. tests/kernels/test_cuda_sources.py compiles with both.
NVCC_FLAGS = [*COMMON, "-DUSE_CUDA"]


def say(*words):
    print("[dbkernels]", *words, file=sys.stderr, flush=True)


def cuda_wanted():
    """Return whether to build the CUDA library, and why.

    Raises:
        SystemExit: if FORCE_CUDA=1 asks for what this machine can't build.
    """
    force = os.environ.get("FORCE_CUDA")
    if force == "0":
        return False, "FORCE_CUDA=0"
    lacking = None
    if torch is None:
        lacking = "torch isn't importable: install it, then use --no-build-isolation"
    elif torch.version.cuda is None:
        lacking = f"torch {torch.__version__} is a CPU build: install a CUDA one"
    elif cpp_extension.CUDA_HOME is None:
        lacking = "no CUDA toolkit was found: set CUDA_HOME to its folder"
    if force:
        if lacking:
            raise SystemExit(f"FORCE_CUDA={force}, but {lacking}")
        return True, f"FORCE_CUDA={force}"
    if lacking:
        return False, lacking
    if not torch.cuda.is_available():
        return False, "no GPU here (FORCE_CUDA=1 builds for others)"
    return True, f"torch {torch.__version__} and {cpp_extension.CUDA_HOME}"


def library(name, kind, sources, facts, flags):
    """Return the extension `name`: the Python-facing module and a folder's kernels."""
    made = kind(
        name,
        ["csrc/module.cpp", *map(str, sources)],
        include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
        define_macros=[("DBK_FLAGS", f'"{" ".join(facts)}"')],
        extra_compile_args=flags,
    )
    made.libraries.remove("torch_python")  # of torch's own bindings, which a build for one version of torch would use
    return made


def lacking():
    """Return why no kernels can be compiled here; None if they can."""
    names = [name for name, module in (("torch", torch), ("pybind11", pybind11)) if module is None]
    return f"{' and '.join(names)} couldn't be imported where it was built" if names else None


def extensions():
    """Return what to build here, after saying it."""
    wanted, why = cuda_wanted()
    if lacking():
        say(f"no kernels are compiled: {lacking()}; install that, then use --no-build-isolation")
        return []
    cpu = ["csrc/bindings.cpp", *sorted(Path("csrc/cpu").glob("*.cpp"))]
    made = [library("dbkernels._C", cpp_extension.CppExtension, cpu, CXX_FLAGS, {"cxx": CXX_FLAGS})]
    say("CPU library: yes,", " ".join(CXX_FLAGS), "with AVX2 chosen at run time")
    say("CUDA library:", "yes," if wanted else "no,", why)
    if wanted:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "those of the GPUs here")
        say("CUDA architectures:", archs, "| MAX_JOBS:", os.environ.get("MAX_JOBS", "all cores"))
        cuda = ["csrc/cuda/bindings.cpp", *sorted(Path("csrc/cuda").glob("*.cu"))]
        flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
        made.append(library("dbkernels._C_cuda", cpp_extension.CUDAExtension, cuda, NVCC_FLAGS, flags))
    return made


@contextlib.contextmanager
def recorded():
    """Let through all that is printed, compilers' words too, and keep it: yields the list of lines."""
    lines, kept, (read, write) = [], (os.dup(1), os.dup(2)), os.pipe()

    def copy():
        with open(read, "rb") as pipe:
            for line in pipe:
                os.write(kept[0], line)
                lines.append(line.decode(errors="replace").strip())

    thread = threading.Thread(target=copy)
    thread.start()
    for stream in (1, 2):
        os.dup2(write, stream)
    os.close(write)
    try:
        yield lines
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, to in zip((1, 2), kept, strict=True):
            os.dup2(to, stream)
        thread.join()
        for stream in kept:
            os.close(stream)


def first_error(lines, error):
    """Return the first line in which a compiler or the linker complains, else the exception's words."""
    complaint = re.compile(r"\b(error|fatal)\s*:|cannot find|not found|undefined reference", re.I)
    return next(filter(complaint.search, lines), f"{type(error).__name__}: {error}")


def note(folder, name, reason):
    """Keep beside a library why it isn't built, for `python -m dbkernels`; None: it is."""
    path = Path(folder, f"{name.rpartition('.')[2]}.not_built.txt")
    if reason is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n")


class BuildPython(build_py):
    """Copies the packages; where nothing can be compiled, with the reason."""

    def run(self):
        super().run()
        if lacking():
            folder = "dbkernels" if self.editable_mode else Path(self.build_lib, "dbkernels")
            note(folder, "dbkernels._C", lacking())


def build_command():
    class Build(cpp_extension.BuildExtension):
        """Builds one library after the other, and says how it went. The CPU's may be left out; CUDA's may not."""

        def run(self):
            self.reasons = {}
            super().run()
            for extension in self.extensions:  # now, as setuptools knows only here whether it builds in place
                folder = Path(self.get_ext_fullpath(extension.name)).parent
                note(folder, extension.name, self.reasons.get(extension.name))

        def build_extensions(self):
            every = self.extensions
            for extension in every:
                self.extensions = [extension]
                try:
                    with recorded() as lines:
                        super().build_extensions()
                    say(f"{extension.name}: built")
                except Exception as error:
                    said = first_error(lines, error)
                    say(f"{extension.name}: NOT built: {said}")
                    if extension.name.endswith("_cuda"):
                        raise SystemExit(
                            f"The CUDA library doesn't build. First error: {said}\n"
                            "FORCE_CUDA=0 installs without it: ops then run on Triton's kernels."
                        ) from error
                    extension.optional = True  # nothing to copy or to pack is no error then
                    say("the package installs and runs on its PyTorch definitions")
                    self.reasons[extension.name] = said
            self.extensions = every

    return Build


def main():
    made = extensions()
    setup(
        packages=find_packages(include=["dbkernels", "dbkernels.*"]) + find_packages("python"),
        ext_modules=made,
        cmdclass={"build_py": BuildPython} | ({"build_ext": build_command()} if made else {}),
    )


if __name__ == "__main__":
    main()
