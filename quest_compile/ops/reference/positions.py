"""Which positions each query of a call may attend, in plain torch: lengths, masks, several queries.

Shape suffixes: those of ops/reference.
"""

import torch
from torch.nn.functional import pad


def each_query(query, seq_lens, attn_mask=None):
    """Operators that take several queries treat each as if it came alone: query [B, Q, 1, D], its
    seq_lens and its mask, one after the other.

    Without a mask query i of n stands at position seq_len - n + i and attends what is before it.
    With one, the mask says what it attends: positions at the end that the mask forbids, behind that
    position, do not count for its seq_len.
    """
    num_queries = query.shape[2]
    for i in range(num_queries):
        seq_lens_i, mask_i = seq_lens - (num_queries - 1 - i), None
        if attn_mask is not None:
            mask_i = attn_mask[:, :, min(i, attn_mask.shape[2] - 1), None]
            if i < num_queries - 1:
                end = last_live_position(seq_lens, mask_i) + 1
                seq_lens_i = torch.maximum(seq_lens_i, end)
        yield query[:, :, i : i + 1], seq_lens_i, mask_i


def join_queries(outs):
    """In memory [B, queries, Q, E], as attention gives it for a query that is a projection."""
    return torch.cat([out.transpose(1, 2) for out in outs], 1).transpose(1, 2)


def live_positions(seq_lens, attn_mask, num_positions):
    """What may be attended: bool [B or 1, M, T]."""
    live_BMT = arange(num_positions, seq_lens) < seq_len_B11(seq_lens, num_positions)
    if attn_mask is not None:
        missing = num_positions - attn_mask.shape[-1] if attn_mask.shape[-1] > 1 else 0
        live_BMT = live_BMT & pad(attn_mask[:, :, 0], (0, missing))
    return live_BMT


def last_live_position(seq_lens, attn_mask):
    """[B]: below seq_lens, for any head; -1 where there is none."""
    allowed_BT = attn_mask[:, :, 0].any(1)
    if allowed_BT.shape[-1] == 1:
        return torch.where(allowed_BT[:, 0], seq_lens - 1, -1)
    position = arange(allowed_BT.shape[-1], seq_lens)
    return torch.where(allowed_BT & (position < seq_lens[:, None]), position, -1).amax(-1)


def seq_len_B11(seq_lens, max_seq_len):
    return seq_lens.long().clamp(1, max_seq_len)[:, None, None]


def arange(end, like):
    return torch.arange(end, device=like.device)
