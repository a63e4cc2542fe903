import pytest
import torch
from hostile import Case, make_inputs

from quest_compile import ops

CASE = Case(torch.bfloat16, 64, 128, 2, 4, 16, (500, 64, 333), 512)
TOKEN_BYTES = (64 + 128) * 2
SUMMARY_BYTES = 2 * 64 * 2


@pytest.fixture
def inputs():
    inputs = make_inputs(CASE)
    ops.reset_counters()
    return inputs


def counts():
    return {name: count for name, count in ops.counters().items() if count}


def test_start_at_zero(inputs):
    assert counts() == {}


def test_update(inputs):
    ops.build_page_summary(inputs.key_cache, inputs.seq_lens)
    assert counts() == {"update_calls": 1, "pages_sealed": 31 * 6}


def test_dense(inputs):
    ops.dense_decode(*inputs.dense())
    num_tokens = (500 + 64 + 333) * 2
    assert counts() == {"dense_calls": 1, "bytes_read": num_tokens * TOKEN_BYTES}


@pytest.mark.parametrize("group_reduce", ["sum", "none"])
def test_sparse(inputs, group_reduce):
    """Two rows select: 3 whole pages and what the open one holds. One row fits and is dense."""
    ops.sparse_decode(*inputs.sparse(), budget=64, group_reduce=group_reduce)
    tokens = [3 * 16 + 500 % 16, 3 * 16 + 333 % 16]
    num_selections = 2 if group_reduce == "sum" else 8
    sparse_bytes = sum(tokens) * num_selections * TOKEN_BYTES
    sparse_bytes += (500 // 16 + 333 // 16) * 2 * SUMMARY_BYTES
    assert counts() == {
        "sparse_calls": 1,
        "sparse_rows": 2 * 8,
        "tokens_attended": sum(tokens) * 8,
        "max_tokens_attended": max(tokens),
        "bytes_read": sparse_bytes + 64 * 2 * TOKEN_BYTES,
    }


def test_sparse_covered(inputs):
    ops.sparse_decode(*inputs.sparse(), budget=512)
    num_tokens = (500 + 64 + 333) * 2
    assert counts() == {"sparse_calls_covered": 1, "bytes_read": num_tokens * TOKEN_BYTES}


def test_reset(inputs):
    ops.dense_decode(*inputs.dense())
    ops.reset_counters()
    assert counts() == {}
