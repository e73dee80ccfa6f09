"""The rows of bench_training.py: which techniques, on which networks, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CHECKPOINTED = {"checkpoint": True}


@dataclass(frozen=True)
class Technique:
    """A row. kind: the function of training_row.py that measures it; rank: rows of low rank are measured first."""

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int = 5
    cuda: bool = False  # needs a GPU


@dataclass(frozen=True)
class Network:
    """A network and its batch. sizes: DiTConfig's or CausalLMConfig's fields; length: tokens of a text."""

    name: str
    kind: str
    sizes: dict[str, int]
    batch: int
    length: int = 0


@dataclass(frozen=True)
class Spec:
    """What a process measures."""

    case: str
    technique: Technique
    network: Network
    device: str
    quick: bool
    lock: str
    limit: int

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def spec_of(values: dict[str, Any]) -> Spec:
    """Return a Spec from its JSON."""
    made = {"technique": Technique(**values["technique"]), "network": Network(**values["network"])}
    return Spec(**values | made)


def ours(blocks: int, rank: int = 5, **settings: Any) -> Technique:
    """Return the row of a Trainer with these settings, named by them."""
    settings = {"offload": "cpu" if blocks > 1 else None, "slots": 2} | settings
    words = {"cpu": "host", "disk": "disk", None: ""}
    told = [f"B = {blocks}", words[settings["offload"]]]
    told += [f"{settings['slots']} slot{'s'[: settings['slots'] > 1]}"] if settings["offload"] else []
    told += ["layers checkpointed"] if settings.get("checkpoint_layers") else []
    told += ["not captured"] if settings.get("capture") is False else []
    told += ["bfloat16 moments"] if settings.get("moments") == "bfloat16" else []
    name = ", ".join(["ours", *(text for text in told if text)])
    return Technique(name, "ours", {"blocks": blocks, **settings}, rank)


# Each line adds to those above it, up to the blank one; then each stands for itself.
PLAIN = [
    Technique("end to end", "plain", rank=0),
    Technique("+ activation checkpointing", "plain", CHECKPOINTED, 2),
    Technique("+ fused optimizer", "plain", CHECKPOINTED | {"optimizer": "fused"}, 2),
    Technique("+ 8-bit Adam (torchao)", "plain", CHECKPOINTED | {"optimizer": "torchao"}, 3),
    Technique("+ 8-bit Adam (bitsandbytes)", "plain", CHECKPOINTED | {"optimizer": "bitsandbytes"}, 4, cuda=True),

    Technique("checkpointing, optimizer on the host (torchao)", "plain", CHECKPOINTED | {"optimizer": "offloaded"}, 2,
              cuda=True),
    Technique("checkpointing, FSDP2, CPU offload", "plain", CHECKPOINTED | {"fsdp": True}, 2, cuda=True),
    Technique("checkpointing, BAdam", "plain", CHECKPOINTED | {"optimizer": "badam"}, 3),
    Technique("checkpointing, APOLLO", "plain", CHECKPOINTED | {"optimizer": "apollo"}, 3),
    Technique("checkpointing, GaLore", "plain", CHECKPOINTED | {"optimizer": "galore"}, 6),
]  # fmt: skip
OURS = [
    ours(1, 3),
    ours(2, 3), ours(3, 0), ours(6, 1), ours(12, 1),
    ours(2, 4, slots=1), ours(3, 2, slots=1), ours(6, 4, slots=1), ours(12, 2, slots=1),
    ours(3, 2, offload="disk"), ours(12, 3, offload="disk"), ours(12, 4, offload="disk", slots=1),
    ours(3, 2, capture=False), ours(12, 3, capture=False),
    ours(3, 3, checkpoint_layers=True), ours(12, 1, slots=1, checkpoint_layers=True),
    ours(3, 4, moments="bfloat16"),
]  # fmt: skip
NETWORKS = {
    "gpu": [
        Network("DiT 1024 x 24", "dit", dict(dim=1024, layers=24, heads=16, mlp=4096, image_size=32, patch=2), 64),
        Network("language model 768 x 12", "lm", dict(dim=768, layers=12, heads=12, mlp=2048, vocab_size=32768), 8,
                1024),
    ],
    "cpu": [
        Network("DiT 256 x 12", "dit", dict(dim=256, layers=12, heads=4, mlp=1024, image_size=16, patch=2), 4),
        Network("language model 192 x 12", "lm", dict(dim=192, layers=12, heads=4, mlp=512, vocab_size=2048), 2, 128),
    ],
    "quick": [Network("tiny DiT", "dit", dict(dim=16, layers=6, heads=2, mlp=32, cond=8, image_size=8, patch=4), 4)],
}  # fmt: skip
DEEP = {
    "gpu": Network("DiT 256 wide", "dit", dict(dim=256, layers=0, heads=4, mlp=1024, image_size=16, patch=2), 32),
    "cpu": Network("DiT 64 wide", "dit", dict(dim=64, layers=0, heads=2, mlp=256, image_size=8, patch=2), 16),
    "quick": Network("DiT 16 wide", "dit", dict(dim=16, layers=0, heads=2, mlp=32, cond=8, image_size=8, patch=4), 4),
}
DEPTHS = {"gpu": (16, 64, 256, 1024), "cpu": (16, 64, 256, 1024), "quick": (8,)}
EACH = 4  # layers of a block
SMALL = Network("DiT 512 wide", "dit", dict(dim=512, layers=16, heads=8, mlp=2048, image_size=32, patch=2), 64)


def table(size: str) -> list[tuple[str, Technique, Network]]:
    """Return all rows of a size ("gpu", "cpu", "quick") in the order of the table: case, technique, network."""
    found = [
        (network.name, technique, network)
        for network in NETWORKS[size]
        for technique in [*PLAIN, *OURS]
        if size != "quick" or technique.name == "end to end" or technique == ours(3, 0)
        if size == "gpu" or not technique.cuda
    ]
    if size != "quick":
        found += [("a move", move, network) for network in NETWORKS[size][:1] for move in MOVES]
        found += [(f"{DEEP[size].name}, {EACH} layers a block", deep(n), DEEP[size]) for n in DEPTHS[size]]
    if size == "gpu":
        found.append((f"{SMALL.name}, {EACH} layers a block", Technique("ours", "kernels", rank=1), SMALL))
    return found


MOVES = [
    Technique("ours, host", "move", {"blocks": 3, "offload": "cpu", "slots": 1}, 1),
    Technique("ours, disk", "move", {"blocks": 3, "offload": "disk", "slots": 1}, 4),
]


def deep(layers: int) -> Technique:
    """Return the row of a network of some depth, in blocks of the same size, which wait on disk."""
    settings = {"layers": layers, "blocks": layers // EACH, "offload": "disk", "slots": 1}
    return Technique(f"ours, {layers} layers", "depth", settings, 3)


def place(name: str, names: Sequence[str] = tuple(t.name for t in [*PLAIN, *OURS])) -> int:
    """Return a row's place in the table of its network; rows of unknown names come last."""
    return names.index(name) if name in names else len(names)
