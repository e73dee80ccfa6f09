"""adamw_ema_step: clip_grad_norm_ + fused AdamW + lerp (eager), torch.compile of the definition, ours, on one
block.

python benchmarks/bench_adamw_ema.py [--device cuda] [--threads N] [--seconds S] [--out FOLDER]
"""

import harness
import torch

import dbkernels

OPTIONS = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def block_shapes(width, layers):
    """A transformer block's parameters: attention, MLP and modulation of each layer."""
    layer = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,),
             (width, 4 * width), (width,), (6 * width, width), (6 * width,)]  # fmt: skip
    return layer * layers


CASES = {
    "digits 64x2": block_shapes(64, 2),
    "ViT-S 384x4": block_shapes(384, 4),
    "Llama-768 x2": block_shapes(768, 2),
}
GPU_CASES = {"DiT-L 1024x8": block_shapes(1024, 8), "4096-wide x2": block_shapes(4096, 2)}


def make(shapes, device):
    params = [torch.randn(shape, device=device) for shape in shapes]
    grads = [torch.randn(shape, device=device) for shape in shapes]
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    return params, grads, *states, [p.clone() for p in params]


def torch_step(lists):
    params, grads, _, _, emas = lists
    leaves = [torch.nn.Parameter(p.clone()) for p in params]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    optimizer = torch.optim.AdamW(leaves, fused=True, **OPTIONS)

    def step():
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        torch._foreach_lerp_(emas, [leaf.detach() for leaf in leaves], 0.01)

    return step, leaves


def our_step(lists):
    return lambda: dbkernels.adamw_ema_step(*lists, step=3, max_norm=1.0, ema_decay=0.99, **OPTIONS)


def compiled_step(lists):
    decays = [OPTIONS["weight_decay"]] * len(lists[0])
    step = torch.compile(dbkernels.adamw_ema_step_reference, dynamic=False)
    return lambda: step(*lists, 3, 1e-3, 0.9, 0.95, 1e-8, decays, 1.0, 0.99)


def check(shapes, device):
    """The first step by both, from the same state."""
    lists = make(shapes, device)
    step, leaves = torch_step(lists)
    ours = [[tensor.clone() for tensor in tensors] for tensors in lists]
    step()
    dbkernels.adamw_ema_step(*ours, step=1, max_norm=1.0, ema_decay=0.99, **OPTIONS)
    for a, b in zip(ours[0], leaves, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def main():
    options = harness.options(__doc__)
    device = options.device
    rows = []
    for case, shapes in {**CASES, **(GPU_CASES if device.type == "cuda" else {})}.items():
        check(shapes, device)
        torch._dynamo.reset()
        contenders = {
            "eager": torch_step(make(shapes, device))[0],
            "compile": compiled_step(make(shapes, device)),
            "ours": our_step(make(shapes, device)),
        }
        # Read: gradient twice (the norm needs them all before the first update), parameter, two moments, EMA.
        # Written: parameter, moments, EMA.
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        rows += harness.measure(case, torch.float32, contenders, 10 * 4 * numel, device, options.seconds)
    harness.save("adamw_ema", rows, device, options.out, options.note)


if __name__ == "__main__":
    main()
