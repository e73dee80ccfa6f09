"""What several tests of training need."""

import pytest

from diffusionblocks.training import capture
from recorded_graphs import RecordedGraphs


@pytest.fixture
def graphs(monkeypatch):
    """Return the graphs of the CPU."""
    made = RecordedGraphs()
    monkeypatch.setattr(capture, "graphs_of", lambda device: made)
    return made
