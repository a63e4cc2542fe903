import dataclasses

import torch
from hostile import Case, every_way, make_inputs

from quest_compile import ops

CASE = Case(torch.bfloat16, 64, 128, 2, 4, 16, (500, 64, 333), 512)
TOKEN_BYTES = (64 + 128) * 2
NUM_TOKENS = (500 + 64 + 333) * 2


def counts_of(op, *arguments, **settings):
    ops.reset_counters()
    assert not any(ops.counters().values())
    op(*arguments, **settings)
    return {name: count for name, count in ops.counters().items() if count}


def row_bytes(case):
    if case.summary == "minmax":
        return 2 * 64 * 2
    # Signs, mean, 16 scales of tokens and one of the mean, up to a multiple of 64.
    return {1: 128 + 64 + 64, 2: 128 + 64 + 64 + 128}[case.sketch_bits]


def test_update():
    inputs = make_inputs(CASE)
    counts = counts_of(ops.build_page_summary, inputs.key_cache, inputs.seq_lens)
    assert counts == {"update_calls": 1, "pages_sealed": 31 * 6}


def test_dense():
    counts = counts_of(ops.dense_decode, *make_inputs(CASE).dense())
    assert counts == {"dense_calls": 1, "bytes_read": NUM_TOKENS * TOKEN_BYTES}


@every_way
def test_sparse(way):
    """Two rows select: 3 whole pages and what the open one holds. One row fits and is dense."""
    inputs = make_inputs(dataclasses.replace(CASE, **way))
    counts = counts_of(ops.sparse_decode, *inputs.sparse(), **inputs.settings())
    tokens = [3 * 16 + 500 % 16, 3 * 16 + 333 % 16]
    num_selections = 8 if way["group_reduce"] == "none" else 2
    num_bytes = (sum(tokens) * num_selections + 64 * 2) * TOKEN_BYTES
    num_bytes += (500 // 16 + 333 // 16) * 2 * row_bytes(inputs.case)
    assert counts == {
        "sparse_calls": 1,
        "sparse_rows": 2 * 8,
        "tokens_attended": sum(tokens) * 8,
        "max_tokens_attended": max(tokens),
        "bytes_read": num_bytes,
    }


def test_sparse_covered():
    counts = counts_of(ops.sparse_decode, *make_inputs(CASE).sparse(), budget=512)
    assert counts == {"sparse_calls_covered": 1, "bytes_read": NUM_TOKENS * TOKEN_BYTES}
