"""adamw_ema_step: clip_grad_norm_ + fused AdamW + lerp (eager), torch.compile of the definition, ours, on one block.
In bfloat16 the optimizer works on float32 masters of the parameters.

Two parts, a block and a stem with a head, are clipped by their joint norm: total_norm and a step of each part (ours),
against get_total_norm and clip_grads_with_norm_ before the steps (clip apart).

python benchmarks/bench_adamw_ema.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest
"""

import harness
import torch
from timing import Call

import dbkernels

OPTIONS = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
UNIT = 2.0**-17  # of the largest weight: the norm's rounding, and Adam's division


def block_shapes(width, layers):
    """A transformer block's parameters: attention, MLP and modulation of each layer."""
    layer = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,),
             (width, 4 * width), (width,), (6 * width, width), (6 * width,)]  # fmt: skip
    return layer * layers


CPU_CASES = {"digits 64x2": block_shapes(64, 2), "ViT-S 384x4": block_shapes(384, 4),
             "Llama-768 x2": block_shapes(768, 2)}  # fmt: skip
GPU_CASES = {"DiT-L 1024x8": block_shapes(1024, 8)}
TINY = block_shapes(16, 1)
STEM_HEAD = [(384, 768), (384,), (1000, 384), (1000,)]


def make(shapes, dtype, device):
    """Return lists as adamw_ema_step takes them, and masters where the parameters are halves; the same every time."""
    generator = torch.Generator(device).manual_seed(1)
    wide = [torch.randn(shape, device=device, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]
    states = [[torch.zeros_like(p) for p in wide] for _ in range(2)]
    params = [p.to(dtype, copy=True) for p in wide]
    return [params, grads, *states, [p.clone() for p in wide]], wide if dtype != torch.float32 else None


def torch_step(lists, masters):
    params, grads, _, _, emas = lists
    leaves = [torch.nn.Parameter(p) for p in masters or params]
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
        return tuple(values)

    return step


def our_step(lists, masters):
    def step():
        dbkernels.adamw_ema_step(*lists, step=1, max_norm=1.0, ema_decay=0.99, masters=masters, **OPTIONS)
        return tuple(masters or lists[0])

    return step


def in_two(lists, masters):
    """Return (lists, masters) of the block and of the stem with the head, whose tensors are the last."""
    cut = -len(STEM_HEAD)
    return [([x[span] for x in lists], masters and masters[span]) for span in (slice(None, cut), slice(cut, None))]


def joint_step(lists, masters):
    parts = in_two(lists, masters)

    def step():
        norm = dbkernels.total_norm(lists[1])
        for part, wide in parts:
            dbkernels.adamw_ema_step(*part, step=1, max_norm=1.0, norm=norm, ema_decay=0.99, masters=wide, **OPTIONS)
        return tuple(masters or lists[0])

    return step


def apart_step(lists, masters):
    parts = in_two(lists, masters)
    leaves = [torch.nn.Parameter(p) for p in lists[0]]
    for leaf, grad in zip(leaves, lists[1], strict=True):
        leaf.grad = grad

    def step():
        norm = torch.nn.utils.get_total_norm(lists[1])
        torch.nn.utils.clip_grads_with_norm_(leaves, 1.0, norm)
        for part, wide in parts:
            dbkernels.adamw_ema_step(*part, step=1, ema_decay=0.99, masters=wide, **OPTIONS)
        return tuple(masters or lists[0])

    return step


def triton_step(lists, masters):
    """Our Triton kernels, where the CUDA library serves the op."""
    from dbkernels.triton.adamw_ema_list import step as launch

    decays = [OPTIONS["weight_decay"]] * len(lists[0])

    def step():
        launch(*lists, 1, 1e-3, 0.9, 0.95, 1e-8, decays, 1.0, 0.99, masters or [], False, 0, 0)
        return tuple(masters or lists[0])

    return step


def compiled_step(op):
    def of(lists, masters):
        decays = [OPTIONS["weight_decay"]] * len(lists[0])

        def step():
            op(*lists, 1, 1e-3, 0.9, 0.95, 1e-8, decays, 1.0, 0.99, masters or ())
            return tuple(masters or lists[0])

        return step

    return of


def one_part(dtype, bench):
    ops = {"eager": torch_step, "ours": our_step}
    if bench.device.type == "cuda" and dbkernels.compiled("_C_cuda") is not None:
        ops["ours, Triton"] = triton_step
    if bench.device.type == "cpu" or dtype == torch.float32:  # it takes minutes on a GPU
        compiled = bench.compiled(dbkernels.adamw_ema_step_reference)
        ops |= {name: compiled_step(op) for name, op in compiled.items() if name == "compile"}
    return ops


def two_parts(dtype, bench):
    return {"eager": torch_step, "clip apart": apart_step, "ours": joint_step}


def case(shapes, dtype, bench, ops_of=one_part):
    device, ops = bench.device, ops_of(dtype, bench)
    contenders = {name: lambda op=op: Call(op(*make(shapes, dtype, device))) for name, op in ops.items()}

    def exact():
        lists, masters = make(shapes, dtype, device)
        # masters hold what halves lose, so that both dtypes have one definition: float64 lists without masters
        params = masters or lists[0]
        wide = [[t.double() for t in tensors] for tensors in (params, *lists[1:])]
        dbkernels.adamw_ema_step_reference(
            *wide, 1, 1e-3, 0.9, 0.95, 1e-8, [OPTIONS["weight_decay"]] * len(params), 1.0, 0.99
        )
        return wide[0]

    return harness.Case(contenders, {"both": bytes_moved(shapes, dtype)}, exact, UNIT)


def bytes_moved(shapes, dtype):
    """Read: gradient twice (the norm needs them all before the first update), parameter or master, two moments, EMA.
    Written: the same but the gradient, and the parameter beside its master."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    return numel * (10 * 4 if dtype == torch.float32 else 2 * 2 + 8 * 4 + 2)


def main(arguments=None):
    bench = harness.Bench("adamw_ema", harness.options(__doc__, arguments))
    dtypes = (torch.float32,) if bench.options.quick else (torch.float32, torch.bfloat16)
    for name, shapes in bench.pick(cpu=CPU_CASES, gpu=GPU_CASES, quick={"tiny": TINY}).items():
        for dtype in dtypes:
            bench.kernels(name, dtype, lambda s=shapes, d=dtype: case(s, d, bench))
    pairs = {"ViT-S 384x4, stem and head": block_shapes(384, 4) + STEM_HEAD}
    for name, shapes in bench.pick(cpu=pairs, gpu=pairs, quick={"tiny, stem and head": TINY + STEM_HEAD}).items():
        for dtype in dtypes:
            bench.kernels(name, dtype, lambda s=shapes, d=dtype: case(s, d, bench, two_parts))
    bench.host("tiny 16x1", torch.float32, lambda: case(TINY, torch.float32, bench))
    bench.finish()


if __name__ == "__main__":
    main()
