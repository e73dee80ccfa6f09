"""Run by test_sample_sigma_triton.py in a process with TRITON_INTERPRET=1: the kernels of sample_sigma and
philox_uniform on the CPU against their definitions."""

import torch

from dbkernels import sample_sigma_reference
from dbkernels.philox import uniform_reference
from dbkernels.sample_sigma import plan
from dbkernels.triton import philox_uniform, sample_sigma
from numerics import ulps

SEED, OFFSET = 2**63 + 5, 2**32 - 1


def uniforms():
    for numel in (1, 4 * philox_uniform.GROUPS, 9 * philox_uniform.GROUPS + 3):
        out = torch.full((numel + 5,), float("nan"))
        philox_uniform.launch(out[:numel], SEED, OFFSET)
        assert torch.equal(out[:numel], uniform_reference((numel,), seed=SEED, offset=OFFSET)), numel
        assert out[numel:].isnan().all()


def levels():
    """The interpreter's logarithm and exponential are NumPy's: within float64's last bits, as a GPU's are."""
    for block_range in ((0.002, 80.0), (0.3, 0.4), (0.002, 0.05), (5.0, 80.0), (1e-19, 1e-18), (1e17, 1e18)):
        numel = 5 * sample_sigma.GROUPS + 3
        out = torch.full((numel + 5,), float("nan"))
        sample_sigma.launch(out[:numel], plan(*block_range, -1.2, 1.2), SEED, OFFSET)
        expected = sample_sigma_reference(block_range, (numel,), -1.2, 1.2, SEED, OFFSET)
        assert ulps(out[:numel], expected).max() <= 1, block_range
        assert out[numel:].isnan().all()


def addresses():
    """Tensors are the ints that they hold."""
    tensors = torch.tensor(SEED - 2**64), torch.tensor(OFFSET)
    for launch in (
        philox_uniform.launch,
        lambda out, *address: sample_sigma.launch(out, plan(0.1, 9.0, -1.2, 1.2), *address),
    ):
        ints, ours = torch.empty(2, 99)
        launch(ints, SEED, OFFSET)
        launch(ours, *tensors)
        assert torch.equal(ints, ours)


uniforms()
levels()
addresses()
print("interpreted: ok")
