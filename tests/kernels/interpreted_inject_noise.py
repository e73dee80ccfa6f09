"""Run by test_inject_noise_triton.py in a process with TRITON_INTERPRET=1: the kernel on the CPU against the
definition."""

import torch

from dbkernels import inject_noise_reference
from dbkernels._inject_noise import c_in
from dbkernels.philox import normal_reference
from dbkernels.triton.inject_noise import GROUPS, launch
from numerics import EPSILON, pairs, ulps

torch.manual_seed(0)
PROGRAM = 4 * GROUPS  # elements


def normals():
    """Uniform bits are those of the definition, or no normal would match. The interpreter's fma rounds twice,
    and its polynomials so lose up to 2 ulp more than on a GPU, where the limit is 2."""
    y = torch.zeros(3 * PROGRAM + 77)
    z = torch.full_like(y, float("nan"))
    launch(y, torch.ones(()), z, None, 2**63 + 5, 2**32 - 1)
    distance = ulps(z, normal_reference(y.shape, seed=2**63 + 5, offset=2**32 - 1))
    assert distance.max() <= 4, distance.max()


def addresses():
    """Tensors are the ints that they hold; seven rounds are the definition's seven."""
    seed, offset = 2**63 + 5, 2**32 - 1
    seed_at, offset_at = torch.tensor(seed - 2**64), torch.tensor(offset)
    for rounds in (10, 7):
        draws = []
        for given in (
            (seed, offset),
            (seed_at, offset_at),
            (seed, offset_at),
            (seed_at, offset),
            (seed - 2**64, offset),
        ):
            z = torch.full((77,), float("nan"))
            launch(None, 1.0, z, None, *given, rounds)
            draws.append(z)
        assert all(torch.equal(draw, draws[0]) for draw in draws)
        assert ulps(draws[0], normal_reference((77,), seed=seed, offset=offset, rounds=rounds)).max() <= 4
    other = torch.empty(77)
    launch(None, 1.0, other, None, seed_at, offset_at - 1, 10)
    assert not torch.isclose(other, normal_reference((77,), seed=seed, offset=offset)).any()


def forms():
    """A level that is a number or of a half type; c_in alone."""
    y = torch.randn(4, 6)
    for sigma in (0.25, torch.tensor([0.25, 0.5, 1.0, 2.0]).bfloat16()):
        level = torch.full((4,), sigma) if isinstance(sigma, float) else sigma.float()
        z, scaled = torch.empty_like(y), torch.empty_like(y)
        launch(y, sigma, z, 0.5, 3, 1)
        launch(y, sigma, scaled, 0.5, None, 0)
        torch.testing.assert_close(z, inject_noise_reference(y, level, 0.5, 3, 1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scaled, y * c_in(level, 0.5, 2), rtol=1e-6, atol=1e-6)


def modes():
    shapes = {
        "single level": ((3, 5), ()),
        "a level a program": ((3, PROGRAM), (3,)),
        "a level a group": ((4, 6, 8), (4, 6)),
        "a level an element": ((5, 3, 7), (5, 3)),
        "odd, two programs": ((2, PROGRAM - 1), (2,)),
    }
    for name, dtype, sigma_data in pairs(list(shapes), list(EPSILON), [None, 0.5]):
        shape, levels = shapes[name]
        y = torch.randn(shape).to(dtype)
        sigma = (torch.rand(levels) + 0.1).to(torch.float64 if dtype == torch.float64 else torch.float32)
        z = torch.full_like(y, float("nan"))  # what isn't written shows
        launch(y, sigma, z, sigma_data, 9, 1)
        exact = inject_noise_reference(y.double(), sigma.double(), sigma_data, 9, 1)
        # The interpreter truncates where a GPU rounds to bfloat16, so a whole unit; float32 eps bounds float64.
        unit = max(2 * EPSILON[dtype], 8 * EPSILON[torch.float32])
        assert ((z.double() - exact).abs() <= unit * (1 + exact.abs())).all(), (name, dtype, sigma_data)


normals()
addresses()
forms()
modes()
print("interpreted: ok")
