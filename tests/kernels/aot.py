"""Compile a Triton kernel for an absent GPU and report spills, registers and SASS length.

Triton brings ptxas, cuobjdump and nvdisasm, so no driver is needed. Gate on spills and on the instruction
count: the register count alone misleads, and a kernel whose work was optimised away would pass with a stub.
"""

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NOP = 0x918  # the low twelve bits of its sixteen bytes


@dataclass
class Report:
    arch: int
    registers: int
    spilled_bytes: int
    instructions: int
    ptx: str
    cubin: bytes

    @cached_property
    def sass(self):
        """Return the disassembly, which takes up to a second: most tests ask for the counts only."""
        return _tool(self.cubin, "nvdisasm", "-ndf", "-c")  # the analysis of data flow is half its time


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


def _tool(cubin, name, *arguments):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(BIN / name), *arguments, file.name], check=True, capture_output=True, text=True
        ).stdout


def _instructions(cubin):
    """Count the instructions in the ELF sections that are executable, but for NOPs."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, sections = struct.unpack_from("<HH", cubin, 0x3A)
    count = 0
    for i in range(sections):
        flags, _, begin, length = struct.unpack_from("<QQQQ", cubin, table + i * size + 8)
        if flags & 4:
            words = struct.unpack_from(f"<{length // 8}Q", cubin, begin)[::2]
            count += sum(word & 0xFFF != NOP for word in words)
    return count


def report(kernel, signature, constants, arch, warps=4, stages=3, **options):
    compiled = compile_kernel(kernel, signature, constants, arch, warps, stages, **options)
    cubin = compiled.asm["cubin"]
    usage = _tool(cubin, "cuobjdump", "--dump-resource-usage")
    return Report(
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spilled_bytes=int(re.search(r"STACK:(\d+)", usage).group(1)),  # no kernel has anything else there
        instructions=_instructions(cubin),
        ptx=compiled.asm["ptx"],
        cubin=cubin,
    )
