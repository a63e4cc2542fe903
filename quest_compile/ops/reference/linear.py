"""Linear layers. Shape suffixes: R rows, I in_features, O out_features."""

import torch

from quest_compile.ops.products import widen


def linear_decode(x, weight_OI, bias_O):
    rows_RI = widen(x.reshape(-1, x.shape[-1]))
    weight, bias = widen(weight_OI), 0 if bias_O is None else widen(bias_O)
    # BLAS rounds by shape: row by row, no bit depends on the other rows.
    out_RO = torch.stack([(weight * row_I).sum(-1) + bias for row_I in rows_RI])
    return out_RO.to(x.dtype).reshape(*x.shape[:-1], weight_OI.shape[0])
