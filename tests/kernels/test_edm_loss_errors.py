"""edm_loss: a bad argument is refused by its name, with what to do."""

import pytest
import torch

from dbkernels import compiled, edm_loss

X = torch.randn(4, 3, 2)
S4 = torch.rand(4) + 0.1


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        (dict(F=[1.0]), TypeError, "F must be a torch.Tensor"),
        (dict(y=X.long()), TypeError, "y must be float16"),
        (dict(z=X.to(torch.float8_e4m3fn)), TypeError, "z must be float16"),
        (dict(y=X[:, :1]), ValueError, r"y has shape \(4, 1, 2\)"),
        (dict(z=X[:1]), ValueError, r"z has shape \(1, 3, 2\)"),
        (dict(y=X.to("meta")), ValueError, "y has shape .* on meta"),
        (dict(sigma="1"), TypeError, "sigma must be a float"),
        (dict(sigma=0), ValueError, "sigma=0 leaves no noise"),
        (dict(sigma=-1.0), ValueError, "sigma=-1.0"),
        (dict(sigma=float("inf")), ValueError, "sigma=inf"),
        (dict(sigma=S4.long()), TypeError, "sigma must be floating"),
        (dict(sigma=torch.rand(3)), ValueError, r"sigma has shape \(3,\), which fits F"),
        (dict(sigma=torch.rand(4, 3, 2)), ValueError, "sigma has shape"),
        (dict(sigma=S4.to("meta")), ValueError, "move sigma"),
        (dict(sigma=S4.clone().requires_grad_()), ValueError, "sigma requires a gradient.*detach it"),
        (dict(sigma_data=0.0), ValueError, "sigma_data=0.0"),
        (dict(sigma_data=None), TypeError, "sigma_data must be a float"),
        (dict(reduction="batchmean"), ValueError, "reduction='batchmean' must be one of mean, sum, none, sample"),
        (dict(z=None), ValueError, "needs seed"),
        (dict(z=None, seed=1, z_scaled=True), ValueError, "z_scaled=True .* z=None: drop z_scaled, or pass"),
        (dict(seed=1), ValueError, "but z was given"),
        (dict(offset=1), ValueError, "but z was given"),
        (dict(z=None, seed=-1), ValueError, "seed=-1"),
        (dict(z=None, seed=1.5), TypeError, "seed must be a Python int"),
        (dict(z=None, seed=1, offset=2**32), ValueError, "offset="),
    ],
)
def test_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        edm_loss(**{"F": X, "z": X, "y": X, "sigma": S4, "sigma_data": 0.5, **arguments})


def test_a_number_has_no_samples():
    x = torch.tensor(1.0)
    assert edm_loss(x, x, x, 1.0, sigma_data=0.5).shape == ()
    with pytest.raises(ValueError, match="needs a dimension of samples"):
        edm_loss(x, x, x, 1.0, sigma_data=0.5, reduction="sample")


@pytest.mark.skipif(compiled() is None, reason="the definition serves every dtype")
def test_the_scaling_op_refuses_what_it_has_no_kernel_for():
    with pytest.raises(RuntimeError, match="edm_loss_scale_"):
        torch.ops.dbkernels.edm_loss_scale_(torch.ones(3, dtype=torch.float16), torch.ones(()))
