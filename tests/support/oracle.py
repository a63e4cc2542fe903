"""The one tolerance rule: at most twice the error of plain torch in the same dtype.

Both errors are measured against the reference in float64. A few units in the last place of the
output dtype are granted on top: plain torch is exact now and then.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

_GRANTED_ULPS = 2


def assert_as_accurate_as(plain, actual, exact):
    """``actual`` is as close to ``exact`` (float64) as ``plain``.

    ``plain``: plain torch in the dtype of actual; a list of results where torch has several ways
    to the same thing, as the error of a single one may be small by luck.
    """
    plains = plain if isinstance(plain, list) else [plain]
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert all(actual.dtype == x.dtype for x in plains)
    is_finite = exact.isfinite()
    assert torch.equal(actual[~is_finite].double(), exact[~is_finite]), "not finite elsewhere"
    assert actual[is_finite].isfinite().all(), "not finite where the exact result is"
    if not is_finite.any():
        return
    plain_error = max((x[is_finite].double() - exact[is_finite]).abs().max() for x in plains)
    size = exact[is_finite].abs().max()
    budget = 2 * plain_error + _GRANTED_ULPS * torch.finfo(actual.dtype).eps * size
    error = (actual.double() - exact)[is_finite].abs().max()
    assert error <= budget, f"error {error:.3g}, plain torch {plain_error:.3g}, budget {budget:.3g}"


def in_float64(function, *args, **kwargs):
    """``function`` with every floating point tensor among its arguments as float64."""
    return function(*(_double(x) for x in args), **kwargs)


def _double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def plain_attention(query, keys, values, is_attended, dtype, scale=None):
    """Attention by torch operators in ``dtype``: out [batch, num_q_heads, 1, value_dim], lse.

    ``is_attended`` bool [batch, num_q_heads, 1, num_positions]. Returns lists, as
    assert_as_accurate_as takes them: 16-bit results are rounded at the end, but those of float32
    depend on the order of sums. out is 0 and lse -inf where nothing is attended.
    """
    query, keys, values = (x.to(dtype) for x in (query, keys, values))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outs = [
        scaled_dot_product_attention(
            query, keys, values, is_attended, scale=scale, enable_gqa=query.shape[1] > keys.shape[1]
        )
    ]
    lses = []
    for channels in _orders(query.shape[-1]) if dtype == torch.float32 else ():
        ordered = query[..., channels], keys[..., channels]
        out, lse = _attention(*ordered, values, is_attended, scale)
        outs.append(out)
        lses.append(lse)
    is_empty = ~is_attended.any(-1, keepdim=True)
    return [out.masked_fill(is_empty, 0) for out in outs], lses


def exact_attention(query, keys, values, is_attended, scale=None):
    """The same in float64, once."""
    query, keys, values = (x.double() for x in (query, keys, values))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _attention(query, keys, values, is_attended, scale)
    return out.masked_fill(~is_attended.any(-1, keepdim=True), 0), lse


def _attention(query, keys, values, is_attended, scale):
    """The query heads of a KV head as the rows of one matrix."""
    num_kv_heads = keys.shape[1]
    logits = query.unflatten(1, (num_kv_heads, -1)).squeeze(3) @ keys.mT * scale
    is_attended = is_attended.unflatten(1, (num_kv_heads, -1)).squeeze(3)
    logits = logits.masked_fill(~is_attended, -torch.inf)
    out = logits.softmax(-1) @ values
    return out.flatten(1, 2)[:, :, None], logits.logsumexp(-1).flatten(1, 2)[..., None]


def _orders(size):
    ascending = torch.arange(size)
    shuffled = torch.Generator().manual_seed(0)
    return [
        ascending,
        ascending.flip(0),
        torch.cat([ascending[::2], ascending[1::2]]),
        *(torch.randperm(size, generator=shuffled) for _ in range(3)),
    ]
