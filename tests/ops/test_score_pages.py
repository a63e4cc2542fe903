import dataclasses

import pytest
import torch
from exact_scores import assert_scores, exact_scores
from hostile import (
    NAN,
    WAYS,
    Case,
    every_case,
    every_dtype,
    every_way,
    id_of,
    make_inputs,
    other_memory,
)
from key_distributions import DISTRIBUTIONS
from oracle import in_float64

from quest_compile import ops
from quest_compile.ops import reference

of_tokens = pytest.mark.parametrize(
    "way", [way for way in WAYS if Case(**way).scores_tokens], ids=id_of
)


@every_case
def test_is_the_definition(case, device):
    inputs = make_inputs(case, device)
    assert_scores(inputs, inputs.scores())


@every_case
def test_reference_in_float64_is_exact(case):
    inputs = make_inputs(case)
    arguments = [inputs.query, inputs.page_summary, inputs.seq_lens]
    if case.scores_tokens:
        arguments.append(inputs.attn_mask)
    actual = in_float64(reference.score_pages, *arguments, **inputs.score_settings())
    torch.testing.assert_close(actual, exact_scores(inputs)[0], equal_nan=True)


@every_way
@every_dtype
def test_any_finite_keys(way, dtype):
    """Bounds of huge keys overflow."""
    for name in DISTRIBUTIONS:
        if (name, way["summary"]) != ("huge", "minmax"):
            shape = {"lengths": (333, 200), "max_seq_len": 400}
            inputs = make_inputs(Case(dtype, mask="random", keys=name, **shape, **way))
            assert_scores(inputs, inputs.scores())


@of_tokens
@pytest.mark.parametrize("scale", [0.02, 1.0, -0.3])
def test_scale_multiplies_the_products(way, scale):
    inputs = make_inputs(Case(torch.bfloat16, mask="per_head", **way))
    assert_scores(inputs, inputs.scores(scale=scale), scale)


@of_tokens
def test_strides_of_the_mask_do_not_matter(way):
    inputs = make_inputs(Case(lengths=(300, 200), max_seq_len=300, mask="random", **way))
    expected = inputs.scores()
    for mask in other_memory(inputs.attn_mask):
        assert torch.equal(inputs.scores(attn_mask=mask), expected)


@every_case
def test_a_bound_is_never_below_a_logit_of_its_page(case):
    case = dataclasses.replace(case, summary="minmax", group_reduce="none")
    inputs = make_inputs(case)
    query = inputs.query.double().unflatten(1, (case.num_kv_heads, -1))
    logits = (query * inputs.clean_keys[:, :, None]).sum(-1).flatten(1, 2)
    num_complete = min(case.lengths) // case.page_size
    logits = logits[..., : num_complete * case.page_size].unflatten(-1, (-1, case.page_size))
    allowed = inputs.scores() + exact_scores(inputs)[1]
    assert (logits <= allowed[..., :num_complete, None]).all()


@every_way
def test_scores_complete_pages_only(way):
    for length, num_complete in ((15, 0), (16, 1), (17, 1), (32, 2), (40, 2)):
        scores = make_inputs(Case(lengths=(length,), max_seq_len=40, **way)).scores()
        assert scores[..., :num_complete].isfinite().all()
        assert scores[..., num_complete:].isneginf().all()


@every_way
def test_a_page_with_a_key_that_is_nan_scores_nan(way):
    inputs = make_inputs(Case(lengths=(64,), max_seq_len=64, **way))
    inputs.key_cache[0, 1, 40, 5] = NAN
    inputs.summarise()
    scores = inputs.scores()
    assert_scores(inputs, scores)
    per_head = scores.unflatten(1, (2, -1))
    assert per_head[0, 1, :, 2].isnan().all() and scores.isnan().sum() == per_head.shape[2]


@every_way
def test_a_query_that_is_nan_scores_nan(way):
    inputs = make_inputs(Case(lengths=(64, 40), max_seq_len=64, mask="per_head", **way))
    inputs.query[0, 5, 0, 3] = NAN
    if way["group_reduce"] == "sum":
        inputs.attn_mask = None
    scores = inputs.scores()
    assert_scores(inputs, scores)
    head = 5 if way["group_reduce"] == "none" else 1
    assert scores[0, head, :4].isnan().any() and not scores[:, :head].isnan().any()


@every_way
def test_one_seq_len_serves_all_rows(way):
    inputs = make_inputs(Case(lengths=(100, 100, 100), **way))
    expected = inputs.scores()
    for seq_lens in (torch.tensor([100]), torch.tensor([100], dtype=torch.int32)):
        arguments = (inputs.query, inputs.page_summary, seq_lens)
        assert torch.equal(ops.score_pages(*arguments, **inputs.score_settings()), expected)
