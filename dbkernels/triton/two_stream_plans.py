"""The paths that two_stream_attention may take on a GPU, and their launches, prepared once per kind of input.

The clean stream is plain causal attention, and for groups of one the noisy stream's attention to clean keys is causal,
shifted by one: both may be cuDNN's. The kernels of this folder serve everything else. Given the merged output and
log-sum-exp, every part's gradient is exact by itself, so forward and backward may take different paths.
"""

from typing import NamedTuple

import torch

from dbkernels._fastest import Choice
from dbkernels._two_stream import like_rows
from dbkernels.triton import two_stream_join as joins
from dbkernels.triton import two_stream_keys as keys
from dbkernels.triton import two_stream_queries as queries
from dbkernels.triton.two_stream_attention import prepare_forward, sequence_tiles

TRITON, CLEAN, BOTH = "triton", "cudnn for the clean stream, triton", "cudnn, joined by triton"
SHORTEST = 128  # tokens: below, a call's host time decides, and one launch per stream is the least

# PyTorch keeps cuDNN's graphs by the layouts of q, k and v alone, though those of out and of its gradient are part of a
# graph (torch 2.11). Ours always have one layout; a probability of -0 keeps them apart from those of other callers.
NO_DROPOUT = -0.0


def cudnn_forward(q, k, v, scale):
    """Attend causally. Return out, laid out as q, and its log-sum-exp (B, H, N), contiguous."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = attend(q, k, v, None, True, NO_DROPOUT, True, False, scale=scale)
    return out, lse.view(q.shape[:3])


def cudnn_backward(grad, q, k, v, out, lse, scale):
    """Return dq, dk, dv, laid out as q, k, v, of the part of attention whose weights are exp(scores - lse)."""
    back = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    number = torch.empty((), dtype=torch.int64, device=q.device)  # the seed of a dropout that is off
    lengths = q.shape[2], k.shape[2]
    options = number, number, None, None, None, *lengths, NO_DROPOUT, True
    return back(grad, q, k, v, out, lse.unsqueeze(-1), *options, scale=scale)


class Options(NamedTuple):
    """The arguments that aren't tensors. sequences: their number, if cu_seqlens is given."""

    group_size: int
    scale: float
    sequences: int | None


def order_of(t):
    """Return the order of a tensor's dimensions in memory, and whether any is expanded: cuDNN is checked per layout."""
    strides = t.stride()
    return tuple(sorted(range(t.dim()), key=strides.__getitem__)), 0 in strides


def behind(t):
    return t[:, :, 1:]


def before(t):
    return t[:, :, :-1]


class Places:
    """Tables of the tiles of one call's sequences, by rows per tile."""

    def __init__(self, cu_seqlens, length, instead):
        self.cu_seqlens, self.length, self.instead, self.tables = cu_seqlens, length, instead, {}

    def __call__(self, rows):
        if self.cu_seqlens is None:
            return self.instead
        if rows not in self.tables:
            self.tables[rows] = sequence_tiles(self.cu_seqlens, self.length, rows)
        return self.tables[rows]


def unfit(q, k, v, q_noisy, sequences):
    """Return why cuDNN can't attend to such input, or None if it may."""
    if not k.is_cuda:
        return f"there is no cuDNN on {k.device.type}"
    if sequences is not None:
        return "cuDNN isn't given sequences of any lengths"
    if k.dtype not in (torch.float16, torch.bfloat16) or k.shape[3] > 128:
        return f"cuDNN's gradients are for float16 and bfloat16 and heads of up to 128, not {k.dtype} and {k.shape[3]}"
    if k.shape[2] < SHORTEST:
        return f"fewer than {SHORTEST} tokens take as long as their launches"
    if any(stride % 8 for t in (q, k, v, q_noisy) if t is not None for stride in t.stride()[:3]):
        return "cuDNN takes rows that begin at multiples of 16 bytes"
    return None


class Forward:
    """The forward pass for one kind of input, by each of its paths."""

    backward = False

    def __init__(self, options, q, k, v, q_noisy):
        self.options, self.launches = options, {}
        why = unfit(q, k, v, q_noisy, options.sequences)
        self.choice = None if why is None else Choice(TRITON, why)
        self.paths = [TRITON, *([] if q is None else [CLEAN]), *([BOTH] if options.group_size == 1 else [])]
        if len(self.paths) == 1:
            self.choice = Choice(TRITON, "no part of it is causal attention")
        sizes = (k.shape[0] * q_noisy.shape[1], q_noisy.shape[1] // k.shape[1], k.shape[2], options.group_size)
        sizes = [n.bit_length() for n in sizes]  # a timing holds for sizes to within a factor of two
        orders = tuple([order_of(t) for t in (k, v, q_noisy)])
        self.bucket = (self.backward, k.device, k.dtype, k.shape[3], q is None, options.group_size == 1, orders, *sizes)

    def prepared(self, name, prepare, *arguments):
        """Return the launch called `name`, prepared at its first use."""
        if name not in self.launches:
            self.launches[name] = prepare(*arguments)
        return self.launches[name]

    def by_triton(self, name, q, k, v, own_k, own_v, places):
        out, lse = like_rows(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        launch, rows = self.prepared(name, prepare_forward, q, k, v, own_k, own_v, out, *self.options)
        own = (k, v) if own_k is None else (own_k, own_v)
        launch(q, k, v, *own, out, lse, places(rows))
        return out, lse

    def by_cudnn(self, q, k, v):
        out, lse = cudnn_forward(q, k, v, self.options.scale)
        return (out if out.transpose(1, 2).is_contiguous() else like_rows(q).copy_(out)), lse

    def joined(self, q, k, v, own_k, own_v):
        far, far_lse = cudnn_forward(behind(q), before(k), before(v), self.options.scale)
        out, lse = like_rows(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        launch = self.prepared("join", joins.prepare_join, q, own_k, own_v, far, out, self.options.scale)
        launch(q, own_k, own_v, far, far_lse, out, lse)
        return out, lse

    def run(self, path, q, k, v, q_noisy, k_noisy, v_noisy, cu_seqlens=None):
        """Return (out, out_noisy, lse, lse_noisy), the first and third empty without q."""
        places = Places(cu_seqlens, k.shape[2], k)
        noisy = q_noisy, k, v, k_noisy, v_noisy
        out_noisy, lse_noisy = self.joined(*noisy) if path == BOTH else self.by_triton("noisy", *noisy, places)
        if q is None:
            out, lse = out_noisy.new_empty(0), lse_noisy.new_empty(0)
        elif path == TRITON:
            out, lse = self.by_triton("clean", q, k, v, None, None, places)
        else:
            out, lse = self.by_cudnn(q, k, v)
        return out, out_noisy, lse, lse_noisy


class Backward(Forward):
    """The backward pass for one kind of input, by each of its paths."""

    backward = True

    def queries_by_triton(self, name, dq, grad, q, k, v, own_k, own_v, out, lse, places):
        """Fill dq; return the numbers of the rows that the keys' gradients take."""
        numbers = torch.empty(*q.shape[:2], queries.room(q.shape[2]), 2, dtype=torch.float32, device=q.device)
        launch, rows = self.prepared(name, queries.prepare_queries, q, k, v, own_k, own_v, grad, out, dq, *self.options)
        own = (k, v) if own_k is None else (own_k, own_v)
        launch(q, k, v, *own, grad, out, lse, dq, numbers, places(rows))
        return numbers

    def keys_by_triton(self, name, k, v, dk, dv, q, grad, numbers, places, group, shift, **how):
        _, scale, sequences = self.options

        def prepare():
            return keys.prepare_keys(k, v, dk, dv, q, grad, group, shift, scale, sequences, **how)

        launch, columns = self.prepared(name, prepare)
        launch(k, v, dk, dv, q, grad, numbers, places(columns))

    def clean(self, path, grad, q, k, v, out, lse, places):
        """Return dq, dk, dv of the clean queries."""
        if path != TRITON:
            return cudnn_backward(grad, q, k, v, out, lse, self.options.scale)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        numbers = self.queries_by_triton("clean queries", dq, grad, q, k, v, None, None, out, lse, places)
        self.keys_by_triton("clean keys", k, v, dk, dv, q, grad, numbers, places, 1, 1)
        return dq, dk, dv

    def noisy(self, dk, dv, add, grad, q, k, v, own_k, own_v, out, lse, places):
        """Return dq, own_dk, own_dv; fill dk and dv, or add to them."""
        dq, own_dk, own_dv = (torch.empty_like(t) for t in (q, own_k, own_v))
        group = self.options.group_size
        numbers = self.queries_by_triton("noisy queries", dq, grad, q, k, v, own_k, own_v, out, lse, places)
        self.keys_by_triton("noisy to clean", k, v, dk, dv, q, grad, numbers, places, group, 0, add=add)
        self.keys_by_triton("own", own_k, own_v, own_dk, own_dv, q, grad, numbers, places, group, 0, own=True)
        return dq, own_dk, own_dv

    def separated(self, dk, dv, add, grad, q, k, v, own_k, own_v, out, lse):
        """Return the same, by cuDNN for the clean keys."""
        scale = self.options.scale
        part = behind(grad), behind(q), before(k), before(v), behind(out), behind(lse).contiguous()
        far = cudnn_backward(*part, scale)
        filled = [torch.empty_like(t) for t in (q, own_k, own_v)]
        prepare = joins.prepare_separate
        launch = self.prepared("separate", prepare, q, own_k, own_v, grad, out, far, filled, (dk, dv), scale, add)
        launch(q, own_k, own_v, grad, out, lse, *far, *filled, dk, dv)
        return filled

    def run(self, path, grad, grad_noisy, q, k, v, q_noisy, k_noisy, v_noisy, out, out_noisy, lse, lse_noisy,
            cu_seqlens=None):  # fmt: skip
        """Return the gradients of q (empty without), k, v, q_noisy, k_noisy, v_noisy."""
        places = Places(cu_seqlens, k.shape[2], k)
        if path != TRITON:
            grad, grad_noisy = (like_out(t, o) for t, o in ((grad, out), (grad_noisy, out_noisy)))
        add = q is not None
        if add:
            dq, dk, dv = self.clean(path, grad, q, k, v, out, lse, places)
        else:
            dq, dk, dv = grad_noisy.new_empty(0), torch.empty_like(k), torch.empty_like(v)
        noisy = dk, dv, add, grad_noisy, q_noisy, k, v, k_noisy, v_noisy, out_noisy, lse_noisy
        noisy_grads = self.separated(*noisy) if path == BOTH else self.noisy(*noisy, places)
        return [dq, dk, dv, *noisy_grads]


def like_out(grad, out):
    """Return the gradient, laid out as its output."""
    return grad if grad is None or grad.stride() == out.stride() else like_rows(grad).copy_(grad)
