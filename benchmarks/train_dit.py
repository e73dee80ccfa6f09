"""Training of a DiT through the library: milliseconds a step, peak memory, and how long a block takes to move.

python benchmarks/train_dit.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest

Batches of 64 images of 256 tokens, bfloat16 under autocast, all blocks but one in host memory.
"""

import time

import harness
import torch
from rows import Row

from diffusionblocks.experiments.models.dit import DiTConfig
from diffusionblocks.experiments.tasks.base import Loader
from diffusionblocks.experiments.tasks.dit import DiTRun, DiTTask
from diffusionblocks.training.trainer import Trainer

LARGE = DiTConfig(dim=1024, layers=24, heads=16, mlp=4096, image_size=32, patch=2)
TINY = DiTConfig(dim=16, layers=6, heads=2, mlp=32, cond=8, image_size=8, patch=4)
BLOCKS, BATCH = (1, 3, 6), 64
WARM, TIMED = 5, 10  # steps of a visit


class Clock:
    """Reads the time after the steps that begin and end what is clocked; only there it waits for the device."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, trainer, output):
        step, visit = trainer.steps_done, WARM + TIMED
        if step not in (WARM, visit, visit + 1, visit + WARM, 2 * visit):
            return
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
            if step == WARM:
                torch.cuda.reset_peak_memory_stats()
        self.at[step] = time.perf_counter()

    def ms(self, start, end):
        """Return milliseconds from after step `start` to after step `end`."""
        return 1e3 * (self.at[end] - self.at[start])


class Made:
    """Batches of noise: what a step takes doesn't depend on what is in them."""

    def __init__(self, model, device):
        self.y = torch.rand(BATCH, model.channels, model.image_size, model.image_size, device=device) * 2 - 1
        self.x = torch.randint(model.num_classes, (BATCH,), device=device)

    def batch(self, step):
        return self.x, self.y


def measured(name, model, blocks, bench):
    device, visit = bench.device, WARM + TIMED
    config = DiTRun(model=model, blocks=blocks, batch_size=BATCH, steps=2 * visit, visit=visit, baseline=(),
                    precision="bfloat16", offload="cpu", ema=0.999, device=str(device))  # fmt: skip
    clock, trainer = Clock(), Trainer(DiTTask(config).model(), config)
    trainer.callbacks.append(clock)
    trainer.fit(Loader(Made(model, device)), steps=2 * visit, progress=False)
    step = clock.ms(visit + WARM, 2 * visit) / TIMED
    row = Row(name, "bfloat16", "ours", ms_50=step)
    if blocks > 1:
        row.note = f"a block out and the next one in: {clock.ms(visit, visit + 1) - step:.0f} ms"
    if device.type == "cuda":
        row.peak_mib = torch.cuda.max_memory_allocated() / 2**20
        row.reserved_mib = torch.cuda.max_memory_reserved() / 2**20
    return row


def main(arguments=None):
    bench = harness.Bench("training_dit", harness.options(__doc__, arguments))
    model = TINY if bench.options.quick else LARGE
    for blocks in BLOCKS:
        name = f"{model.dim} wide, {model.layers} layers, B = {blocks}"
        bench.record(name, torch.bfloat16, lambda name=name, blocks=blocks: measured(name, model, blocks, bench))
    bench.finish()


if __name__ == "__main__":
    main()
