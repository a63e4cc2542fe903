"""Several queries in one call: each is treated as if it came alone, bit for bit."""

import pytest
import torch
from hostile import NAN, Case, in_turn, make_inputs

from quest_compile import ops

CASE = Case(torch.bfloat16, lengths=(300, 141, 40), max_seq_len=320)
CASES = in_turn(
    CASE,
    Case(torch.float32, 80, 80, 2, 3, 8, (131, 260), 333, "gaps", budget_pages=5),
    Case(torch.float16, 128, 64, 1, 7, 32, (500,), 500, "tokens_first"),
    Case(torch.bfloat16, 64, 128, 3, 1, 16, (1030, 64), 1100, budget_pages=20),
    Case(torch.float16, 24, 24, 2, 4, 16, (200, 90), 256, "gaps"),
    Case(torch.float32, 64, 64, 2, 2, 8, (150, 64, 20), 200, "tokens_first"),
    Case(torch.bfloat16, 8, 16, 1, 4, 24, (300, 150), 333, budget_pages=5),
)
MASKS = ("none", "causal", "padded", "everything", "tree", "heads", "one_row")
NAMES = ("dense_decode", "sparse_decode")

every_mask = pytest.mark.parametrize("mask", MASKS)
every_name = pytest.mark.parametrize("name", NAMES)


def make_call(case, num_queries, mask="none", device="cpu"):
    """The inputs of a call with ``num_queries`` queries at the end of each row."""
    inputs = make_inputs(case, device)
    batch, num_q_heads, _, head_dim = inputs.query.shape
    generator = torch.Generator().manual_seed(num_queries)
    # [B, q_len, H, D] in memory, as a projection gives it.
    query = torch.randn(batch, num_queries, num_q_heads, head_dim, generator=generator)
    inputs.query = query.to(device, case.dtype).transpose(1, 2)
    inputs.attn_mask = make_mask(mask, inputs, num_queries)
    return inputs


def make_mask(mask, inputs, num_queries):
    case = inputs.case
    generator = torch.Generator().manual_seed(7)
    position = torch.arange(case.max_seq_len)
    own = torch.tensor(case.lengths)[:, None] - num_queries + torch.arange(num_queries)
    causal = (position <= own[..., None])[:, None]
    if mask == "none":
        return None
    if mask == "padded":
        causal = causal & (position >= torch.tensor(case.lengths)[:, None, None, None] // 3)
    if mask == "everything":
        causal = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if mask == "tree":
        # Drafts that branch: what is before the drafts, and some of them, perhaps later ones.
        drafts = torch.rand(
            len(case.lengths), 1, num_queries, case.max_seq_len, generator=generator
        )
        causal = (position < own[:, None, :1, None]) | (drafts < 0.5)
    if mask == "heads":
        heads = case.num_kv_heads * case.group_size
        shape = (len(case.lengths), heads, num_queries, case.max_seq_len)
        causal = causal & (torch.rand(shape, generator=generator) < 0.7)
    if mask == "one_row":
        causal = (position != 3)[None, None, None]
    return causal.to(inputs.query.device)


def run(name, inputs):
    if name == "dense_decode":
        return ops.dense_decode(*inputs.dense())
    return ops.sparse_decode(*inputs.sparse(), **inputs.settings())


def run_alone(name, inputs, i):
    """Query i of the call by itself, its row as long as it can see."""
    num_queries = inputs.query.shape[2]
    alone = make_inputs(inputs.case, inputs.query.device)
    alone.query = inputs.query[:, :, i : i + 1]
    lengths = []
    for row, seq_len in enumerate(inputs.case.lengths):
        length = seq_len - (num_queries - 1 - i)
        if inputs.attn_mask is not None:
            shape = (len(inputs.case.lengths), -1, num_queries, inputs.case.max_seq_len)
            allowed = inputs.attn_mask.expand(shape)[row, :, i, :seq_len].any(0)
            later = allowed[length:].nonzero()
            length = max(length, length + int(later[-1]) + 1 if len(later) else 0)
        lengths.append(length)
    alone.seq_lens = torch.tensor(lengths, device=inputs.query.device)
    if inputs.attn_mask is not None:
        alone.attn_mask = inputs.attn_mask[:, :, i : i + 1]
        if inputs.attn_mask.shape[2] == 1:
            alone.attn_mask = inputs.attn_mask
    return run(name, alone)


@every_name
@pytest.mark.parametrize(
    ("mask", "case"),
    [(mask, CASES[(i + j) % len(CASES)]) for i, mask in enumerate(MASKS) for j in (0, 3)],
    ids=str,
)
def test_each_query_has_the_bits_of_a_call_of_its_own(name, mask, case, device):
    for num_queries in (2, 5, 8):
        inputs = make_call(case, num_queries, mask, device)
        out = run(name, inputs)
        assert out.shape == (*inputs.query.shape[:3], inputs.value_cache.shape[3])
        alone = [run_alone(name, inputs, i) for i in range(num_queries)]
        assert torch.equal(out, torch.cat(alone, 2))


@every_name
@pytest.mark.parametrize("num_queries", [1, 3, 8, 40])
def test_without_a_mask_queries_are_causal(name, num_queries):
    inputs = make_call(CASE, num_queries)
    expected = run(name, inputs)
    inputs.attn_mask = make_mask("causal", inputs, num_queries)
    assert torch.equal(run(name, inputs), expected)


@every_name
def test_what_a_query_may_not_attend_is_not_read(name):
    """The newest token is NaN: only the queries that see it notice."""
    inputs = make_call(CASE, 4)
    expected = run(name, inputs)
    for row, seq_len in enumerate(CASE.lengths):
        inputs.key_cache[row, :, seq_len - 1] = NAN
        inputs.value_cache[row, :, seq_len - 1] = NAN
    out = run(name, inputs)
    assert torch.equal(out[:, :, :3], expected[:, :, :3])
    assert out[:, :, 3].isnan().all()


@every_name
@every_mask
def test_number_of_threads_changes_no_bit(name, mask):
    inputs = make_call(CASES[3], 5, mask)
    torch.set_num_threads(1)
    expected = run(name, inputs)
    for count in (2, 5):
        torch.set_num_threads(count)
        assert torch.equal(run(name, inputs), expected)


def test_queries_on_both_sides_of_the_budget():
    """Rows of 66 positions and a budget of 64: the first queries attend everything."""
    case = Case(torch.bfloat16, lengths=(66, 64, 300), max_seq_len=320)
    inputs = make_call(case, 5)
    ops.reset_counters()
    out = run("sparse_decode", inputs)
    assert ops.counters()["sparse_calls"] == 1
    assert ops.counters()["sparse_rows"] == (2 + 5) * 8
    dense = run("dense_decode", inputs)
    assert torch.equal(out[0, :, :3], dense[0, :, :3])
    assert torch.equal(out[1], dense[1])
    assert not torch.equal(out[2], dense[2])


def test_no_query_attends_more_than_the_budget():
    inputs = make_call(CASE, 8)
    ops.reset_counters()
    run("sparse_decode", inputs)
    assert 0 < ops.counters()["max_tokens_attended"] <= 64


@every_name
def test_opcheck(name):
    inputs = make_call(CASE, 3, "padded")
    op = getattr(torch.ops.quest, name).default
    if name == "dense_decode":
        torch.library.opcheck(op, inputs.dense())
    else:
        torch.library.opcheck(op, inputs.sparse(), inputs.settings())


@every_name
def test_one_graph_serves_every_number_of_queries(name):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(query, key_cache, value_cache, page_summary, seq_lens):
        if name == "dense_decode":
            return ops.dense_decode(query, key_cache, value_cache, seq_lens)
        return ops.sparse_decode(query, key_cache, value_cache, page_summary, seq_lens, budget=64)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    # Not another size of the call: torch would take the two for the same symbol.
    counts = []
    for num_queries in (5, 6, 7):
        inputs = make_call(CASE, num_queries)
        assert torch.equal(compiled(*inputs.sparse()[:5]), run(name, inputs))
        counts.append(counter.frame_count)
    # With dynamic=True Dynamo starts once more when it meets a float that is a default.
    assert counts[0] in (1, 2) and counts == counts[:1] * 3
