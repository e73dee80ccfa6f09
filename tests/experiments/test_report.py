"""What the command prints of results."""

from __future__ import annotations

import pytest

from diffusionblocks.experiments import report
from diffusionblocks.experiments.results import signed
from diffusionblocks.experiments.tasks.base import Metric


@pytest.mark.parametrize(("bits", "shown"), [(-0.0004, "0.000"), (0.0, "0.000"), (-0.0006, "-0.001"), (1.5, "+1.500")])
def test_zero_has_no_sign(bits, shown):
    assert signed(bits) == shown


def test_the_bound_and_the_regret_name_their_unit(capsys):
    report.show(Metric("bits", "bits"), {"bits": 2.0, "bound_bits": 1.25, "regret_bits": [-0.0001, 0.25]})
    out = " ".join(capsys.readouterr().out.split())
    assert "information bound 1.250 bits; regret by block 0.000, +0.250 bits (what a block loses" in out
    assert out.endswith("0 or less: none)")
