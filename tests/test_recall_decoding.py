"""The compiled model against Quest in plain torch, on a model that has to find what it is asked.

Page by page and token by token; the counters show that the sparse path ran, and how much it read.
"""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import quest_compile
from quest_compile import ops, recall
from quest_compile.decoding import greedy_step, prefill, rewind
from quest_compile.ops import reference

CONTEXT_TOKENS = 4096
NUM_QUESTIONS = 16
NUM_DENSE_LAYERS = 2
STEPS_PER_QUESTION = 4
BUDGETS = [64, 128, 256]


class ReferenceAttention:
    """Quest decoding in plain torch as a transformers attention; records what it selects."""

    def __init__(self):
        self.page_budget = None
        self.selected = []
        AttentionInterface.register("quest_reference", self)
        AttentionMaskInterface.register("quest_reference", sdpa_mask)

    def __call__(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        if query.shape[2] > 1 or module.layer_idx < NUM_DENSE_LAYERS:
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
            )
        else:
            seq_lens = attention_mask.sum(-1).view(-1)
            summary = ops.build_page_summary(key, seq_lens)
            scores = reference.score_pages(query, summary, seq_lens)
            pages = reference.select_pages(scores, seq_lens, page_budget=self.page_budget)
            self.selected.append(pages)
            out, _ = reference.attend_pages(query, key, value, pages, seq_lens, scale=scaling)
        return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def recorded_selections():
    """The page indices of every sparse_decode call, by running it as its three parts."""
    selected = []

    def in_parts(query, key_cache, value_cache, page_summary, seq_lens, attn_mask=None,
                 channel_scale=None, *, budget, page_size=16, num_sink_pages=1, num_recent_pages=2,
                 group_reduce="sum", summary="minmax", scale=None):  # fmt: skip
        scores = torch.ops.quest.score_pages(
            query, page_summary, seq_lens, page_size=page_size, group_reduce=group_reduce
        )
        pages = torch.ops.quest.select_pages(
            scores,
            seq_lens,
            attn_mask,
            page_budget=budget // page_size,
            page_size=page_size,
            num_sink_pages=num_sink_pages,
            num_recent_pages=num_recent_pages,
        )
        selected.append(pages)
        out, _ = torch.ops.quest.attend_pages(
            query, key_cache, value_cache, pages, seq_lens, attn_mask,
            page_size=page_size, scale=scale,
        )  # fmt: skip
        return out

    library = torch.library.Library("quest", "IMPL")
    library.impl("sparse_decode", in_parts, "CPU", allow_override=True)
    yield selected
    library._destroy()


@pytest.fixture(scope="module")
def model():
    return recall.load_model()


@pytest.fixture(scope="module")
def context():
    return recall.make_context(CONTEXT_TOKENS, 16, NUM_QUESTIONS, seed=3)


@pytest.fixture(scope="module")
def reference_runs(context):
    """budget -> (tokens of every step, page indices of every sparse call) in plain torch."""
    attention = ReferenceAttention()
    model = recall.load_model()
    cache = prefill(model, context.tokens[None], CONTEXT_TOKENS + 16)
    model.set_attn_implementation("quest_reference")
    runs = {}
    for budget in BUDGETS:
        attention.page_budget, attention.selected = budget // 16, []
        runs[budget] = (answer_all(model, cache, context), attention.selected)
    return runs


def answer_all(step, cache, context):
    """The token predicted at every step of every question."""
    predicted = []
    for question in context.questions:
        rewind(cache, CONTEXT_TOKENS)
        token = question[:1]
        for i in range(STEPS_PER_QUESTION):
            with torch.no_grad():
                token = greedy_step(step, cache, token.view(1, 1), CONTEXT_TOKENS + i).view(1)
            predicted.append(int(token))
            if i + 1 < len(question):
                token = question[i + 1 : i + 2]
    return predicted


def num_right(predicted, context):
    answers = torch.tensor(predicted).view(NUM_QUESTIONS, STEPS_PER_QUESTION)[:, 2:]
    return int((answers == context.answers).all(1).sum())


def compiled(model, budget):
    torch._dynamo.reset()
    return torch.compile(model, backend=quest_compile.backend(budget=budget, inner="aot_eager"))


@pytest.mark.parametrize("budget", BUDGETS)
def test_same_pages_and_tokens_as_plain_torch(
    model, context, reference_runs, recorded_selections, budget
):
    cache = prefill(model, context.tokens[None], CONTEXT_TOKENS + 16)
    predicted = answer_all(compiled(model, budget), cache, context)
    expected_tokens, expected_pages = reference_runs[budget]
    assert len(recorded_selections) == len(expected_pages) == NUM_QUESTIONS * STEPS_PER_QUESTION
    for found, expected in zip(recorded_selections, expected_pages):
        assert torch.equal(found, expected)
    assert predicted == expected_tokens


@pytest.mark.parametrize("budget", BUDGETS)
def test_fused_operator_gives_the_same_tokens_within_its_budget(
    model, context, reference_runs, budget
):
    cache = prefill(model, context.tokens[None], CONTEXT_TOKENS + 16)
    step = compiled(model, budget)
    ops.reset_counters()
    predicted = answer_all(step, cache, context)
    counted = ops.counters()
    assert predicted == reference_runs[budget][0]
    num_steps = NUM_QUESTIONS * STEPS_PER_QUESTION
    assert (
        counted["sparse_calls"] == (model.config.num_hidden_layers - NUM_DENSE_LAYERS) * num_steps
    )
    assert counted["dense_calls"] == NUM_DENSE_LAYERS * num_steps
    assert 0 < counted["max_tokens_attended"] <= budget


def test_the_answers_are_right(model, context, reference_runs):
    assert num_right(reference_runs[256][0], context) >= NUM_QUESTIONS - 1
