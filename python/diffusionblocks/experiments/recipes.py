"""The recipes of class targets: the published code's, and the corrected default; one field per difference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Recipe:
    """How blocks of a class target are trained and sampled.

    noise: Density of training noise: "information" (equal information, started from the codebook's closed form and
        measured while training) or "log_normal" (EDM's constants for images).
    codebook: Label embeddings "fixed" (orthonormal) or "learned" (their rows normalised).
    sigma_data: 0 is 1/sqrt(width), the codebook's true root mean square; the paper's is 0.5.
    readout: Logits from features h: "posterior", head(h) + (z E^T - |E|^2 / 2) / sigma^2, or "edm",
        head(c_out h + c_skip z).
    weighting: "none", or "batch_mean": mean(loss) * mean(weight(sigma)), a broadcast in the published code.
    estimate: D from the codebook "as_trained", or "raw": without normalisation, outside the space trained in.
    block_choice: "balanced" (every block equally often), or "vote": noise is drawn first and the batch goes to the
        block that owns most of it.
    context: Share of a batch drawn at sigma_max, where the answer must come from x alone.
    gate_start: Value that AdaLN's gates start from.
    z_gain: Factor of c_in z as it enters the network.
    silu_after: SiLU after AdaLN's linear layer instead of before it.
    remainder: Layers that don't divide by B are "spread" or "dropped".
    start: The sampling trajectory starts at "mean" (z = 0, the centre of the noise) or at a draw of "noise".
    levels: Noise levels of the trajectory: "karras" or "probability".
    """

    noise: str = "information"
    codebook: str = "fixed"
    sigma_data: float = 0.0
    readout: str = "posterior"
    weighting: str = "none"
    estimate: str = "as_trained"
    block_choice: str = "balanced"
    context: float = 0.5
    gate_start: float = 1.0
    z_gain: float = 0.1
    silu_after: bool = False
    remainder: str = "spread"
    start: str = "mean"
    levels: str = "karras"


CORRECTED = Recipe()
PUBLISHED = Recipe(
    noise="log_normal",
    codebook="learned",
    sigma_data=0.5,
    readout="edm",
    weighting="batch_mean",
    estimate="raw",
    block_choice="vote",
    context=0.0,
    gate_start=0.0,
    z_gain=1.0,
    silu_after=True,
    remainder="dropped",
    start="noise",
    levels="probability",
)
RECIPES = {"corrected": CORRECTED, "published": PUBLISHED}


def resolve(name: str, switch: Iterable[str] = ()) -> Recipe:
    """Return the recipe `name` with the fields in `switch` taken from the other one, to ablate each difference.

    Raises: ValueError if the recipe or a field is unknown.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    other = RECIPES["published" if name == "corrected" else "corrected"]
    known = [f.name for f in fields(Recipe)]
    for field in switch:
        if field not in known:
            raise ValueError(f"switch must name fields of Recipe ({', '.join(known)}), got {field!r}")
    return replace(RECIPES[name], **{field: getattr(other, field) for field in switch})
