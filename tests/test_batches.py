"""Left-padded and ragged batches through generate, with rows that finish early.

Pages are cut by cache position, so padding moves the page borders of a row: at a small budget a row
is promised what it gets alone with the same padding, and what it gets without padding only where
the padding is whole pages or its own tokens fit the budget.
"""

import functools

import pytest
import torch
from tiny_models import SHORT, left_padded_prompt, tiny_model

import quest_compile
from quest_compile import ops

NUM_LAYERS, NUM_NEW_TOKENS, MAX_SEQ_LEN, PAGE_SIZE = 3, 24, 192, 8
COVERING = SHORT | {"num_dense_layers": 1, "page_size": PAGE_SIZE}
COVERING |= {"budget": 160, "inner": "eager"}
SMALL = COVERING | {"budget": 48}
# The first is the longest: the number of positions of its batch. All are more than the last page.
LENGTHS = [120, 9, 64, 33, 101, 17, 120, 50, 77, 12, 96, 41, 111, 25, 88, 72]
BATCH_SIZES = [1, 2, 5, 16]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


@functools.cache
def prompts():
    """Token ids and mask of 16 rows; a batch of n is the first n, a row is itself in each."""
    return left_padded_prompt(LENGTHS)


def model_with(settings):
    model = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    return model if settings is None else quest_compile.compile_for_generate(model, **settings)


def generate(model, tokens, mask, eos=None):
    """New tokens, one list per row, up to and with the first end token."""
    is_static = model.generation_config.cache_implementation == "static"
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            **({"max_cache_len": MAX_SEQ_LEN} if is_static else {}),
        )
    return [_until(row, eos) for row in out[:, tokens.shape[1] :].tolist()]


def _until(row, eos):
    return row[: row.index(eos) + 1] if eos in row else row


def without_padding(row):
    tokens, mask = prompts()
    return tokens[row, mask[row].bool()][None], torch.ones(1, LENGTHS[row], dtype=torch.int64)


def an_end_token(rows):
    """A token that ends some of these rows early, at different steps, and others not at all."""
    for token in sorted({token for row in rows for token in row[:-1]}):
        ends = [row.index(token) for row in rows if token in row[:-1]]
        if len(rows) > len(ends) and len(set(ends)) >= min(2, len(rows) - 1):
            return token
    return None


@functools.cache
def dense(batch, eos=None):
    tokens, mask = prompts()
    return generate(model_with(None), tokens[:batch], mask[:batch], eos)


@functools.cache
def small_budget(batch, eos=None):
    tokens, mask = prompts()
    ops.reset_counters()
    rows = generate(model_with(SMALL), tokens[:batch], mask[:batch], eos)
    num_steps = max(map(len, rows)) - 1
    assert ops.counters()["sparse_calls"] == (NUM_LAYERS - 1) * num_steps
    return rows


def test_every_batch_size_in_turn_gives_dense_tokens_at_a_covering_budget():
    model = model_with(COVERING)
    tokens, mask = prompts()
    for batch in BATCH_SIZES:
        ops.reset_counters()
        assert generate(model, tokens[:batch], mask[:batch]) == dense(batch)
        num_calls = (NUM_LAYERS - 1) * (NUM_NEW_TOKENS - 1)
        assert ops.counters()["sparse_calls_covered"] == num_calls
    assert quest_compile.backend(**COVERING).report().count("untouched") == 0


@pytest.mark.parametrize("batch", [5, 16])
def test_rows_that_finish_early_leave_the_others_dense_tokens(batch):
    eos = an_end_token(dense(batch))
    rows = dense(batch, eos)
    assert 1 < len({len(row) for row in rows}), "some rows end early, others later or never"
    tokens, mask = prompts()
    assert generate(model_with(COVERING), tokens[:batch], mask[:batch], eos) == rows
    assert ops.counters()["sparse_calls_covered"] > 0


@pytest.mark.parametrize("batch", [2, 5, 16])
def test_a_row_gets_what_it_gets_alone_with_the_same_padding(batch):
    rows = small_budget(batch)
    assert rows != dense(batch), "the budget is small enough to matter"
    model = model_with(SMALL)
    tokens, mask = prompts()
    for row in range(batch):
        assert generate(model, tokens[row : row + 1], mask[row : row + 1]) == [rows[row]]


def test_a_row_that_finishes_early_changes_no_other_row():
    rows = small_budget(16)
    eos = an_end_token(rows)
    assert small_budget(16, eos) == [_until(row, eos) for row in rows]


def test_whole_pages_of_padding_change_nothing():
    rows, model = small_budget(16), model_with(SMALL)
    padded_by_pages = [
        row for row, n in enumerate(LENGTHS) if (LENGTHS[0] - n) % PAGE_SIZE == 0 and n > 48
    ]
    assert len(padded_by_pages) >= 4
    ops.reset_counters()
    for row in padded_by_pages:
        assert generate(model, *without_padding(row)) == [rows[row]]
    assert ops.counters()["sparse_calls"] > 0


def test_a_row_whose_own_tokens_fit_the_budget_is_dense():
    rows, dense_rows = small_budget(16), dense(16)
    # One page more than the tokens fill: they may start and end anywhere in theirs.
    fitting = [
        i for i, n in enumerate(LENGTHS) if n + NUM_NEW_TOKENS <= SMALL["budget"] - PAGE_SIZE
    ]
    assert len(fitting) >= 2
    assert [rows[i] for i in fitting] == [dense_rows[i] for i in fitting]
    assert rows != dense_rows
