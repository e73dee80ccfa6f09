"""The C++ and CUDA sources use what torch 2.11's headers have, and nothing later: newer headers alone can't show it."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HEADERS = Path(torch.__file__).parent / "include"
# Each of these was compiled against torch 2.11.0's headers.
NAMES = {
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_CUDA_KERNEL_LAUNCH_CHECK",
    "STD_TORCH_CHECK",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
    "aoti_torch_get_current_cuda_stream",
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/stable/accelerator.h",
    "torch/csrc/stable/library.h",
    "torch/csrc/stable/macros.h",
    "torch/csrc/stable/ops.h",
    "torch/csrc/stable/tensor.h",
    "torch/headeronly/util/BFloat16.h",
    "torch/headeronly/util/Half.h",
    "torch/headeronly/util/shim_utils.h",
    "torch::headeronly::BFloat16",
    "torch::headeronly::Half",
    "torch::headeronly::ScalarType",
    "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard",
    "torch::stable::contiguous",
    "torch::stable::copy_",
    "torch::stable::new_empty",
    "torch::stable::new_zeros",
    "torch::stable::parallel_for",
}
METHODS = {"data_ptr", "dim", "get_device_index", "numel", "scalar_type", "size", "sizes", "strides"}
NAME = re.compile(
    r"torch(?:::\w+)+"  # a qualified name
    r"|\b(?:STD|STABLE|TORCH|AOTI)_[A-Z_]+\b(?=\()"  # a macro
    r"|\b(?:aoti_)?torch_\w+"  # a function of the shim
    r"|(?<=<)torch/[\w/.]+"  # a header
)


def sources():
    return [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cpp", ".cu")]


def used(pattern):
    """Return the names that `pattern` finds in the sources, comments aside, and a file of each."""
    text = {path: re.sub(r"//.*", "", path.read_text()) for path in sources()}
    return {name: path.relative_to(ROOT) for path, words in text.items() for name in pattern.findall(words)}


def check(found, known, what):
    new = {name: str(path) for name, path in found.items() if name not in known}
    assert not new, f"new {what}: check that torch 2.11 has them, then add them to this list: {new}"
    gone = known - set(found)
    assert not gone, f"{what} that no source uses any more: {sorted(gone)}"


def test_every_torch_name_is_known_to_be_in_torch_2_11():
    check(used(NAME), NAMES, "names of torch")


def test_every_tensor_method_is_known_to_be_in_torch_2_11():
    declared = (HEADERS / "torch/csrc/stable/tensor_struct.h").read_text()
    of_tensors = set(
        re.findall(r"^  [\w:&*<> ]*?\b([a-z]\w*)\([^)]*\)(?: const)?(?: noexcept)?\s*[{;]", declared, re.M)
    )
    found = used(re.compile(r"\.(\w+)\("))
    check({name: path for name, path in found.items() if name in of_tensors}, METHODS, "methods of tensors")
