"""adamw_ema_step refuses bad arguments by name."""

import pytest
import torch

import dbkernels

BF16, FP64 = [torch.ones(3, dtype=torch.bfloat16)], [torch.ones(3, dtype=torch.float64)]


def arguments(**changes):
    one = [torch.ones(3)]
    given = dict(params=one, grads=one, exp_avgs=one, exp_avg_sqs=one, emas=None, step=1, lr=0.1)
    return {**given, **changes}


@pytest.mark.parametrize(
    "changes,error,words",
    [
        (dict(params=[]), ValueError, "params is empty"),
        (dict(params=[torch.ones(3, dtype=torch.int32)]), TypeError, "params must be floating"),
        (dict(grads=[]), ValueError, "grads has 0 tensors"),
        (dict(grads=[None]), TypeError, r"grads\[0\] must be a tensor"),
        (dict(grads=[torch.ones(4)]), ValueError, r"grads\[0\] has shape"),
        (dict(grads=[torch.ones(3).double()]), TypeError, r"grads\[0\] must be torch.float32"),
        (dict(exp_avgs=[torch.ones(3).half()]), TypeError, r"exp_avgs\[0\] must be torch.float32"),
        (dict(exp_avgs=BF16), TypeError, r"exp_avg_sqs\[0\] must be torch.bfloat16, got torch.float32"),
        (dict(exp_avg_sqs=BF16), TypeError, r"exp_avg_sqs\[0\] must be torch.float32, got torch.bfloat16"),
        (dict(exp_avgs=BF16, exp_avg_sqs=BF16), ValueError, "seed and stochastic_rounding=True or bfloat16 moments"),
        (dict(exp_avgs=BF16, exp_avg_sqs=BF16, seed=-1), ValueError, "seed=-1"),
        (dict(params=FP64, grads=FP64, exp_avgs=BF16), TypeError, r"exp_avgs\[0\] must be torch.float64"),
        (dict(exp_avg_sqs=[torch.ones(3, device="meta")]), ValueError, r"exp_avg_sqs\[0\] is on meta"),
        (dict(emas=[torch.ones(3)]), ValueError, "emas and ema_decay"),
        (dict(ema_decay=0.9), ValueError, "emas and ema_decay"),
        (dict(emas=[torch.ones(3)], ema_decay=1.5), ValueError, "ema_decay=1.5"),
        (dict(step=0), ValueError, "step=0"),
        (dict(step=1.0), TypeError, "step must be an int"),
        (dict(lr=float("nan")), ValueError, "lr=nan"),
        (dict(betas=(1.0, 0.9)), ValueError, r"betas\[0\]"),
        (dict(eps=-1.0), ValueError, "eps"),
        (dict(weight_decay=[0.1, 0.1]), ValueError, "weight_decay has 2 values"),
        (dict(weight_decay=-0.1), ValueError, "weight_decay=-0.1"),
        (dict(weight_decay=[-0.1]), ValueError, r"weight_decay\[0\]"),
        (dict(max_norm=0.0), ValueError, "max_norm=0.0"),
    ],
)
def test_errors_name_the_argument(changes, error, words):
    with pytest.raises(error, match=words):
        dbkernels.adamw_ema_step(**arguments(**changes))
