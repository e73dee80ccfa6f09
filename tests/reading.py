"""What a test's session has learnt, to be read."""

from diffusionblocks.sampling.sampler import Walker


def reader(session) -> Walker:
    """The weights as they stand, not their averages."""
    return Walker(session.model, session.residency)
