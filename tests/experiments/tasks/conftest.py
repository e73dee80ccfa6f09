"""A classifier for the Fréchet distance that trains in a second."""

import pytest

from diffusionblocks.experiments.metrics import frechet


@pytest.fixture(scope="module")
def quick_judge():
    """Less of the judge's training: enough to tell digits apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frechet, "STEPS", 100)
        patch.setattr(frechet, "EPOCHS", 0)
        frechet.judge.cache_clear()
        yield
    frechet.judge.cache_clear()
