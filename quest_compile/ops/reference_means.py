"""Rows of summary="meanstd" in plain torch: mean and standard deviation of the keys of a page.

A row is a function of the keys, bit for bit: sums have an order, products are rounded before they
are added, and every NaN is the same one. Relative to the first key of the page, so that keys that
are all the same have their own value as mean and no deviation. A key that is not finite, or squares
beyond float32, give a deviation that is not finite either: such a page scores highest.
"""

import torch


def page_rows(keys):
    """keys [B, K, P, T, D] -> [B, K, P, 2, D] in the dtype of the keys."""
    inverse = keys.new_full((), keys.shape[-2], dtype=torch.float32).reciprocal()
    first, *_ = tokens = keys.float().unbind(-2)
    shift = sum_in_order((token - first) * inverse for token in tokens)
    rests = ((token - first) - shift for token in tokens)
    variance = sum_in_order(rest * rest for rest in rests) * inverse
    row = torch.stack([first + shift, root(variance)], -2)
    return row.to(keys.dtype).masked_fill(row.isnan(), torch.nan)


def root(x):
    """Rounded once, which sqrt in float32 is not on every machine."""
    return x.double().sqrt().float()


def sum_in_order(values):
    total = 0.0
    for value in values:
        total = total + value
    return total
