"""two_stream_attention on a GPU: the op and its gradient, by the fastest path per kind of input.
Definition: dbkernels/two_stream_attention.py; paths: two_stream_plans.py.
"""

import torch

from dbkernels._fastest import Choice, fastest, refusal, untimed
from dbkernels._two_stream import kind_of
from dbkernels.triton.launch import ALIGNMENT, Kinds
from dbkernels.triton.two_stream_plans import TRITON, Backward, Forward, Options

_chosen: dict[tuple[object, ...], Choice] = {}


def path_of(plan, arguments, tensors):
    """Return the path of a call of plan.run(path, *arguments). The first call per kind of input times all paths.

    The user may forbid cuDNN's attention; its gradients differ from run to run, so deterministic algorithms do too.
    """
    forbidden = not torch._C._get_cudnn_sdp_enabled() or (plan.backward and torch._C._get_deterministic_algorithms())
    if forbidden or any(t is not None and t.data_ptr() % ALIGNMENT for t in tensors):
        return TRITON
    if plan.choice is None and not untimed():
        known = _chosen.get(plan.bucket)
        if known is None:
            known = fastest({path: lambda path=path: plan.run(path, *arguments) for path in plan.paths})
            if not known.milliseconds:
                return known.name  # nothing could be compared, as where a loss scale overflows: the next call tries
            _chosen[plan.bucket] = known
        elif known.name != TRITON:
            why = refusal(lambda: plan.run(known.name, *arguments))
            known = known if why is None else Choice(TRITON, why)
        plan.choice = known
    return TRITON if plan.choice is None else plan.choice.name


def run(plan, *arguments):
    if plan.choice is not None and plan.choice.name == TRITON:
        return plan.run(TRITON, *arguments)
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    return plan.run(path_of(plan, arguments, tensors), *arguments)


def adjacent(tensor):
    """Return whether a row's elements are adjacent, as the kernels read them, and a tile's lie within 2^31 elements."""
    return tensor is None or (tensor.stride(-1) == 1 and tensor.stride(2) <= 2**23)


def with_rows(tensors):
    return [t if adjacent(t) else t.contiguous() for t in tensors]


plans = Kinds()
accepted = Kinds()  # kinds of input that passed the checks, and their scale


def forward(q, k, v, q_noisy, k_noisy, v_noisy, group_size, scale, cu_seqlens, key=None):
    """Run the op under the CUDA key. key: `kind_of` all arguments, if it is known."""
    key = key or kind_of(q, k, v, q_noisy, k_noisy, v_noisy, group_size, scale, cu_seqlens)
    streams = q, k, v, q_noisy, k_noisy, v_noisy
    plan = plans.get(key)
    if plan is None:
        if not all(map(adjacent, streams)):
            return forward(*with_rows(streams), group_size, scale, cu_seqlens)
        sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
        plan = plans.keep(key, Forward(Options(group_size, scale, sequences), *streams[:4]))
    return run(plan, *streams, cu_seqlens)


def backward(grad, grad_noisy, q, k, v, q_noisy, k_noisy, v_noisy, out, out_noisy, lse, lse_noisy, group_size, scale,
             cu_seqlens):  # fmt: skip
    """Run the gradient's op under the CUDA key."""
    given = grad, grad_noisy, q, k, v, q_noisy, k_noisy, v_noisy
    key = kind_of(*given, out, out_noisy, group_size, scale, cu_seqlens)
    plan = plans.get(key)
    if plan is None:
        if not all(map(adjacent, given)):
            likes = given[2:]
            outs = out, out_noisy, lse, lse_noisy
            grads = backward(*with_rows(given), *outs, group_size, scale, cu_seqlens)
            return [g if t is None or adjacent(t) else torch.empty_like(t).copy_(g)
                    for g, t in zip(grads, likes, strict=True)]  # fmt: skip
        sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
        plan = plans.keep(key, Backward(Options(group_size, scale, sequences), *given[2:6]))
    return run(plan, *given, out, out_noisy, lse, lse_noisy, cu_seqlens)


def chosen(q, k, v, q_noisy, k_noisy, v_noisy, group_size, scale, cu_seqlens):
    """Return the choices for such a forward and backward pass, by running both."""
    streams = with_rows((q, k, v, q_noisy, k_noisy, v_noisy))
    options = group_size, scale, cu_seqlens
    outs = forward(*streams, *options)
    given = None if q is None else outs[0], outs[1], *streams
    backward(*given, *outs, *options)
    known = plans[kind_of(*streams, *options)].choice, plans[kind_of(*given, *outs[:2], *options)].choice
    now = Choice(TRITON, "cuDNN's attention is switched off, pointers aren't aligned, or nothing can be timed now")
    return [now if choice is None else choice for choice in known]
