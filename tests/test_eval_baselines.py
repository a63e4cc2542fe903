"""What other methods keep: the rules against loops over heads and positions, Quest in plain torch
against what the backend attends."""

import pytest
import torch
from recall_asked import Recall

from quest_compile.config import QuestConfig
from quest_compile.eval.attention import NAME, EvalAttention
from quest_compile.eval.baselines import KEEP, SNAP_WINDOW, Step, snapkv
from quest_compile.eval.methods import Decoder, parse_method
from quest_compile.eval.protocol import Session
from quest_compile.eval.recall_tasks import recall_group
from quest_compile.eval.records import Records
from quest_compile.eval.run import run
from quest_compile.recall import load_model

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 2, 2, 8
CONTEXT_LEN, SEQ_LEN, NUM_POSITIONS = 75, 78, 96
PAGE_SIZE = 8
CONFIG = QuestConfig(budget=32, page_size=PAGE_SIZE, num_sink_pages=0, num_recent_pages=1)
# Besides the newest page.
NUM_KEPT = 24


def make_step(h2o=None, snap=None, config=CONFIG, context_len=CONTEXT_LEN, seq_len=SEQ_LEN):
    weights = torch.rand(1, NUM_KV_HEADS, GROUP_SIZE, NUM_POSITIONS)
    weights[..., seq_len:] = 0
    return Step(
        query=torch.randn(1, NUM_KV_HEADS * GROUP_SIZE, 1, HEAD_DIM),
        key=torch.randn(1, NUM_KV_HEADS, NUM_POSITIONS, HEAD_DIM),
        weights=weights / weights.sum(-1, keepdim=True),
        seq_len=seq_len,
        context_len=context_len,
        h2o=h2o,
        snap=snap,
        config=config,
        selection=config.selection(config.layer_budget(0, NUM_POSITIONS)),
        scale=HEAD_DIM**-0.5,
        generator=torch.Generator(),
    )


def best(scores, number):
    """The positions with the highest scores."""
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[:number])


def kept(keep, head):
    """Positions below the length: the others have no weight."""
    return {i for i in range(SEQ_LEN) if keep[0, head, i]}


def after(position):
    return set(range(position, SEQ_LEN))


@pytest.mark.parametrize("head", range(NUM_KV_HEADS))
class TestKeepRules:
    def test_h2o_keeps_half_by_attention_and_half_at_the_end(self, head):
        h2o = torch.rand(NUM_KV_HEADS, NUM_POSITIONS)
        end = CONTEXT_LEN - NUM_KEPT // 2
        expected = best(h2o[head, :end].tolist(), NUM_KEPT // 2) | after(end)
        assert kept(KEEP["h2o"](make_step(h2o=h2o)), head) == expected

    def test_snapkv_pools_per_head_and_keeps_the_end(self, head):
        snap = torch.rand(NUM_KV_HEADS, GROUP_SIZE, NUM_POSITIONS)
        snap[..., CONTEXT_LEN:] = 0
        pooled = [
            sum(max(snap[head, g, max(0, i - 2) : i + 3].tolist()) for g in range(GROUP_SIZE))
            for i in range(CONTEXT_LEN)
        ]
        end = CONTEXT_LEN - min(SNAP_WINDOW, NUM_KEPT // 2)
        expected = best(pooled[:end], NUM_KEPT - NUM_KEPT // 2) | after(end)
        assert kept(KEEP["snapkv"](make_step(snap=snap)), head) == expected

    def test_the_oracle_keeps_the_pages_with_the_most_attention_of_the_group(self, head):
        step = make_step()
        num_pages = -(-SEQ_LEN // PAGE_SIZE)
        weights = step.weights[0, head].sum(0).tolist()
        mass = [sum(weights[p * PAGE_SIZE : (p + 1) * PAGE_SIZE]) for p in range(num_pages - 1)]
        pages = best(mass, NUM_KEPT // PAGE_SIZE) | {num_pages - 1}
        expected = {i for i in range(SEQ_LEN) if i // PAGE_SIZE in pages}
        assert kept(KEEP["oracle"](step), head) == expected

    def test_streaming_keeps_four_sinks_and_the_end(self, head):
        newest_page = (SEQ_LEN - 1) // PAGE_SIZE * PAGE_SIZE
        expected = set(range(4)) | after(newest_page - (NUM_KEPT - 4))
        assert kept(KEEP["streaming"](make_step()), head) == expected


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_a_budget_beyond_the_context_evicts_nothing(method):
    config = CONFIG.replace({"budget": 1024})
    step = make_step(
        h2o=torch.rand(NUM_KV_HEADS, NUM_POSITIONS),
        snap=torch.rand(NUM_KV_HEADS, GROUP_SIZE, NUM_POSITIONS),
        config=config,
    )
    assert kept(KEEP[method](step), 0) == after(0)


def test_snapkv_pools_before_it_sums_over_the_group():
    """One head has a peak of 3 at position 1, the other at 2; at 10 both have 2.

    Pooled first, 0 to 3 lie within reach of both peaks: 3 + 3. Summed first, 8 to 12 would be best:
    4, and the peaks 3.
    """
    snap = torch.zeros(1, 2, NUM_POSITIONS)
    snap[0, 0, 1], snap[0, 1, 2] = 3.0, 3.0
    snap[0, :, 10] = 2.0
    # Four positions by attention, four at the end.
    step = make_step(snap=snap, config=CONFIG.replace({"budget": 16}))
    found = [i for i in range(CONTEXT_LEN - 4) if snapkv(step)[0, 0, i]]
    assert found == [0, 1, 2, 3]


def test_watching_a_prefill_sums_what_its_queries_attended(monkeypatch):
    """In two slices, with rows that do not divide them; against a loop over heads and rows."""
    monkeypatch.setattr("quest_compile.eval.attention._ROWS", 16)
    num_q_heads = NUM_KV_HEADS * GROUP_SIZE
    query = torch.randn(1, num_q_heads, CONTEXT_LEN, HEAD_DIM)
    key = torch.randn(1, NUM_KV_HEADS, NUM_POSITIONS, HEAD_DIM)
    attention = EvalAttention()
    attention.begin_context(CONTEXT_LEN, watch=True)
    for rows in query.split(40, 2):
        attention._watch(0, rows, key, scale=0.5)

    h2o = torch.zeros(NUM_KV_HEADS, NUM_POSITIONS)
    snap = torch.zeros(num_q_heads, NUM_POSITIONS)
    for head in range(num_q_heads):
        for i in range(CONTEXT_LEN):
            logits = key[0, head // GROUP_SIZE, : i + 1] @ query[0, head, i] * 0.5
            weights = logits.softmax(-1)
            h2o[head // GROUP_SIZE, : i + 1] += weights
            if i >= CONTEXT_LEN - SNAP_WINDOW:
                snap[head, : i + 1] += weights
    torch.testing.assert_close(attention._h2o[0], h2o)
    torch.testing.assert_close(attention._snap[0].flatten(0, 1), snap)


@pytest.fixture(scope="module")
def task():
    torch._dynamo.reset()
    with torch._dynamo.config.patch({"recompile_limit": 100}):
        decoder = Decoder(load_model(), QuestConfig(num_dense_layers=2, inner="eager"))
        yield Recall(decoder, 16, num_tokens=1024, num_questions=16)


@pytest.mark.parametrize(
    "settings",
    [
        "preset=paper",
        "preset=paper,page_size=8,num_sink_pages=2",
        "summary=minmax,group_reduce=sum",
        "summary=minmax,group_reduce=softmax",
        "sketch_bits=1",
        "group_reduce=none,page_size=32",
        "top_p=0.6",
        "top_p=0.8,preset=paper",
        "top_p=0.8,summary=minmax,group_reduce=sum",
        "budget=0.2",
        "budget=1:0.1/2:320",
        "budget=1:96/2:128/default:2048,num_dense_layers=1,num_recent_pages=1",
    ],
)
def test_quest_in_plain_torch_keeps_what_the_backend_attends(task, settings):
    """With every setting that decides about pages."""
    kinds = ("quest", "quest-reference")
    methods = [parse_method(f"{kind}:{settings}", task.decoder.config) for kind in kinds]
    attended, kept = (task.attended(method, 128, slice(2)) for method in methods)
    assert len(attended) == len(kept) >= 8
    assert not all(pages.all() for pages in kept)
    assert all(map(torch.equal, attended, kept))


def test_a_context_is_prefilled_once_for_all_methods_budgets_and_questions(tmp_path):
    torch._dynamo.reset()
    model = load_model()
    group = recall_group("recall-16", 512, 32, model.config.vocab_size, seed=0)
    names = ("quest", "quest-reference", "oracle", "streaming", "random", "h2o", "snapkv")
    config = QuestConfig(inner="eager")
    records = Records(tmp_path, {}, resume=False)
    methods = [parse_method(name, config) for name in names]
    prefilled = []

    def count(module, args, kwargs):
        if kwargs["hidden_states"].shape[1] > 1:
            prefilled.append(kwargs["hidden_states"].shape[1])

    model.model.layers[0].self_attn.register_forward_pre_hook(count, with_kwargs=True)
    run(model, None, [group], methods, [64, 128], config, records, progress=False)

    assert group.num_contexts == 2
    assert prefilled == [512, 512]
    assert len(records.lines) == 2 * (1 + 2 * len(names))
    assert {len(line["scores"]) for line in records.lines.values()} == {16}


def test_a_watched_prefill_fills_the_cache_as_a_plain_one_does():
    """The first slice comes without a mask."""
    model = load_model()
    tokens = recall_group("recall-16", 1024, 16, model.config.vocab_size, seed=3).make(0).tokens
    keys = {}
    implementation = model.config._attn_implementation
    for name in ("sdpa", NAME):
        session, attention = Session(model, 1152), Decoder(model, QuestConfig()).attention
        attention.begin_context(len(tokens), name == NAME)
        model.set_attn_implementation(name)
        try:
            session.prefill(tokens)
        finally:
            model.set_attn_implementation(implementation)
        keys[name] = [layer.keys for layer in session.cache.layers]
    for plain, watched in zip(keys["sdpa"], keys[NAME]):
        # Softmax of logits in the hundreds: either is as far from float64.
        torch.testing.assert_close(watched, plain, rtol=0, atol=2e-3)
