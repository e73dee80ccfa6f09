"""Run by test_philox_uniform_triton.py in a process with TRITON_INTERPRET=1: the kernel against its definition."""

import torch

from dbkernels.philox import uniform_reference
from dbkernels.triton import philox_uniform

SEED, OFFSET = 2**63 + 5, 2**32 - 1


def uniforms():
    for numel in (1, 4 * philox_uniform.GROUPS, 9 * philox_uniform.GROUPS + 3):
        out = torch.full((numel + 5,), float("nan"))
        philox_uniform.launch(out[:numel], SEED, OFFSET)
        assert torch.equal(out[:numel], uniform_reference((numel,), seed=SEED, offset=OFFSET)), numel
        assert out[numel:].isnan().all()


def addresses():
    """Tensors are the ints that they hold."""
    ints, tensors = torch.empty(2, 99)
    philox_uniform.launch(ints, SEED, OFFSET)
    philox_uniform.launch(tensors, torch.tensor(SEED - 2**64), torch.tensor(OFFSET))
    assert torch.equal(ints, tensors)


uniforms()
addresses()
print("interpreted: ok")
