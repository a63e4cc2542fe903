"""Answers of the compiled model on the recall task: as in plain torch, and far above eviction.

What is compiled and what runs in plain torch share nothing but the model. At small budgets a wrong
page is a wrong answer, so a bug in selection shows; planted bugs prove that it does.
"""

import sys

import pytest
import torch
from broken_selection import BUGS, SILENTLY_DENSE, planted
from recall_asked import (
    CONFIG,
    NUM_QUESTIONS,
    RUNS,
    STEPS,
    Asked,
    Recall,
    method_of,
    quest,
    quest_reference,
)

from quest_compile import recall
from quest_compile.eval.methods import Decoder
from quest_compile.inner import compile_rewrite

DENSE = method_of("dense")
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


each_run = pytest.mark.parametrize(("settings", "budget"), RUNS)


@each_run
def test_tokens_and_logits_are_those_of_plain_torch(many, settings, budget):
    found, expected = many(quest(settings), budget), many(quest_reference(settings), budget)
    assert_as_in_plain_torch(found, expected)


@each_run
def test_the_fused_operator_attends_the_pages_of_plain_torch(many, settings, budget):
    """The sets are equal on every step; scores of plain torch that tie up to rounding may swap."""
    found = many.attended(quest(settings), budget, FEW_QUESTIONS)
    expected = many.attended(quest_reference(settings), budget, FEW_QUESTIONS)
    assert len(found) == len(expected) == len(many.contexts[0].questions[FEW_QUESTIONS]) * STEPS
    assert all(map(torch.equal, found, expected))
    assert all((pages.sum(-1) == budget // CONFIG.page_size).all() for pages in found)


@each_run
def test_every_step_is_sparse_and_within_its_budget(many, settings, budget):
    assert_sparse(many(quest(settings), budget), budget)
    report = many.decoder.report(quest(settings), budget)
    assert "3 attention calls: 1 sparse, 2 dense, 0 untouched" in report


def test_no_attention_of_the_model_is_left_in_the_graph(many, monkeypatch):
    graphs = []

    def recorded(rewrite, *rest):
        graphs.append([str(node.target) for node in rewrite.gm.graph.nodes])
        return compile_rewrite(rewrite, *rest)

    monkeypatch.setattr(sys.modules["quest_compile.backend"], "compile_rewrite", recorded)
    many.ask(quest("defaults"), 192, slice(1))
    (names,) = graphs
    assert sum("quest.sparse_decode" in name for name in names) == NUM_LAYERS - 2
    assert sum("quest.dense_decode" in name for name in names) == 2
    assert not any("scaled_dot_product_attention" in name for name in names)


@pytest.mark.parametrize(("records", "tolerance"), [("few", 3e-4), ("many", 1e-4)])
def test_a_budget_beyond_the_context_is_dense(records, tolerance, request):
    """With 16 records dense attention in float32 is itself up to 3e-4 off that in float64."""
    task = request.getfixturevalue(records)
    found, dense = task(quest("defaults"), 8192), task(DENSE)
    assert found.tokens == dense.tokens
    for mine, theirs in zip(found.logits, dense.logits):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=1e-5)
    assert found.activity.sparse_steps == 0


def test_dense_attention_answers_almost_everything(few, many):
    assert few(DENSE).right >= NUM_QUESTIONS - 1
    assert many(DENSE).right >= NUM_QUESTIONS - 2


@pytest.mark.parametrize(
    ("settings", "records", "budget"),
    [
        ("sketch", "many", 64),
        ("one bit", "many", 64),
        ("defaults", "many", 256),
        ("minmax", "few", 256),
        ("minmax", "many", 512),
        ("paper", "many", 512),
    ],
)
def test_nothing_is_lost_at_budgets_that_hold_what_matters(settings, records, budget, request):
    """A sketch needs four pages where bounds need 32."""
    task = request.getfixturevalue(records)
    assert task(quest(settings), budget).right >= task(DENSE).right - 1


@pytest.mark.parametrize("settings", ["minmax", "paper"])
def test_bounds_lose_some_answers_where_the_budget_is_too_small(many, settings):
    """Fewer would be a broken selection, more a pass that does not leave anything out."""
    right = {budget: many(quest(settings), budget).right for budget in (64, 128, 512)}
    assert 0.55 <= right[128] / NUM_QUESTIONS <= 0.85
    assert right[64] < right[128] < right[512]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("settings", "lowest", "highest"),
    [("sketch", 0.97, 1), ("one bit", 0.96, 1), ("minmax", 0, 0.5)],
)
def test_at_64_of_4096_tokens(decoder, settings, lowest, highest):
    """What docs/page_sketches.md claims, on its contexts."""
    task = Recall(decoder, 64, num_questions=5 * NUM_QUESTIONS)
    assert lowest <= task(quest(settings), 64).right / (5 * NUM_QUESTIONS) <= highest


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("settings", "lowest", "highest"), [("sketch", 0.9, 1), ("minmax", 0, 0.45)]
)
def test_at_128_of_8192_tokens(decoder, settings, lowest, highest):
    task = Recall(decoder, 128, num_tokens=8192, num_questions=5 * NUM_QUESTIONS)
    assert lowest <= task(quest(settings), 128).right / (5 * NUM_QUESTIONS) <= highest


@pytest.mark.parametrize("baseline", ["streaming", "random"])
@pytest.mark.parametrize("settings", ["minmax", "defaults"])
def test_quest_is_far_above_methods_that_do_not_look_at_the_query(few, many, settings, baseline):
    for task in (few, many):
        other = task(method_of(baseline), 256)
        assert task(quest(settings), 256).right - other.right >= NUM_QUESTIONS / 2
        assert_sparse_baseline(other)


def assert_sparse_baseline(found):
    assert 0 < found.activity.sparse_steps == found.activity.steps
    assert found.activity.most_tokens_read <= 256


@pytest.mark.parametrize("settings", ["minmax", "sketch"])
def test_the_pages_hold_almost_all_attention_that_answers_need(few, settings):
    def mass(method):
        """Of the two steps of a question that give its answer: the others look for nothing, and
        their attention lies everywhere."""
        return torch.tensor(few(method, 256).masses).view(-1, STEPS)[:, -2:].mean()

    assert few(quest(settings), 256).tokens == few(quest_reference(settings), 256).tokens
    assert 0.95 <= mass(quest_reference(settings)) <= mass(method_of("oracle")) <= 1


def test_questions_do_not_depend_on_those_before(many):
    """The state after a rollback is that of a cache that was never asked anything."""
    asked = many(quest("minmax"), 128)
    for number in (1, 30):
        session = many.session()
        many.decoder.model.set_attn_implementation("sdpa")
        session.prefill(many.contexts[0].tokens)
        alone = Asked(many.decoder, quest("minmax"), 128)
        alone.ask(session, many.contexts[0].questions[number : number + 1])
        steps = slice(number * STEPS, (number + 1) * STEPS)
        assert alone.tokens == asked.tokens[steps]
        for mine, theirs in zip(alone.logits, asked.logits[steps]):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize(
    ("settings", "budget"),
    [pytest.param("minmax", 128, marks=pytest.mark.nightly), ("sketch", 64)],
)
def test_a_planted_bug_is_caught(many, settings, budget, bug):
    """By comparison with plain torch; a dense pass by the counters, other bugs by the answers."""
    expected = many(quest_reference(settings), budget)
    healthy = many(quest(settings), budget)
    with planted(bug):
        many.fill()
        found = many.ask(quest(settings), budget)
        pages = many.attended(quest(settings), budget, FEW_QUESTIONS)
    many.fill()

    with pytest.raises(AssertionError):
        assert_as_in_plain_torch(found, expected)
    correct = many.attended(quest_reference(settings), budget, FEW_QUESTIONS)
    assert not all(map(torch.equal, pages, correct))
    if bug == SILENTLY_DENSE:
        with pytest.raises(AssertionError):
            assert_sparse(found, budget)
        assert found.right > 0.85 * NUM_QUESTIONS
    else:
        assert_sparse(found, budget)
        assert found.right < healthy.right - NUM_QUESTIONS / 10
