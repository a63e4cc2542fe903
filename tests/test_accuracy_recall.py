"""Answers of the compiled model on the recall task: as in plain torch, and far above eviction.

What is compiled and what runs in plain torch share nothing but the model. At small budgets a wrong
page is a wrong answer, so a bug in selection shows; planted bugs prove that it does.
"""

import pytest
import torch
from broken_selection import BUGS, SILENTLY_DENSE, planted

from quest_compile import ops, recall
from quest_compile.config import QuestConfig
from quest_compile.eval.methods import Decoder, Method
from quest_compile.eval.protocol import Session
from quest_compile.eval.recall_tasks import recall_group

CONTEXT_TOKENS, NUM_QUESTIONS, STEPS = 4096, 32, 4
BUDGETS = (64, 128, 256, 512, 1024)
# The newest page is the only one that is always attended, as in the figures to compare with.
CONFIG = QuestConfig(num_sink_pages=0, num_recent_pages=1, inner="eager")


class Asked:
    """What one method answered: tokens and logits of every step, and what was counted."""

    def __init__(self, session, contexts, decoder, method, budget, asked=slice(NUM_QUESTIONS)):
        self.right = 0
        self.tokens, self.logits = [], []
        for context in contexts:
            if len(contexts) > 1 or session.length == 0:
                fill(session, decoder, context)
            call = decoder.begin(Method(method, method), budget, f"{method}{budget}")
            for question in context.questions[asked]:
                self._ask(session, call, question)
        self.counters = ops.counters()
        self.activity = decoder.activity()
        self.masses = decoder.attention.kept.masses

    def _ask(self, session, call, question):
        answer = []

        def fed():
            yield from question.tokens
            yield answer[0]

        for i, logits in enumerate(session.logits(call, fed())):
            self.logits.append(logits)
            self.tokens.append(int(logits.argmax()))
            if i + 1 >= len(question.tokens):
                answer.append(self.tokens[-1])
        self.right += tuple(answer) == question.expected


def fill(session, decoder, context):
    decoder.model.set_attn_implementation("sdpa")
    session.prefill(context.tokens)


class Recall:
    """One number of records; every method and budget is asked once, when it is first wanted."""

    def __init__(self, decoder, num_records):
        group = recall_group(f"recall-{num_records}", CONTEXT_TOKENS, NUM_QUESTIONS, 512, seed=0)
        self.contexts = [group.make(i) for i in range(group.num_contexts)]
        self.decoder = decoder
        self.session = Session(decoder.model, group.max_seq_len)
        self._asked = {}

    def __call__(self, method, budget=256):
        if (method, budget) not in self._asked:
            self._asked[method, budget] = self.ask(method, budget)
        return self._asked[method, budget]

    def ask(self, method, budget):
        return Asked(self.session, self.contexts, self.decoder, method, budget)


@pytest.fixture(scope="module")
def decoder():
    torch._dynamo.reset()
    limits = {"recompile_limit": 100, "automatic_dynamic_shapes": False}
    with torch._dynamo.config.patch(limits):
        yield Decoder(recall.load_model(), CONFIG)


@pytest.fixture(scope="module")
def few(decoder):
    """16 records in 4096 tokens, two contexts."""
    return Recall(decoder, 16)


@pytest.fixture(scope="module")
def many(decoder):
    """64 records in 4096 tokens: a page holds a record every fourth time."""
    return Recall(decoder, 64)


def assert_as_in_plain_torch(found, expected):
    assert found.tokens == expected.tokens
    for mine, theirs in zip(found.logits, expected.logits):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=0)


def assert_sparse(found, budget, num_layers=3):
    """Every step and every layer behind the dense ones; never more tokens than the budget."""
    num_steps = len(found.tokens)
    assert found.activity.sparse_steps == found.activity.steps == num_steps
    assert budget - CONFIG.page_size < found.activity.tokens_read <= budget
    assert found.activity.most_tokens_read <= budget
    assert found.counters["sparse_calls"] == (num_layers - CONFIG.num_dense_layers) * num_steps


@pytest.mark.parametrize("budget", BUDGETS)
def test_tokens_and_logits_are_those_of_plain_torch(many, budget):
    assert_as_in_plain_torch(many("quest", budget), many("quest-reference", budget))


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_step_is_sparse_and_within_its_budget(many, budget):
    assert_sparse(many("quest", budget), budget)
    report = many.decoder.report(Method("quest", "quest"), budget)
    assert "3 attention calls: 1 sparse, 2 dense, 0 untouched" in report


def test_a_budget_beyond_the_context_is_dense(many):
    found, dense = many("quest", 8192), many("dense")
    assert found.tokens == dense.tokens
    for mine, theirs in zip(found.logits, dense.logits):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
    assert found.activity.sparse_steps == 0


def test_nothing_is_lost_at_budgets_that_hold_what_matters(few, many):
    assert few("dense").right >= NUM_QUESTIONS - 1
    assert many("dense").right >= NUM_QUESTIONS - 2
    assert few("quest", 256).right >= few("dense").right - 1
    assert many("quest", 512).right >= many("dense").right - 1


def test_some_answers_are_lost_where_the_budget_is_too_small(many):
    """Fewer would be a broken selection, more a pass that does not leave anything out."""
    assert 0.5 <= many("quest", 128).right / NUM_QUESTIONS <= 0.85
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
        """Of the two steps of a question that give its answer."""
        return torch.tensor(few(method, 256).masses).view(-1, STEPS)[:, -2:].mean()

    assert few("quest", 256).tokens == few("quest-reference", 256).tokens
    assert 0.95 <= mass("quest-reference") <= mass("oracle") <= 1


def test_questions_do_not_depend_on_those_before(many):
    """The state after a rollback is that of a cache that was never asked anything."""
    asked = many("quest", 128)
    for number in (1, 30):
        session = Session(many.decoder.model, many.contexts[0].num_tokens)
        only = slice(number, number + 1)
        alone = Asked(session, many.contexts, many.decoder, "quest", 128, only)
        steps = slice(number * STEPS, (number + 1) * STEPS)
        assert alone.tokens == asked.tokens[steps]
        for mine, theirs in zip(alone.logits, asked.logits[steps]):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(many, bug):
    """By comparison with plain torch; a dense pass by the counters, other bugs by the answers."""
    expected, healthy = many("quest-reference", 128), many("quest", 128)
    with planted(bug):
        fill(many.session, many.decoder, many.contexts[0])
        found = many.ask("quest", 128)
    fill(many.session, many.decoder, many.contexts[0])

    with pytest.raises(AssertionError):
        assert_as_in_plain_torch(found, expected)
    if bug == SILENTLY_DENSE:
        with pytest.raises(AssertionError):
            assert_sparse(found, 128)
        assert found.right > 0.85 * NUM_QUESTIONS
    else:
        assert_sparse(found, 128)
        assert found.right < healthy.right - NUM_QUESTIONS / 10
