"""Steps that select by stored scores, by the CUDA kernels in emulation."""

import pytest
import torch
from emulated_library import configure
from hostile import NAN, Case, make_inputs
from test_every_op import assert_same_bits
from test_sparse_decode_step import assert_same_state

from quest_compile import ops
from quest_compile.ops import reference

CASE = Case(torch.bfloat16, 16, 16, 2, 2, 8, (300, 300), 300, budget_pages=5)
SUMMARIES = ("minmax", "minmax_int8", "meanstd", "sketch")
each_summary = pytest.mark.parametrize("summary", SUMMARIES)


class Run:
    """Calls on one cache, with a state of their own each for our kernels and the reference."""

    def __init__(self, case=CASE, every=4, **settings):
        self.inputs, self.case, self.every = make_inputs(case), case, every
        self.keys, self.values = self.inputs.key_cache, self.inputs.value_cache
        self.settings = {**self.inputs.settings(), **settings}
        self.summary = self.settings.get("summary", "minmax")
        self.ours, self.theirs = self.new_state(), self.new_state()

    def new_state(self):
        page_size, num_kv_heads = self.case.page_size, self.case.num_kv_heads
        rows, scale = ops.empty_page_summary(self.keys, page_size, self.summary)
        is_own = self.case.group_reduce == "none"
        num_heads = num_kv_heads * (self.case.group_size if is_own else 1)
        scores, scored_at = ops.empty_page_scores(self.keys, num_heads, page_size)
        return rows.fill_(0), torch.tensor([0, -1]), scale, scores.fill_(NAN), scored_at

    def query(self, length, num_queries=1):
        generator = torch.Generator().manual_seed(length)
        num_heads = self.case.num_kv_heads * self.case.group_size
        sizes = (len(self.case.lengths), num_heads, num_queries, self.case.head_dim)
        return torch.randn(*sizes, generator=generator).to(self.case.dtype)

    def call(self, by, state, length, num_queries, mask):
        rows, num_sealed, scale, scores, scored_at = state
        position = torch.arange(length - num_queries, length)
        return by(
            self.query(length, num_queries), self.keys, self.values, position, rows, num_sealed,
            torch.tensor([length]), mask, scale, scores, scored_at, select_every=self.every,
            **self.settings
        )  # fmt: skip

    def ours_alone(self, length):
        """Did it score?"""
        self.call(ops.sparse_decode_step, self.ours, length, 1, None)
        return self.ours[4].tolist() == [length, length]

    def __call__(self, length, num_queries=1, mask=None):
        """Did it score? Results are checked."""
        out = self.call(ops.sparse_decode_step, self.ours, length, num_queries, mask)
        expected, *_ = self.call(
            reference.sparse_decode_step, self.theirs, length, num_queries, mask
        )
        *_, scores, scored_at = self.ours
        *_, expected_scores, expected_scored_at = self.theirs
        assert scored_at.tolist() == expected_scored_at.tolist()
        assert_same_state(self.ours[:3], self.theirs[:3])
        torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-3, equal_nan=True)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2, equal_nan=True)
        if scored_at[0] > 0:
            assert_same_bits([out], [self.composed(length, mask)])
        return scored_at.tolist() == [length, length]

    def composed(self, length, mask):
        """By the stored scores, which are those of score_pages where they were made."""
        rows, _, scale, scores, scored_at = self.ours
        case, lengths = self.case, torch.tensor([length])
        settings = {"page_size": case.page_size}
        if scored_at[0] == length:
            kind = {"group_reduce": case.group_reduce, "summary": self.summary, **settings}
            kind |= {"attn_mask": mask} if self.summary == "sketch" else {}
            fresh = ops.score_pages(self.query(length), rows, lengths, scale, **kind)
            assert_same_bits([scores], [fresh])
        shares = {name: self.settings[name] for name in ("top_p",) if name in self.settings}
        shares |= {"score_scale": self.inputs.score_scale()} if shares else {}
        pages = ops.select_pages(
            scores, lengths, mask, page_budget=case.budget_pages, **settings, **shares
        )
        caches = (self.query(length), self.keys, self.values)
        return ops.attend_pages(*caches, pages, lengths, mask, **settings)[0]


def make_mask(run, kind, length):
    """Another one in every step."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(length)
    batch, num_heads = len(run.case.lengths), run.query(1).shape[1]
    is_live = torch.rand(batch, num_heads, 1, run.case.max_seq_len, generator=generator) < 0.15
    return is_live if kind == "heads" else is_live[:, :1]


@each_summary
@pytest.mark.parametrize(
    ("group_reduce", "mask"), [("sum", "none"), ("max", "row"), ("none", "heads")]
)
def test_steps_select_by_the_scores_that_the_reference_selects_by(summary, group_reduce, mask):
    """Over multiples of select_every, steps back, several queries at once and steps that fit."""
    case = Case(torch.bfloat16, 16, 16, 2, 2, 8, (300, 300), 300, group_reduce=group_reduce)
    run = Run(case, summary=summary)
    steps = ((201, 1), (202, 1), (203, 1), (204, 1), (205, 1), (206, 3), (207, 1), (209, 1),
             (210, 1), (202, 1), (30, 1), (31, 1), (201, 1), (202, 1), (300, 1))  # fmt: skip
    scored = []
    for length, num_queries in steps:
        configure(132)
        scored.append(run(length, num_queries, make_mask(run, mask, length) if num_queries == 1
                          else None))  # fmt: skip
    expected = [1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1]
    if summary in ("minmax_int8", "sketch"):
        assert scored[:3] == [True, False, False]
    else:
        assert scored == [bool(x) for x in expected]


@each_summary
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("num_sms", [4, 132])
def test_a_foreign_write_to_any_head_ends_the_run_of_all(num_sms, seed, summary):
    """Whichever CTA comes last scores for the others."""
    run = Run(every=100, summary=summary)
    configure(num_sms, seed=seed)
    assert [run(250), run(251)] == [True, False]
    for head in ((0, 1), (1, 0)):
        run.keys[head] *= -3
        length = int(run.ours[4][1]) + 1
        configure(num_sms, seed=seed)
        assert run(length)
        configure(num_sms, seed=seed)
        assert not run(length + 1)


def test_a_step_is_two_launches_whether_it_scores_or_not():
    run = Run()
    for length in (201, 202, 203, 204):
        configure(132)
        run.ours_alone(length)
        assert configure() == 2, length


@pytest.mark.parametrize("change", ["forgotten summaries", "forgotten scores"])
def test_what_was_forgotten_is_made_again(change):
    run = Run(every=100)
    assert [run(201), run(202)] == [True, False]
    for state in (run.ours, run.theirs):
        if change == "forgotten summaries":
            state[1][0] = 0
        else:
            state[4].fill_(-1)
    assert [run(203), run(204)] == [True, False]


def test_stored_scores_that_are_not_numbers_select_as_such():
    run = Run(every=100)
    run(201)
    for state in (run.ours, run.theirs):
        scores = state[3]
        scores[0, 0, 3:9], scores[0, 1], scores[1, 0, ::3] = NAN, -torch.inf, torch.inf
    assert not run(202)


@pytest.mark.parametrize("top_p", [0.6, 0.95])
def test_with_shares(top_p):
    run = Run(top_p=top_p)
    assert [run(length) for length in (201, 202, 203, 204)] == [True, False, False, True]


def test_no_gpu_and_no_order_changes_a_bit():
    runs = [Run() for _ in range(4)]
    for length in (201, 202, 203, 204, 205):
        outs = []
        for i, run in enumerate(runs):
            configure((1, 4, 7, 132)[i], seed=i)
            outs.append(run.call(ops.sparse_decode_step, run.ours, length, 1, None))
        assert_same_bits(outs[1:], outs[:1] * 3)
        for run in runs[1:]:
            assert_same_state(run.ours[:3], runs[0].ours[:3])
            assert_same_bits([run.ours[3]], [runs[0].ours[3]])
            assert run.ours[4].tolist() == runs[0].ours[4].tolist()


def test_a_cache_that_fits_keeps_no_scores():
    run = Run(Case(torch.bfloat16, 16, 16, 2, 2, 8, (40, 40), 40, budget_pages=5))
    for length in (30, 31):
        assert not run(length)
        assert run.ours[4].tolist() == [-1, length]


@pytest.mark.parametrize("wild", [-(2**40), -1, 0, 2**40])
def test_lengths_out_of_range_are_clamped(wild):
    run = Run(every=100)
    run.keys.nan_to_num_(0)
    run.values.nan_to_num_(0)
    length = min(max(wild, 1), 300)
    rows, num_sealed, scale, scores, scored_at = run.ours
    outs = []
    for seq_len in (length, wild):
        state = (rows, num_sealed, torch.tensor([seq_len]), None, scale, scores, scored_at)
        outs.append(
            torch.ops.quest_emulated.sparse_decode_step(
                run.query(1), run.keys, run.values, torch.tensor([length - 1]), *state,
                select_every=4, **run.settings
            )
        )  # fmt: skip
        scored_at.fill_(-1)
    assert_same_bits(outs[:1], outs[1:])
