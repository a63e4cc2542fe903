"""int8 bounds hold for any keys, and choose nearly the pages that exact bounds choose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_minmax_int8 import DISTRIBUTIONS, DTYPES, INT8
from transformers import DynamicCache

from quest_compile import ops
from quest_compile.recall import load_model, make_context

SHAPES = {
    "normal": torch.randn,
    "cauchy": lambda *shape: torch.distributions.StudentT(1.0).sample(shape),
    "constant": lambda *shape: torch.ones(shape),
    "two_values": lambda *shape: torch.randint(0, 2, shape) * 2.0 - 1,
    "mostly_zero": lambda *shape: torch.randn(shape) * (torch.rand(shape) < 0.05),
    "one_sided": lambda *shape: -torch.rand(shape) - 3,
}
DECADES = {torch.float32: (-42, 37), torch.bfloat16: (-42, 37), torch.float16: (-7, 4)}


@st.composite
def calls(draw):
    """Keys [1, 2, L, D] with channels and pages decades apart, queries, page size."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    head_dim = draw(st.sampled_from([8, 24, 64, 128, 256]))
    page_size = draw(st.sampled_from([8, 16, 24, 128]))
    length = page_size * draw(st.integers(1, 6))
    low, high = sorted(draw(st.tuples(*[st.integers(*DECADES[dtype])] * 2)))

    def decades(*shape):
        return 10.0 ** (torch.randint(low, high + 1, shape).double())

    keys = SHAPES[draw(st.sampled_from(sorted(SHAPES)))](1, 2, length, head_dim).double()
    where = draw(st.sampled_from(["everywhere", "channels", "tokens", "entries"]))
    sizes = {"everywhere": (), "channels": (head_dim,), "tokens": (length, 1)}
    keys = keys * decades(*sizes.get(where, keys.shape))
    largest = torch.finfo(dtype).max
    query = torch.randn(1, 6, 1, head_dim) * 10.0 ** draw(st.integers(-6, 3))
    return keys.clamp(-largest, largest).to(dtype), query.to(dtype), page_size


@settings(max_examples=150, deadline=None)
@given(calls(), st.sampled_from(["sum", "max", "none"]))
def test_no_key_of_any_distribution_exceeds_the_score_of_its_page(call, group_reduce):
    keys, query, page_size = call
    length = torch.tensor([keys.shape[2]])
    rows, scale = ops.build_page_summary(keys, length, page_size, INT8)
    kind = {"page_size": page_size, "group_reduce": group_reduce, "summary": INT8}
    scores = ops.score_pages(query, rows, length, scale, **kind).double()
    pages = keys.double().unflatten(2, (-1, page_size))[:, :, None]
    query = query.double().unflatten(1, (2, 3))[:, :, :, None]
    products = (query @ pages.mT)[..., 0, :]
    # A score is a sum of 2 * head_dim products in float32, whose factors are rounded too.
    terms = (query.abs()[..., 0, :] * pages.abs().amax(4)).sum(-1)
    if group_reduce == "sum":
        products, terms = products.sum(2), terms.sum(2)
    elif group_reduce == "max":
        products, terms = products.amax(2), terms.amax(2)
    else:
        products, terms = products.flatten(1, 2), terms.flatten(1, 2)
    lowest = products.amax(-1) - terms * 6 * keys.shape[3] * 2**-24
    # What overflows float32 is infinite or NaN, and both are selected first.
    assert ((scores >= lowest) | scores.isnan()).all()
    assert not scores.isneginf().any()
    assert (scores.isfinite() | (terms > 1e36)).all()


def agreement(query, keys, page_budget):
    """Shares: of selections that are equal, and of pages by exact bounds that int8 chooses too;
    of the pages that the score decides about."""
    length = torch.tensor([keys.shape[2]])
    exact = ops.build_page_summary(keys, length)
    rows, scale = ops.build_page_summary(keys, length, summary=INT8)
    chosen = [
        ops.select_pages(scores, length, page_budget=page_budget)
        for scores in (
            ops.score_pages(query, exact, length),
            ops.score_pages(query, rows, length, scale, summary=INT8),
        )
    ]
    num_forced = 3
    is_equal = (chosen[0] == chosen[1]).all(-1).float()
    is_shared = (chosen[0][..., None] == chosen[1][..., None, :]).any(-1).float().sum(-1)
    overlap = (is_shared - num_forced) / (page_budget - num_forced)
    return float(is_equal.mean()), float(overlap.mean())


# What is lost where channels are far from zero: a step of the bounds is 1/126 of their size.
@pytest.mark.parametrize(
    ("name", "equal", "overlap"),
    [
        ("normal", 0.48, 0.98),
        ("heavy_channels", 0.75, 0.99),
        ("changing", 0.41, 0.975),
        ("one_sided", 0.0, 0.82),
        ("one_heavy_channel", 0.0, 0.72),
    ],
)
def test_pages_shared_with_exact_bounds_are_as_measured(name, equal, overlap):
    torch.manual_seed(1)
    keys = DISTRIBUTIONS[name]((16, 4, 4096, 64)).to(torch.bfloat16)
    query = torch.randn(16, 16, 1, 64).to(torch.bfloat16)
    found_equal, found_overlap = agreement(query, keys, page_budget=32)
    assert found_equal == pytest.approx(equal, abs=0.15)
    assert found_overlap == pytest.approx(overlap, abs=0.02)


def test_pages_shared_with_exact_bounds_in_the_recall_model_are_as_measured(monkeypatch):
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        seen.append((query[:, :, -1:].bfloat16(), key[:, :: key.shape[1] // 2].bfloat16()))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, cache = load_model(), DynamicCache()
    context = make_context(2048, 128, 24, seed=5)
    with torch.no_grad():
        model(context.tokens[None], past_key_values=cache, logits_to_keep=1)
        seen.clear()
        for question in context.questions:
            model(question[None], past_key_values=cache, logits_to_keep=1)
            cache.crop(-len(question))
    assert len(seen) == 3 * 24
    last_layer = seen[2::3]
    found = [agreement(*call, budget) for budget in (4, 8, 16, 32) for call in last_layer]
    equal, overlap = torch.tensor(found).mean(0).tolist()
    assert 0.85 <= equal <= 0.98, equal
    assert 0.97 <= overlap <= 0.998, overlap
