"""Answers of the compiled model on the recall task: as in plain torch, and far above eviction.

What is compiled and what runs in plain torch share nothing but the model. At small budgets a wrong
page is a wrong answer, so a bug in selection shows; planted bugs prove that it does.
"""

import sys

import pytest
import torch
from attended_pages import recorded_pages
from broken_selection import BUGS, SILENTLY_DENSE, planted
from recall_asked import BUDGETS, CONFIG, NUM_QUESTIONS, STEPS, Asked, Recall

from quest_compile import recall
from quest_compile.eval import baselines
from quest_compile.eval.methods import Decoder, Method
from quest_compile.inner import compile_rewrite

NUM_LAYERS = 3
FEW_QUESTIONS = slice(8)


@pytest.fixture(scope="module")
def decoder():
    torch._dynamo.reset()
    limits = {"recompile_limit": 100, "automatic_dynamic_shapes": False}
    with torch._dynamo.config.patch(limits):
        yield Decoder(recall.load_model(), CONFIG)


@pytest.fixture(scope="module")
def few(decoder):
    """16 records in 4096 tokens, four contexts."""
    return Recall(decoder, 16)


@pytest.fixture(scope="module")
def many(decoder):
    """64 records in 4096 tokens: a page holds a record every fourth time."""
    return Recall(decoder, 64)


def assert_as_in_plain_torch(found, expected):
    assert found.tokens == expected.tokens
    for mine, theirs in zip(found.logits, expected.logits):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=0)


def assert_sparse(found, budget):
    """Every step and every layer behind the dense ones; all pages of the budget, the newest with
    the 1 to STEPS tokens that it has."""
    num_steps = len(found.tokens)
    num_sparse_layers = NUM_LAYERS - CONFIG.num_dense_layers
    assert found.activity.sparse_steps == found.activity.steps == num_steps
    assert found.activity.tokens_read == budget - CONFIG.page_size + (1 + STEPS) / 2
    assert found.activity.most_tokens_read == budget - CONFIG.page_size + STEPS
    assert found.counters["sparse_calls"] == num_sparse_layers * num_steps
    assert found.counters["dense_calls"] == CONFIG.num_dense_layers * num_steps


@pytest.mark.parametrize("budget", BUDGETS)
def test_tokens_and_logits_are_those_of_plain_torch(many, budget):
    assert_as_in_plain_torch(many("quest", budget), many("quest-reference", budget))


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_fused_operator_attends_the_pages_of_plain_torch(many, budget, monkeypatch):
    """The sets are equal on every step; scores of plain torch that tie up to rounding may swap."""
    found = attended(many, budget)
    expected = attended_in_plain_torch(many, budget, monkeypatch)
    assert len(found) == len(expected) == len(many.contexts[0].questions[FEW_QUESTIONS]) * STEPS
    assert all(map(torch.equal, found, expected))
    assert all((pages.sum(-1) == budget // CONFIG.page_size).all() for pages in found)


def attended(many, budget):
    """Of each sparse call of the compiled model, bool [num_q_heads, num_pages]."""
    with recorded_pages() as found:
        many.ask("quest", budget, FEW_QUESTIONS)
    return found


def attended_in_plain_torch(many, budget, monkeypatch):
    rule, found = baselines.quest_reference, []

    def recorded(step):
        keep = rule(step)
        pages = keep[0].unflatten(-1, (-1, CONFIG.page_size)).any(-1)
        found.append(pages.repeat_interleave(step.query.shape[1] // len(pages), 0))
        return keep

    monkeypatch.setitem(baselines.KEEP, "quest-reference", recorded)
    many.ask("quest-reference", budget, FEW_QUESTIONS)
    return found


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_step_is_sparse_and_within_its_budget(many, budget):
    assert_sparse(many("quest", budget), budget)
    report = many.decoder.report(Method("quest", "quest"), budget)
    assert "3 attention calls: 1 sparse, 2 dense, 0 untouched" in report


def test_no_attention_of_the_model_is_left_in_the_graph(many, monkeypatch):
    graphs = []

    def recorded(rewrite, *rest):
        graphs.append([str(node.target) for node in rewrite.gm.graph.nodes])
        return compile_rewrite(rewrite, *rest)

    monkeypatch.setattr(sys.modules["quest_compile.backend"], "compile_rewrite", recorded)
    many.ask("quest", 192, slice(1))
    (names,) = graphs
    assert sum("quest.sparse_decode" in name for name in names) == NUM_LAYERS - 2
    assert sum("quest.dense_decode" in name for name in names) == 2
    assert not any("scaled_dot_product_attention" in name for name in names)


@pytest.mark.parametrize(("records", "tolerance"), [("few", 3e-4), ("many", 1e-4)])
def test_a_budget_beyond_the_context_is_dense(records, tolerance, request):
    """With 16 records dense attention in float32 is itself up to 3e-4 off that in float64."""
    task = request.getfixturevalue(records)
    found, dense = task("quest", 8192), task("dense")
    assert found.tokens == dense.tokens
    for mine, theirs in zip(found.logits, dense.logits):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=1e-5)
    assert found.activity.sparse_steps == 0


def test_nothing_is_lost_at_budgets_that_hold_what_matters(few, many):
    assert few("dense").right >= NUM_QUESTIONS - 1
    assert many("dense").right >= NUM_QUESTIONS - 2
    assert few("quest", 256).right >= few("dense").right - 1
    assert many("quest", 512).right >= many("dense").right - 1


def test_some_answers_are_lost_where_the_budget_is_too_small(many):
    """Fewer would be a broken selection, more a pass that does not leave anything out."""
    assert 0.55 <= many("quest", 128).right / NUM_QUESTIONS <= 0.85
    assert many("quest", 64).right < many("quest", 128).right < many("quest", 512).right


@pytest.mark.parametrize("baseline", ["streaming", "random"])
def test_quest_is_far_above_methods_that_do_not_look_at_the_query(few, many, baseline):
    for task in (few, many):
        assert task("quest", 256).right - task(baseline, 256).right >= NUM_QUESTIONS / 2
        assert_sparse_baseline(task(baseline, 256))


def assert_sparse_baseline(found):
    assert 0 < found.activity.sparse_steps == found.activity.steps
    assert found.activity.most_tokens_read <= 256


def test_the_pages_hold_almost_all_attention_that_answers_need(few):
    def mass(method):
        """Of the two steps of a question that give its answer: the others look for nothing, and
        their attention lies everywhere."""
        return torch.tensor(few(method, 256).masses).view(-1, STEPS)[:, -2:].mean()

    assert few("quest", 256).tokens == few("quest-reference", 256).tokens
    assert 0.95 <= mass("quest-reference") <= mass("oracle") <= 1


def test_questions_do_not_depend_on_those_before(many):
    """The state after a rollback is that of a cache that was never asked anything."""
    asked = many("quest", 128)
    for number in (1, 30):
        session = many.session()
        many.decoder.model.set_attn_implementation("sdpa")
        session.prefill(many.contexts[0].tokens)
        alone = Asked(many.decoder, Method("quest", "quest"), 128)
        alone.ask(session, many.contexts[0].questions[number : number + 1])
        steps = slice(number * STEPS, (number + 1) * STEPS)
        assert alone.tokens == asked.tokens[steps]
        for mine, theirs in zip(alone.logits, asked.logits[steps]):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(many, bug, monkeypatch):
    """By comparison with plain torch; a dense pass by the counters, other bugs by the answers."""
    expected, healthy = many("quest-reference", 128), many("quest", 128)
    with planted(bug):
        many.fill()
        found = many.ask("quest", 128)
        pages = attended(many, 128)
    many.fill()

    with pytest.raises(AssertionError):
        assert_as_in_plain_torch(found, expected)
    correct = attended_in_plain_torch(many, 128, monkeypatch)
    assert not all(map(torch.equal, pages, correct))
    if bug == SILENTLY_DENSE:
        with pytest.raises(AssertionError):
            assert_sparse(found, 128)
        assert found.right > 0.85 * NUM_QUESTIONS
    else:
        assert_sparse(found, 128)
        assert found.right < healthy.right - NUM_QUESTIONS / 10
