"""Train transformers' Vision Transformer block by block, save it, and load it in one line.

python examples/convert_vit.py --steps 60    needs transformers; random images stand in for yours
"""

import argparse
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import diffusionblocks as db


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("vit"))
    args = parser.parse_args()

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    network = ViTForImageClassification(config)  # or .from_pretrained(...)
    model = db.convert(network, blocks=3, shared="per_block")
    trainer = db.Trainer(model, lr=1e-3, visit=5, offload="auto", folder=args.out / "waiting", device="cpu")
    for _ in range(args.steps):
        x, y = torch.randn(16, 3, 32, 32), torch.randint(5, (16,))
        output = trainer.step(x, y)
    print(f"block {output.block}, loss {output.loss:.3f}; bytes on the device: {trainer.memory().by_category}")

    model.eval().save_pretrained(args.out / "model")
    again = db.load(args.out / "model")
    print("same output:", torch.equal(model(x), again(x)))


if __name__ == "__main__":
    main()
