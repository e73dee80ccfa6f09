"""Run by test_inject_noise_table_triton.py in a process with TRITON_INTERPRET=1: the kernels on the CPU against the
definition."""

import itertools

import torch

from dbkernels.inject_noise import inject_noise_table_reference
from dbkernels.inject_noise_table import row_sums
from dbkernels.triton.inject_noise_table import launch, launch_sums
from numerics import EPSILON, thinned

torch.manual_seed(0)
# indices' shape, noise levels' shape, rows of the table, its width
CASES = [
    ((7,), (7,), 5, 64),
    ((3, 11), (3,), 4, 37),
    ((3, 11), (3, 11), 40, 130),
    ((2, 3), (), 3, 1),
    ((70,), (70,), 2, 6),
]

COMBINED = thinned(
    [
        *((case, torch.float32) for case in CASES),
        *zip(CASES, itertools.cycle((torch.bfloat16, torch.float16, torch.float64))),
    ]
)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def example(shape, levels, count, width, dtype):
    table = torch.randn(count, width).to(dtype)
    sigma = (torch.rand(levels) + 0.1).to(wide(dtype))
    return torch.randint(count, shape), table, sigma


def ways(index, dtype, *both):
    """Both at the types that a case or two have; one after the other in float32, which all cases have."""
    return both if dtype != torch.float32 and index < 8 else both[index % 2 :][:1]


def forward():
    for index, (case, dtype) in enumerate(COMBINED):
        indices, table, sigma = example(*case, dtype)
        for normalize, sigma_data in ways(index, dtype, (False, None), (True, 0.5)):
            z = torch.full((*indices.shape, table.shape[1]), float("nan"), dtype=dtype)  # what isn't written shows
            launch(indices, table, sigma, z, sigma_data, normalize, 2**63 + 9, 1)
            exact = inject_noise_table_reference(
                indices, table.double(), sigma.double(), sigma_data, normalize, 2**63 + 9, 1
            )
            # As in interpreted_inject_noise.py: bfloat16 is truncated here, and eps is float32 in float64 too.
            unit = max(2 * EPSILON[dtype], 8 * EPSILON[torch.float32])
            assert ((z.double() - exact).abs() <= unit * (1 + exact.abs())).all(), (case, dtype, normalize)


def forms():
    """Tensors for the address, a level that is a number, 32-bit indices, seven rounds."""
    indices, table, _ = example(*CASES[1], torch.float32)
    seed, offset = torch.tensor(-5), torch.tensor(3)
    for rounds in (10, 7):
        z, other = torch.empty(2, *indices.shape, table.shape[1])
        launch(indices, table, 0.25, z, 0.5, True, 2**64 - 5, 3, rounds)
        launch(indices.int(), table, torch.tensor(0.25).bfloat16(), other, 0.5, True, seed, offset, rounds)
        assert torch.equal(z, other)
        exact = inject_noise_table_reference(indices, table, torch.tensor(0.25), 0.5, True, -5, 3, rounds)
        torch.testing.assert_close(z, exact, rtol=1e-6, atol=2e-6)


def bad_indices_are_not_read():
    indices, table, sigma = torch.tensor([0, 5, -1, 4, 2**40]), torch.randn(5, 10), torch.ones(())
    z = torch.zeros(5, 10)
    launch(indices, table, sigma, z, None, True, 1, 0)
    assert z.isnan().all(1).tolist() == [False, True, True, False, True]


def sums():
    for index, (case, dtype) in enumerate(COMBINED):
        indices, table, sigma = example(*case, dtype)
        grad = torch.randn(*indices.shape, table.shape[1]).to(dtype)
        for sigma_data in ways(index, dtype, None, 0.5):
            ours = launch_sums(grad, indices, len(table), sigma, sigma_data)
            exact = row_sums(grad.double(), indices, len(table), sigma.double(), sigma_data)
            # Up to 70 terms, each off by a unit of the arithmetic.
            unit = 70 * EPSILON[wide(dtype)]
            assert ((ours.double() - exact).abs() <= unit * (1 + exact.abs())).all(), (case, dtype, sigma_data)
    outside = launch_sums(torch.ones(4, 3), torch.tensor([0, 9, -1, 0]), 2, torch.ones(()), None)
    assert outside.tolist() == [[2, 2, 2], [0, 0, 0]]


forward()
forms()
bad_indices_are_not_read()
sums()
print("interpreted: ok")
