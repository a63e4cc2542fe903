"""What quest::audit adds up, against loops over heads and pages in float64."""

import dataclasses

import pytest
import torch
from hostile import CASES, Case, every_format, make_inputs
from test_several_queries import make_call

from quest_compile import ops

LONG = Case(torch.bfloat16, lengths=(500, 333, 64), max_seq_len=512)
audited = pytest.mark.parametrize("case", (LONG, *CASES), ids=str)


def run_audit(inputs, totals, every=1, out=None):
    """One call of sparse_decode and its audit; returns the output."""
    settings = inputs.settings()
    out = ops.sparse_decode(*inputs.sparse(), **settings) if out is None else out
    torch.ops.quest.audit(*inputs.sparse(), out, totals, every=every, **settings)
    return out


def audit_of(inputs, **settings):
    totals = ops.new_audit_totals(inputs.query.device)
    run_audit(inputs, totals, **settings)
    return ops.read_audit(totals)


def losses_by_loops(inputs, out):
    """(kept mass, output error, page recall) of every query head of every row beyond the budget."""
    case, found = inputs.case, []
    pages = inputs.pages(inputs.scores())
    heads_per_selection = case.num_kv_heads * case.group_size // pages.shape[1]
    for row, length in enumerate(case.lengths):
        if length <= case.budget_pages * case.page_size:
            continue
        num_pages = -(-length // case.page_size)
        for selection in range(pages.shape[1]):
            chosen = [int(page) for page in pages[row, selection] if page >= 0]
            heads = range(selection * heads_per_selection, (selection + 1) * heads_per_selection)
            masses, errors = [], []
            for head in heads:
                kv_head = head // case.group_size
                live = inputs.live[row, head].nonzero()[:, 0]
                query = inputs.query[row, head, 0].double()
                logits = inputs.clean_keys[row, kv_head, live] @ query / case.head_dim**0.5
                weights = logits.softmax(0)
                mass = [float(weights[live // case.page_size == p].sum()) for p in range(num_pages)]
                full = weights @ inputs.clean_values[row, kv_head, live]
                masses.append(mass)
                difference = (out[row, head, 0].double() - full).norm() / full.norm()
                errors.append(float(difference) if len(live) else None)
            shared = torch.tensor(masses).sum(0)
            best = sorted(range(num_pages), key=lambda p: (-float(shared[p]), p))[: len(chosen)]
            recall = len(set(best) & set(chosen)) / max(1, len(chosen))
            for mass, error in zip(masses, errors, strict=True):
                if error is not None:
                    found.append((sum(mass[p] for p in chosen), error, recall))
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 3)


@audited
def test_figures_are_those_of_loops_over_heads_and_pages(case):
    inputs = make_inputs(case)
    totals = ops.new_audit_totals(inputs.query.device)
    out = run_audit(inputs, totals)
    audit, expected = ops.read_audit(totals), losses_by_loops(inputs, out)
    assert (audit.calls, audit.audited_calls, audit.queries) == (1, 1, len(expected))
    figures = (audit.kept_mass, audit.output_error, audit.page_recall)
    if len(expected) == 0:
        assert figures == (None, None, None)
        return
    assert figures == pytest.approx(expected.mean(0).tolist(), rel=1e-4, abs=1e-6)
    assert audit.kept_mass_min == pytest.approx(float(expected[:, 0].min()), rel=1e-4, abs=1e-6)
    assert audit.output_error_max == pytest.approx(float(expected[:, 1].max()), rel=1e-4)


def test_some_case_keeps_little_and_some_case_much():
    found = [audit_of(make_inputs(case)).kept_mass for case in CASES]
    found = [kept_mass for kept_mass in found if kept_mass is not None]
    assert min(found) < 0.2 and max(found) > 0.6


def test_an_output_that_is_wrong_shows_as_an_error():
    inputs = make_inputs(LONG)
    dense = ops.dense_decode(*inputs.dense())
    right, wrong = audit_of(inputs, out=dense), audit_of(inputs, out=3 * dense)
    assert right.output_error < 0.01
    assert wrong.output_error == pytest.approx(2, abs=0.03)
    assert (wrong.kept_mass, wrong.page_recall) == (right.kept_mass, right.page_recall)


def test_every_so_many_calls_are_audited_from_the_first_on():
    inputs = make_inputs(LONG)
    once, totals = audit_of(inputs), ops.new_audit_totals(torch.device("cpu"))
    for call in range(7):
        run_audit(inputs, totals, every=3)
        audit = ops.read_audit(totals)
        assert (audit.calls, audit.audited_calls) == (call + 1, call // 3 + 1)
    assert audit.queries == 3 * once.queries
    assert audit.kept_mass == pytest.approx(once.kept_mass)
    assert audit.output_error_max == once.output_error_max


def test_calls_between_do_not_look_at_the_cache():
    inputs = make_inputs(LONG)
    totals = ops.new_audit_totals(torch.device("cpu"))
    out = run_audit(inputs, totals, every=2)
    before = totals.clone()
    inputs.key_cache.fill_(torch.nan)
    run_audit(inputs, totals, every=2, out=out)
    assert torch.equal(totals[1:], before[1:])


def test_rows_that_fit_the_budget_do_not_count():
    inputs = make_inputs(LONG)
    num_q_heads = inputs.query.shape[1]
    assert audit_of(inputs).queries == 2 * num_q_heads
    assert audit_of(make_inputs(dataclasses.replace(LONG, budget_pages=32))).queries == 0


@every_format
@pytest.mark.parametrize("mask", ["none", "causal", "padded"])
def test_several_queries_are_audited_as_if_each_came_alone(mask, page_format):
    case = dataclasses.replace(LONG, **page_format)
    totals = ops.new_audit_totals(torch.device("cpu"))
    inputs = make_call(case, 4, mask)
    run_audit(inputs, totals)
    alone = ops.new_audit_totals(torch.device("cpu"))
    for i in range(4):
        one = make_call(case, 4, mask)
        one.query = one.query[:, :, i : i + 1]
        one.seq_lens = one.seq_lens - (3 - i)
        one.attn_mask = None if one.attn_mask is None else one.attn_mask[:, :, i : i + 1]
        run_audit(one, alone)
    audit, sum_of_alone = ops.read_audit(totals), ops.read_audit(alone)
    assert audit.queries > 2 * 8
    assert dataclasses.replace(audit, calls=4, audited_calls=4) == sum_of_alone


def test_counters_do_not_count_audits():
    inputs = make_inputs(LONG)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    ops.reset_counters()
    audit_of(inputs, out=out)
    assert not any(ops.counters().values())


def test_twice_gives_the_same_bits():
    inputs = make_inputs(LONG)
    assert audit_of(inputs) == audit_of(inputs)


@pytest.mark.parametrize("every", [0, -1])
def test_bad_every_is_named(every):
    with pytest.raises((ValueError, RuntimeError), match="every"):
        audit_of(make_inputs(LONG), every=every)


def test_opcheck():
    inputs = make_inputs(LONG)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    arguments = (*inputs.sparse(), out, ops.new_audit_totals(torch.device("cpu")))
    torch.library.opcheck(torch.ops.quest.audit, arguments, {"every": 2, **inputs.settings()})
