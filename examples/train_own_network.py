"""Train a small transformer on scikit-learn's digits in three blocks, the waiting ones on disk; resume if stopped.

python examples/train_own_network.py --steps 1000    needs scikit-learn
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import diffusionblocks as db


def build(blocks: int) -> db.DiffusionBlocks:
    """Return a transformer over four tokens of two rows each, in `blocks` blocks."""
    layers = [nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, dropout=0.0) for _ in range(6)]
    stem = nn.Sequential(nn.Unflatten(1, (4, 16)), nn.Linear(16, 48))
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 48, 10))
    return db.from_layers(layers, stem=stem, head=head, target=db.LabelTarget(num_classes=10, dim=48), blocks=blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("digits"))
    args = parser.parse_args()

    torch.manual_seed(0)
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))  # (1797, 64), values 0 to 16
    images = images.float() / 8 - 1
    train = torch.utils.data.TensorDataset(images[:1437], labels[:1437])
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

    model = build(args.blocks)
    print(db.plan(model, batch=(images[:64], labels[:64]), device="cpu", offload="disk"))
    trainer = db.Trainer(
        model, lr=3e-3, steps=args.steps, warmup=0.05, device="cpu", offload="disk", folder=args.out / "waiting"
    )
    checkpoint = args.out / "checkpoint"
    if checkpoint.exists():
        trainer.load(checkpoint)
    while trainer.steps_done < args.steps:
        trainer.fit(loader, steps=min(trainer.steps_done + 250, args.steps))
        trainer.save(checkpoint)

    model.eval()
    accuracy = (model(images[1437:]).argmax(-1) == labels[1437:]).float().mean()
    print(f"accuracy {accuracy:.1%} after {trainer.steps_done} steps")
    model.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
