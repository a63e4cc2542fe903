import pytest
import torch
from hostile import Case, every_case, make_inputs, other_memory

from quest_compile import ops

INF, NAN = float("inf"), float("nan")


def select_one_by_one(scores, seq_len, live, page_budget, page_size, num_sinks, num_recents):
    """The contract in a loop, for one row and head: ``live`` bool [num_positions]."""
    num_used = -(-seq_len // page_size)
    is_live = [
        any(live[p * page_size : min((p + 1) * page_size, seq_len)]) for p in range(num_used)
    ]
    candidates = [p for p in range(num_used) if is_live[p]]
    chosen = candidates if seq_len <= page_budget * page_size else candidates[:num_sinks]
    chosen = set(chosen) | {p for p in candidates if p >= num_used - num_recents}

    def rank(page):
        score = float(scores[page])
        return (0, 0.0, page) if score != score else (1, -score, page)

    rest = sorted((p for p in candidates if p not in chosen), key=rank)
    return sorted(chosen | set(rest[: page_budget - len(chosen)]))


def assert_selects_as_the_loop(scores, seq_lens, live, actual, page_size, sinks=1, recents=2):
    num_select_heads, page_budget = actual.shape[1:]
    live = live.unflatten(1, (num_select_heads, -1)).any(2)
    for row, length in enumerate(seq_lens.tolist()):
        for head in range(num_select_heads):
            expected = select_one_by_one(
                scores[row, head].tolist(),
                length,
                live[row, head].tolist(),
                page_budget,
                page_size,
                sinks,
                recents,
            )
            empty = [-1] * (page_budget - len(expected))
            assert actual[row, head].tolist() == expected + empty, (row, head)


@every_case
def test_selects_as_the_contract_says(case, device):
    inputs = make_inputs(case, device)
    scores = inputs.scores()
    actual = inputs.pages(scores)
    assert actual.dtype == torch.int32
    assert_selects_as_the_loop(scores, inputs.seq_lens, inputs.live, actual, case.page_size)


@pytest.mark.parametrize("page_budget", [10, 33, 64, 65, 200])
@pytest.mark.parametrize(("num_sinks", "num_recents"), [(0, 1), (1, 2), (3, 1), (2, 8)])
@pytest.mark.parametrize("levels", [1, 3, 1000], ids=lambda n: f"{n}_levels")
def test_ties_go_to_the_lowest_index(page_budget, num_sinks, num_recents, levels):
    seq_lens = torch.tensor([16 * 65 - 3, 16 * 40])
    scores = torch.randint(-levels, levels, (2, 3, 65)).float()
    actual = ops.select_pages(
        scores,
        seq_lens,
        page_budget=page_budget,
        num_sink_pages=num_sinks,
        num_recent_pages=num_recents,
    )
    live = torch.ones(2, 3, 65 * 16, dtype=torch.bool)
    assert_selects_as_the_loop(scores, seq_lens, live, actual, 16, num_sinks, num_recents)


@pytest.mark.parametrize(
    "scores",
    [
        [0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
        [1.0, NAN, INF, -INF, NAN, 3.0, -INF, -INF],
        [-NAN, -1.0, INF, INF, NAN, INF, 2.0, -INF],
        [-INF] * 8,
        [1e-45, 0.0, -1e-45, 1e-45, 1e38, -1e38, 0.0, 0.0],
    ],
    ids=["zeros", "nan_above_infinity", "negative_nan", "all_minus_infinity", "subnormal"],
)
@pytest.mark.parametrize("page_budget", [3, 4, 5, 6])
def test_orders_special_scores(scores, page_budget):
    scores, seq_lens = torch.tensor([[scores]]), torch.tensor([8 * 16])
    actual = ops.select_pages(scores, seq_lens, page_budget=page_budget)
    live = torch.ones(1, 1, 128, dtype=torch.bool)
    assert_selects_as_the_loop(scores, seq_lens, live, actual, 16)


@pytest.mark.parametrize("length", [65, 80, 81, 100, 128])
def test_open_page_is_always_attended(length):
    scores = torch.randn(1, 2, 8)
    pages = ops.select_pages(
        scores, torch.tensor([length]), page_budget=4, num_sink_pages=0, num_recent_pages=1
    )
    assert (pages == (length - 1) // 16).any(-1).all()


def test_sinks_and_recents_are_there():
    scores = torch.zeros(1, 1, 100)
    scores[..., 10:60] = 100
    pages = ops.select_pages(
        scores, torch.tensor([1600]), page_budget=12, num_sink_pages=3, num_recent_pages=4
    )
    assert pages.tolist() == [[[0, 1, 2, 10, 11, 12, 13, 14, 96, 97, 98, 99]]]


def test_sinks_are_the_first_live_pages():
    mask = torch.ones(1, 1, 1, 320, dtype=torch.bool)
    mask[..., : 16 * 5 + 3] = False
    pages = ops.select_pages(torch.zeros(1, 1, 20), torch.tensor([320]), mask, page_budget=3)
    assert pages.tolist() == [[[5, 18, 19]]]


def test_page_without_a_live_token_is_never_selected():
    mask = torch.zeros(1, 1, 1, 320, dtype=torch.bool)
    mask[..., [40, 41, 100, 310]] = True
    pages = ops.select_pages(torch.zeros(1, 2, 20), torch.tensor([320]), mask, page_budget=6)
    assert pages.tolist() == [[[2, 6, 19, -1, -1, -1]] * 2]
    nothing = ops.select_pages(
        torch.zeros(1, 2, 20), torch.tensor([320]), torch.zeros_like(mask), page_budget=6
    )
    assert (nothing == -1).all()


def test_lists_every_page_when_all_fit():
    for length in (1, 16, 17, 63, 64):
        pages = ops.select_pages(torch.zeros(1, 1, 20), torch.tensor([length]), page_budget=4)
        used = list(range(-(-length // 16)))
        assert pages.tolist() == [[used + [-1] * (4 - len(used))]]


def test_budget_beyond_the_cache():
    pages = ops.select_pages(torch.zeros(1, 1, 3), torch.tensor([40]), page_budget=6)
    assert pages.tolist() == [[[0, 1, 2, -1, -1, -1]]]


def test_group_shares_pages_that_are_live_for_one_of_its_heads():
    mask = torch.zeros(1, 4, 1, 160, dtype=torch.bool)
    mask[0, 0, 0, 5] = mask[0, 1, 0, 50] = mask[0, 3, 0, 150] = True
    pages = ops.select_pages(torch.zeros(1, 2, 10), torch.tensor([160]), mask, page_budget=3)
    assert pages.tolist() == [[[0, 3, -1], [9, -1, -1]]]


def test_mask_strides_do_not_matter():
    inputs = make_inputs(Case(lengths=(300, 200), max_seq_len=300, mask="random"))
    scores = inputs.scores()
    expected = inputs.pages(scores)
    for mask in other_memory(inputs.attn_mask):
        actual = ops.select_pages(scores, inputs.seq_lens, mask, page_budget=4)
        assert torch.equal(actual, expected)
