"""Products and precision of the reference. Shape suffixes: those of ops/reference."""

import torch


def dot_products(query_BHGD, key_BHND):
    """[B, H, G, N]. BLAS rounds by shape: row by row, no bit depends on the rest of the batch; keys
    first, none on how threads share the queries."""
    return torch.stack([k @ q.mT for q, k in zip(query_BHGD, key_BHND, strict=True)]).mT


def widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
