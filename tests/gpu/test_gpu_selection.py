"""Shares and stored scores by the native CUDA kernels on a GPU."""

import dataclasses

import pytest
import torch
from hostile import CASES, Case, make_inputs
from test_every_op import assert_same_bits
from test_selection_shares import assert_selects_shares, random_scores
from test_sparse_decode_step import assert_same_state

from quest_compile import ops
from quest_compile.ops.cuda_providers import provider_of

pytestmark = pytest.mark.cuda

SHARES = ({"top_p": 0.9}, {"budget_fraction": 0.3}, {"top_p": 0.5, "budget_fraction": 0.41})


@pytest.fixture(autouse=True)
def _native():
    if provider_of("sparse_decode") != "native":
        pytest.skip(f"no native CUDA kernels: {ops.native_status()}")


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "odd"])
@pytest.mark.parametrize("num_pages", [50, 2048, 10_000])
def test_selects_the_pages_of_the_cpu(num_pages, kind, shares):
    seq_lens = torch.tensor([16 * num_pages - 3, 16 * 30])
    scores = random_scores(kind, num_pages)
    for page_budget in (12, num_pages // 2):
        settings = {"page_budget": page_budget, "score_scale": 0.3, **shares}
        expected = ops.select_pages(scores, seq_lens, **settings)
        actual = ops.select_pages(scores.cuda(), seq_lens.cuda(), **settings)
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_decode_attends_what_is_chosen(case, shares):
    case = dataclasses.replace(case, summary="meanstd", budget_pages=9, **shares)
    inputs = make_inputs(case, "cuda")
    scores = inputs.scores()
    pages = inputs.pages(scores)
    assert_selects_shares(inputs, scores, pages)
    composed = inputs.attend(pages)
    fits = inputs.fits()
    dense = ops.dense_decode(*inputs.dense())
    for _ in range(5):
        out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
        assert_same_bits([out[~fits], out[fits]], [composed[~fits], dense[fits]])


class Steps:
    """Calls of sparse_decode_step with select_every on one cache; ``scored``: which scored."""

    def __init__(self, inputs, summary):
        self.inputs, self.summary, self.scored = inputs, summary, []
        keys, page_size = inputs.key_cache, inputs.case.page_size
        rows, scale = ops.empty_page_summary(keys, page_size, summary)
        scores, scored_at = ops.empty_page_scores(keys, keys.shape[1], page_size)
        sealed = torch.tensor([0, -1], device=keys.device)
        self.state = rows.fill_(0), sealed, scale, scores.fill_(0), scored_at
        self.position = torch.tensor([0], device=keys.device)
        self.length = torch.tensor([1], device=keys.device)

    def set_length(self, length):
        self.position.fill_(length - 1)
        self.length.fill_(length)

    def __call__(self):
        rows, sealed, scale, scores, scored_at = self.state
        query, keys, values, *_ = self.inputs.sparse()
        return ops.sparse_decode_step(
            query, keys, values, self.position, rows, sealed, self.length, None, scale, scores,
            scored_at, select_every=4, budget=256, summary=self.summary
        )  # fmt: skip

    def note(self, length):
        self.scored.append(self.state[4].tolist() == [length, length])


@pytest.mark.parametrize("summary", ["minmax", "minmax_int8", "meanstd", "sketch"])
def test_a_captured_step_takes_stored_scores_as_the_cpu_does(summary):
    """Over multiples of select_every, a rollback, foreign writes to one head, by one graph."""
    case = Case(torch.bfloat16, 128, 128, 8, 4, lengths=(2048, 2048), max_seq_len=2048)
    on_gpu, plain, on_cpu = (
        Steps(make_inputs(case, device), summary) for device in ("cuda", "cuda", "cpu")
    )
    all_steps = (on_gpu, plain, on_cpu)
    on_gpu()
    for mine, new in zip(on_gpu.state, plain.state, strict=True):
        if mine is not None:
            mine.copy_(new)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = on_gpu()
    for i, length in enumerate((*range(1021, 1032), 700, 701, 100, 101, *range(2001, 2008))):
        for steps in all_steps:
            steps.set_length(length)
            if i in (6, 19):
                steps.inputs.key_cache[i % 2, 5] *= -2
        graph.replay()
        expected = plain()
        on_cpu()
        for steps in all_steps:
            steps.note(length)
        assert_same_bits([out], [expected])
        assert_same_state(on_gpu.state, plain.state)
    assert on_gpu.scored == plain.scored == on_cpu.scored
    assert any(on_cpu.scored) and not all(on_cpu.scored)
