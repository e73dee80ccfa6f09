"""Compile a Triton kernel for an absent GPU and report spills, registers and SASS length.

Triton brings ptxas, cuobjdump and nvdisasm, so no driver is needed. Gate on spills and on the instruction
count: the register count alone misleads, and a kernel whose work was optimised away would pass with a stub.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Report:
    arch: int
    registers: int
    spilled_bytes: int
    instructions: int
    sass: str


def compile_kernel(kernel, signature, constants, arch, warps=4, stages=3, **options):
    """`signature`: a type for each argument that isn't constexpr, in order; ":16" says divisible by 16. options:
    others of a launch, such as maxnreg."""
    while not hasattr(kernel, "params"):
        kernel = kernel.fn
    names = [parameter.name for parameter in kernel.params]
    free = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    assert len(free) == len(signature), f"signature needs {free}"
    types = dict(zip(free, signature, strict=True))
    divisible = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.endswith(":16")}
    source = ASTSource(
        fn=kernel,
        signature={n: types[n].split(":")[0] if n in types else "constexpr" for n in names},
        constexprs=constants,
        attrs=divisible,
    )
    options = {"num_warps": warps, "num_stages": stages, **options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _tool(name, *arguments):
    return subprocess.run([str(BIN / name), *arguments], check=True, capture_output=True, text=True)


def report(kernel, signature, constants, arch, warps=4, stages=3, **options):
    compiled = compile_kernel(kernel, signature, constants, arch, warps, stages, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name).stdout
        sass = _tool("nvdisasm", "-ndf", "-c", file.name).stdout  # whose analysis of data flow is half its time
    return Report(
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spilled_bytes=int(re.search(r"STACK:(\d+)", usage).group(1)),  # no kernel has anything else there
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP)", sass)),
        sass=sass,
    )
