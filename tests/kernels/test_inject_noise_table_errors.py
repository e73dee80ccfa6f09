"""What inject_noise refuses of (indices, table)."""

import pytest
import torch

import dbkernels

TABLE, INDICES = torch.randn(4, 3), torch.tensor([0, 3, 1])


@pytest.mark.parametrize(
    "changes,error,words",
    [
        (dict(y=(INDICES, TABLE, TABLE)), ValueError, r"must be \(indices, table\), got 3"),
        (dict(y=(INDICES, [1.0])), TypeError, "table must be a torch.Tensor"),
        (dict(y=(INDICES, TABLE.long())), TypeError, "table must be float16"),
        (dict(y=(INDICES, TABLE[0])), ValueError, r"table must be \(K, d\)"),
        (dict(y=(INDICES, TABLE[:0])), ValueError, "not empty"),
        (dict(y=([0], TABLE)), TypeError, "indices must be an int64"),
        (dict(y=(INDICES.float(), TABLE)), TypeError, "indices must be an int64"),
        (dict(y=(INDICES + 1, TABLE)), ValueError, "indices go from 1 to 4, and table has rows 0 to 3"),
        (dict(y=(INDICES - 1, TABLE)), ValueError, "indices go from -1"),
        (dict(y=(INDICES, TABLE.to("meta"))), ValueError, "move them to one device"),
        (dict(sigma=torch.ones(4)), ValueError, r"sigma has shape \(4,\)"),
        (dict(sigma=torch.ones(3, 3)), ValueError, "sigma has shape"),  # a level an element isn't a level an index
        (dict(y=TABLE, normalize=True), ValueError, "normalize=True needs y as"),
    ],
)
def test_errors_name_the_argument(changes, error, words):
    arguments = {"y": (INDICES, TABLE), "sigma": 1.0, **changes}
    with pytest.raises(error, match=words):
        dbkernels.inject_noise(arguments.pop("y"), arguments.pop("sigma"), seed=0, **arguments)
