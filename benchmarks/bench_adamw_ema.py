"""adamw_ema_step: clip_grad_norm_ + fused AdamW + lerp (eager), torch.compile of the definition, ours, on one block.
In bfloat16 the optimizer works on float32 masters of the parameters.

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


def make(shapes, dtype, device):
    """Lists as adamw_ema_step takes them: masters where the parameters are halves, else none."""
    wide = [torch.randn(shape, device=device) for shape in shapes]
    grads = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    states = [[torch.zeros_like(p) for p in wide] for _ in range(2)]
    half = dtype != torch.float32
    params = [p.to(dtype) for p in wide]
    return [params, grads, *states, [p.clone() for p in wide]], wide if half else None


def torch_step(lists, masters):
    params, grads, _, _, emas = lists
    leaves = [torch.nn.Parameter(p.clone()) for p in masters or params]
    optimizer = torch.optim.AdamW(leaves, fused=True, **OPTIONS)

    def step():
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.float() if masters else grad
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        values = [leaf.detach() for leaf in leaves]
        torch._foreach_lerp_(emas, values, 0.01)
        if masters:
            torch._foreach_copy_(params, values)

    return step, leaves


def our_step(lists, masters):
    return lambda: dbkernels.adamw_ema_step(*lists, step=3, max_norm=1.0, ema_decay=0.99, masters=masters, **OPTIONS)


def compiled_step(lists, masters):
    decays = [OPTIONS["weight_decay"]] * len(lists[0])
    step = torch.compile(dbkernels.adamw_ema_step_reference, dynamic=False)
    return lambda: step(*lists, 3, 1e-3, 0.9, 0.95, 1e-8, decays, 1.0, 0.99, masters or ())


def check(shapes, dtype, device):
    """The first step by both, from the same state."""
    lists, masters = make(shapes, dtype, device)
    ours, our_masters = copies(lists, masters)
    step, leaves = torch_step(lists, masters)
    step()
    dbkernels.adamw_ema_step(*ours, step=1, max_norm=1.0, ema_decay=0.99, masters=our_masters, **OPTIONS)
    for a, b in zip(our_masters or ours[0], leaves, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def copies(lists, masters):
    return [[t.clone() for t in tensors] for tensors in lists], masters and [t.clone() for t in masters]


def bytes_moved(shapes, dtype):
    """Read: gradient twice (the norm needs them all before the first update), parameter or master, two moments, EMA.
    Written: the same but the gradient, and the parameter beside its master."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    return numel * (10 * 4 if dtype == torch.float32 else 2 * 2 + 8 * 4 + 2)


def main():
    options = harness.options(__doc__)
    device = options.device
    rows = []
    for case, shapes in {**CASES, **(GPU_CASES if device.type == "cuda" else {})}.items():
        for dtype in (torch.float32, torch.bfloat16):
            check(shapes, dtype, device)
            torch._dynamo.reset()
            contenders = {
                "eager": torch_step(*make(shapes, dtype, device))[0],
                "compile": compiled_step(*make(shapes, dtype, device)),
                "ours": our_step(*make(shapes, dtype, device)),
            }
            rows += harness.measure(case, dtype, contenders, bytes_moved(shapes, dtype), device, options.seconds)
    harness.save("adamw_ema", rows, device, options.out, options.note)


if __name__ == "__main__":
    main()
