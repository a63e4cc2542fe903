import pytest
import torch
from hostile import CASES, Case, make_inputs
from oracle import assert_as_accurate_as, in_float64

from quest_compile import ops
from quest_compile.ops import reference


def scores_of_the_paper(query, page_summary, seq_lens, page_size, group_reduce):
    """Algorithm 1 of arXiv 2406.10774, word for word, in float32 for 16-bit inputs."""
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    low, high = page_summary.to(dtype)[:, :, None].unbind(4)
    grouped = query.to(dtype).unflatten(1, (num_kv_heads, -1))
    bound = torch.maximum(grouped * low, grouped * high).sum(-1)
    reduced = {"sum": bound.sum(2), "max": bound.amax(2), "none": bound.flatten(1, 2)}[group_reduce]
    is_complete = torch.arange(num_pages, device=query.device) < (seq_lens // page_size)[:, None]
    return reduced.masked_fill(~is_complete[:, None], -torch.inf)


def rounding_of_scores(inputs):
    """A score may be off by 1e-5 of its terms: weights may be the sum of two bfloat16."""
    case = inputs.case
    bound = inputs.page_summary.double().abs().amax(3)[:, :, None]
    query = inputs.query.double().abs().unflatten(1, (case.num_kv_heads, -1))
    terms = (query * bound).sum(-1)
    terms = terms.sum(2) if case.group_reduce == "sum" else terms
    terms = terms.amax(2) if case.group_reduce == "max" else terms
    return 1e-5 * (terms.flatten(1, 2) if case.group_reduce == "none" else terms)


def assert_scores(inputs, actual):
    case = inputs.case
    arguments = (inputs.query, inputs.page_summary, inputs.seq_lens)
    settings = {"page_size": case.page_size, "group_reduce": case.group_reduce}
    plain = scores_of_the_paper(*arguments, **settings)
    exact = in_float64(scores_of_the_paper, *arguments, **settings)
    assert_as_accurate_as(plain, actual, exact, granted=rounding_of_scores(inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_score_of_the_paper(case, device):
    inputs = make_inputs(case, device)
    assert_scores(inputs, inputs.scores())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_score_of_the_paper(case):
    inputs = make_inputs(case)
    arguments = (inputs.query, inputs.page_summary, inputs.seq_lens)
    settings = {"page_size": case.page_size, "group_reduce": case.group_reduce}
    expected = in_float64(scores_of_the_paper, *arguments, **settings)
    torch.testing.assert_close(in_float64(reference.score_pages, *arguments, **settings), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_never_below_a_logit_of_its_page(case):
    inputs = make_inputs(case)
    query = inputs.query.double().unflatten(1, (case.num_kv_heads, -1))
    logits = (query * inputs.clean_keys[:, :, None]).sum(-1)
    if case.group_reduce == "none":
        logits = logits.flatten(1, 2)
    else:
        logits = logits.sum(2) if case.group_reduce == "sum" else logits.amax(2)
    num_complete = min(case.lengths) // case.page_size
    in_pages = logits[..., : num_complete * case.page_size].unflatten(
        -1, (num_complete, case.page_size)
    )
    allowed = (inputs.scores() + rounding_of_scores(inputs))[..., :num_complete, None]
    assert (in_pages <= allowed).all()


@pytest.mark.parametrize("group_reduce", ["sum", "max", "none"])
def test_scores_complete_pages_only(group_reduce):
    for length, num_complete in ((15, 0), (16, 1), (17, 1), (32, 2), (40, 2)):
        case = Case(lengths=(length,), max_seq_len=40, group_reduce=group_reduce)
        scores = make_inputs(case).scores()
        assert scores[..., :num_complete].isfinite().all()
        assert (scores[..., num_complete:] == -torch.inf).all()


def test_nan_keys_score_nan():
    inputs = make_inputs(Case(lengths=(64,), max_seq_len=64))
    inputs.page_summary[0, 1, 2] = torch.nan
    is_nan = inputs.scores().isnan()
    assert is_nan[0, 1, 2] and is_nan.sum() == 1


def test_one_seq_len_serves_all_rows():
    inputs = make_inputs(Case(lengths=(100, 100, 100)))
    expected = inputs.scores()
    for seq_lens in (torch.tensor([100]), torch.tensor([100], dtype=torch.int32)):
        assert torch.equal(ops.score_pages(inputs.query, inputs.page_summary, seq_lens), expected)
