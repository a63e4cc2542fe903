"""Random calls: valid ones against the oracle, invalid ones have to raise.

A seeded slice runs always; QUEST_COMPILE_FUZZ sets another number of calls, the mark ``nightly``
(pytest -m nightly) runs 20,000 of each.
"""

import dataclasses
import os
import random

import pytest
import torch
from exact_scores import assert_scores
from hostile import make_inputs, random_case, wild_slots
from test_attend_pages import assert_attends, listed_positions
from test_bad_input import BAD, arguments_of
from test_select_pages import assert_selects_as_the_loop
from test_selection_shares import assert_selects_shares
from test_several_queries import MASKS as SEVERAL_MASKS
from test_several_queries import NAMES as SEVERAL_NAMES
from test_several_queries import make_call, run, run_alone

from quest_compile import ops

NUM_CALLS = int(os.environ.get("QUEST_COMPILE_FUZZ", 150))
NUM_NIGHTLY_CALLS = 20_000
NUM_PARTS = 10
GO_TOGETHER = ({"key_cache", "value_cache"}, {"page_summary", "summary", "sketch_bits"})


def slices(num_calls):
    """Ranges of seeds, so that a failure is near its seed and parts can run side by side."""
    size = -(-num_calls // NUM_PARTS)
    return [range(first, min(first + size, num_calls)) for first in range(0, num_calls, size)]


def parametrize_seeds():
    nightly = slices(NUM_NIGHTLY_CALLS)
    return pytest.mark.parametrize(
        "seeds",
        [
            *slices(NUM_CALLS),
            *(pytest.param(seeds, marks=pytest.mark.nightly) for seeds in nightly),
        ],
        ids=lambda seeds: f"{seeds.start}-{seeds.stop}",
    )


def check_valid_call(seed):
    torch.manual_seed(seed)
    torch.set_num_threads(1 if seed % 8 else 2)
    case = random_case(seed)
    inputs = make_inputs(case, seed=seed)
    scores = inputs.scores()
    assert_scores(inputs, scores)
    pages = inputs.pages(scores)
    if inputs.shares():
        assert_selects_shares(inputs, scores, pages)
    else:
        assert_selects_as_the_loop(scores, inputs.seq_lens, inputs.live, pages, case.page_size)

    is_attended = listed_positions(inputs, pages)
    out, lse = inputs.attend(wild_slots(pages))
    assert_attends(inputs, is_attended, out, lse)
    sparse = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    fits = inputs.fits()
    assert torch.equal(sparse[~fits], out[~fits])
    dense = ops.dense_decode(*inputs.dense())
    assert_attends(inputs, inputs.live[:, :, None], dense)
    assert torch.equal(sparse[fits], dense[fits])
    check_several_queries(case, seed)


def check_several_queries(case, seed):
    rng = random.Random(seed)
    num_queries = rng.randint(2, 8)
    if min(case.lengths) < num_queries:
        return
    case = dataclasses.replace(case, mask="none")
    inputs = make_call(case, num_queries, rng.choice(SEVERAL_MASKS))
    for name in SEVERAL_NAMES:
        alone = [run_alone(name, inputs, i) for i in range(num_queries)]
        assert torch.equal(run(name, inputs), torch.cat(alone, 2))


@parametrize_seeds()
def test_valid_calls_agree_with_the_oracle(seeds):
    for seed in seeds:
        try:
            check_valid_call(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {random_case(seed)}: {error}") from error


def check_invalid_call(seed):
    """A good call with one to three bad arguments."""
    rng = random.Random(seed)
    first = rng.choice(BAD)
    others = [bad for bad in BAD if (bad.op, bad.summary) == (first.op, first.summary)]
    arguments, names = arguments_of(first), {first.name}
    for bad in rng.choices(others, k=rng.randint(0, 2)):
        # Two of them, with fewer heads or of another kind, might go together again.
        group = next((group for group in GO_TOGETHER if bad.name in group), {bad.name})
        if not names & group:
            arguments[bad.name] = arguments_of(bad)[bad.name]
            names.add(bad.name)
    with pytest.raises((ValueError, TypeError)):
        getattr(ops, first.op)(**arguments)
    with pytest.raises((RuntimeError, ValueError)):
        getattr(torch.ops.quest, first.op)(**arguments)


@parametrize_seeds()
def test_invalid_calls_raise(seeds):
    for seed in seeds:
        try:
            check_invalid_call(seed)
        except pytest.fail.Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
