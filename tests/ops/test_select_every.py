"""sparse_decode_step with select_every: which calls score, and what the others select by."""

import dataclasses

import pytest
import torch
from hostile import Case, make_inputs

from quest_compile import ops
from quest_compile.ops import reference

CASE = Case(torch.bfloat16, lengths=(280, 280), max_seq_len=400, budget_pages=5)


class Steps:
    """Calls on one cache; ``scored``: of each call, whether it scored."""

    def __init__(self, case=CASE, every=4, call=ops.sparse_decode_step, **settings):
        self.inputs = make_inputs(dataclasses.replace(case, lengths=(400,) * len(case.lengths)))
        self.case, self.every, self.call = case, every, call
        self.settings = {**self.inputs.settings(), **settings}
        keys = self.inputs.key_cache
        self.rows, _ = ops.empty_page_summary(keys, case.page_size)
        self.num_sealed = torch.tensor([0, -1])
        is_own = case.group_reduce == "none"
        num_heads = (self.inputs.query if is_own else keys).shape[1]
        self.state = ops.empty_page_scores(keys, num_heads, case.page_size)
        self.state[0].fill_(float("nan"))
        self.scored = []

    def query(self, length, num_queries=1):
        generator = torch.Generator().manual_seed(length)
        sizes = (len(self.case.lengths), self.inputs.query.shape[1], num_queries)
        query = torch.randn(*sizes, self.case.head_dim, generator=generator)
        return query.to(self.case.dtype)

    def __call__(self, length, num_queries=1):
        ops.reset_counters()
        keys, values = self.inputs.key_cache, self.inputs.value_cache
        position = torch.arange(length - num_queries, length)
        out = self.call(
            self.query(length, num_queries), keys, values, position, self.rows, self.num_sealed,
            torch.tensor([length]), None, None, *self.state, select_every=self.every,
            **self.settings
        )  # fmt: skip
        counted = ops.counters()
        if counted["sparse_calls"]:
            self.scored.append(not counted["sparse_calls_unscored"])
        return out

    def composed(self, length, scored_at):
        """Score with the query of ``scored_at``, select and attend at ``length``."""
        rows = ops.build_page_summary(self.inputs.key_cache, torch.tensor([400]))
        kind = {"group_reduce": self.case.group_reduce}
        query = self.query(scored_at)
        scores = ops.score_pages(query, rows, torch.tensor([scored_at]), **kind)
        lengths = torch.tensor([length])
        pages = ops.select_pages(scores, lengths, page_budget=self.case.budget_pages)
        caches = (self.inputs.key_cache, self.inputs.value_cache)
        return ops.attend_pages(self.query(length), *caches, pages, lengths)[0]


@pytest.mark.parametrize("group_reduce", ["sum", "none"])
@pytest.mark.parametrize("every", [2, 4, 16])
def test_scores_at_multiples_and_selects_by_them_in_between(every, group_reduce):
    steps = Steps(dataclasses.replace(CASE, group_reduce=group_reduce), every)
    scored_at = None
    for length in range(281, 320):
        if scored_at is None or length % every == 0:
            scored_at = length
        assert torch.equal(steps(length), steps.composed(length, scored_at)), length
    assert steps.scored == [length == 281 or length % every == 0 for length in range(281, 320)]
    assert steps.state[1].tolist() == [scored_at, 319]


def test_kernels_do_as_the_reference_does():
    def by_reference(*arguments, **settings):
        return reference.sparse_decode_step(*arguments, **settings)[0]

    ours, theirs = Steps(), Steps(call=by_reference)
    for length in (281, 282, 284, 285, 288, 289, 290, 270, 271, 60, 61, 281):
        num_queries = 3 if length == 288 else 1
        ours(length, num_queries)
        theirs(length, num_queries)
        assert torch.equal(ours.state[1], theirs.state[1]), length
        num_pages = length // 16
        a, b = (x.state[0][..., :num_pages] for x in (ours, theirs))
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("lengths", "scored"),
    [
        ((281, 282, 283), [True, False, False]),
        ((281, 283), [True, True]),
        ((282, 281, 282), [True, True, False]),
        ((282, 282), [True, True]),
        ((79, 80, 81, 82), [True, False]),
        ((281, 282, 40, 41, 281, 282), [True, False, True, False]),
    ],
    ids=["goes on", "skips one", "back by one", "the same again", "leaves the budget",
         "fits in between"],
)  # fmt: skip
def test_stored_scores_are_for_the_next_step_alone(lengths, scored):
    steps = Steps(every=100)
    for length in lengths:
        steps(length)
    assert steps.scored == scored


def test_several_queries_score_and_end_a_run():
    steps = Steps(every=100)
    for length, num_queries in ((281, 1), (282, 1), (285, 3), (286, 1), (287, 1)):
        steps(length, num_queries)
    assert steps.scored == [True, False, True, True, False]


@pytest.mark.parametrize("change", ["foreign write", "forgotten summaries", "forgotten scores"])
def test_what_was_summarised_again_is_scored_again(change):
    steps = Steps(every=100)
    steps(281)
    steps(282)
    if change == "foreign write":
        steps.inputs.key_cache[1, 1] *= -1
    elif change == "forgotten summaries":
        steps.num_sealed[0] = 0
    else:
        steps.state[1].fill_(-1)
    assert torch.equal(steps(283), steps.composed(283, 283))
    assert torch.equal(steps(284), steps.composed(284, 283))
    assert steps.scored == [True, False, True, False]


def test_number_of_threads_changes_no_bit():
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        steps = Steps(top_p=0.95)
        found.append(torch.stack([steps(length) for length in range(281, 287)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_summaries_are_not_read_between():
    steps = Steps(every=100)
    read = []
    for length in (288, 289):
        steps(length)
        read.append(ops.counters()["bytes_read"])
    # 18 complete pages of 2 KV heads of 2 rows; the open page has 1 token then, and 16 before.
    assert read[0] - read[1] == 4 * (18 + 15) * 256


def arguments_of(steps):
    names = ("query", "key_cache", "value_cache", "cache_position", "page_summary", "num_sealed",
             "seq_lens", "page_scores", "scored_at")  # fmt: skip
    caches = (steps.inputs.key_cache, steps.inputs.value_cache)
    values = (steps.query(281), *caches, torch.tensor([280]), steps.rows, steps.num_sealed,
              torch.tensor([281]), *steps.state)  # fmt: skip
    return dict(zip(names, values)) | {"budget": 80, "select_every": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select_every": 0}, "select_every"),
        ({"select_every": 1}, "page_scores: expected [Nn]one with select_every"),
        ({"page_scores": None}, "page_scores"),
        ({"scored_at": None}, "scored_at"),
        ({"page_scores": torch.zeros(2, 8, 25)}, "page_scores"),
        ({"page_scores": torch.zeros(2, 2, 25).double()}, "page_scores"),
        ({"page_scores": torch.zeros(2, 25, 2).mT}, "page_scores"),
        ({"scored_at": torch.zeros(3, dtype=torch.int64)}, "scored_at"),
        ({"scored_at": torch.zeros(2)}, "scored_at"),
        ({"seq_lens": torch.tensor([281, 280])}, "seq_lens: expected .*1"),
    ],
)
def test_bad_arguments_name_themselves_and_leave_the_state_alone(change, message):
    steps = Steps()
    arguments = arguments_of(steps) | change
    for call in (ops.sparse_decode_step, torch.ops.quest.sparse_decode_step):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call(**arguments)
    assert steps.num_sealed.tolist() == [0, -1] and steps.state[1].tolist() == [-1, -1]


def test_opcheck():
    steps = Steps()
    steps.state[0].fill_(0)
    steps.rows.fill_(0)
    arguments = arguments_of(steps)
    settings = {name: arguments.pop(name) for name in ("budget", "select_every")}
    arguments["key_cache"] = arguments["key_cache"].nan_to_num(0)
    state = {name: arguments.pop(name) for name in ("page_scores", "scored_at")}
    positional = (*arguments.values(), None, None, *state.values())
    torch.library.opcheck(torch.ops.quest.sparse_decode_step.default, positional, settings)
