"""Decide for every attention call what becomes of it. Changes nothing in the graph."""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from quest_compile import ops
from quest_compile.budgets import LayerBudget
from quest_compile.config import QuestConfig
from quest_compile.passes.graph import example_value
from quest_compile.passes.match_attention import AttentionCall
from quest_compile.passes.reasons import Reason

# Where an operator costs a launch: update and decode are one there.
_STEP_DEVICES = frozenset({"cuda"})


class Treatment(enum.Enum):
    """What an attention call attends after the rewrite."""

    SPARSE = "sparse"
    DENSE = "dense"
    UNTOUCHED = "untouched"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one attention call.

    ``operator``: what runs it, an operator of ``quest``; empty: SDPA, as before.
    ``needs_summary``: the page summaries of its key cache must be kept up to date in this graph.
    ``updates_summary``: its operator does that, too.
    ``budget``: of a sparse call.
    """

    call: AttentionCall
    treatment: Treatment
    reason: Reason
    operator: str = ""
    needs_summary: bool = False
    updates_summary: bool = False
    budget: LayerBudget | None = None

    @property
    def is_rewritten(self) -> bool:
        return bool(self.operator) or self.needs_summary


def decide(calls: list[AttentionCall], config: QuestConfig) -> list[Decision]:
    """One decision per call, in order."""
    decisions = [_decide(call, config) for call in calls]
    return _fuse_updates(decisions)


def _fuse_updates(decisions: list[Decision]) -> list[Decision]:
    """The first call that needs the summary of a cache updates it, where it is a sparse one."""
    seen: set[fx.Node] = set()
    fused = []
    for decision in decisions:
        site = decision.call.site
        if decision.needs_summary and site is not None and site.key_cache not in seen:
            seen.add(site.key_cache)
            is_sparse = decision.treatment is Treatment.SPARSE
            device = example_value(site.key_cache).device.type
            if is_sparse and device in _STEP_DEVICES:
                decision = dataclasses.replace(
                    decision, operator="sparse_decode_step", updates_summary=True
                )
        fused.append(decision)
    return fused


def _serves_dense_decode(device: str) -> bool:
    """Is quest::dense_decode faster than scaled_dot_product_attention? Plain torch is not."""
    return device == "cpu" or (device == "cuda" and ops.provider_of("dense_decode") != "torch")


def _prefill_operator(call: AttentionCall, config: QuestConfig) -> str:
    """What runs a call with many queries."""
    if call.prefill is None or config.prefill == "sdpa":
        return ""
    query = example_value(call.prefill.query)
    device = query.device.type
    if config.prefill == "auto":
        is_used = ops.is_prefill_faster(device, query.dtype)
    else:
        is_used = ops.has_prefill_kernel(device)
    return "dense_prefill" if is_used else ""


def _decide(call: AttentionCall, config: QuestConfig) -> Decision:
    site = call.site
    if site is None:
        assert call.reason is not None
        operator = _prefill_operator(call, config)
        # A symbolic number of queries becomes a guard, but where it decides only.
        if operator and not guard_or_false(call.prefill.q_len <= config.max_q_len):
            return Decision(call, Treatment.DENSE, Reason.PREFILL_ALONE, operator)
        return Decision(call, Treatment.UNTOUCHED, call.reason)
    key_cache: torch.Tensor = example_value(site.key_cache)
    reason, budget = _of_layer(call.layer, key_cache.shape[2], config)
    is_sparse = reason is Reason.SPARSE
    # A symbolic q_len becomes a guard: one graph for few queries, one for many.
    has_few_queries = guard_or_false(site.q_len <= config.max_q_len)
    if site.unfit or not has_few_queries:
        # is_causal=True is how a short prompt looks too.
        is_prefill = not has_few_queries or site.unfit is Reason.IS_CAUSAL
        unfit = Reason.PREFILL if is_prefill else site.unfit
        assert unfit is not None
        operator = "" if has_few_queries else _prefill_operator(call, config)
        return Decision(call, Treatment.DENSE, unfit, operator, needs_summary=is_sparse)
    if not is_sparse:
        operator = "dense_decode" if _serves_dense_decode(key_cache.device.type) else ""
        return Decision(call, Treatment.DENSE, reason, operator)
    return Decision(
        call, Treatment.SPARSE, reason, "sparse_decode", needs_summary=True, budget=budget
    )


def _of_layer(
    layer: int | None, max_seq_len: int | torch.SymInt, config: QuestConfig
) -> tuple[Reason, LayerBudget]:
    """Whether a decode step of this layer is sparse, or why not, and its budget."""
    if layer is None and config.tells_layers_apart:
        return Reason.UNKNOWN_LAYER, LayerBudget(0, 0)
    layer = layer or 0
    budget, is_covered = _budget_of(layer, max_seq_len, config)
    if layer < config.num_dense_layers:
        return Reason.DENSE_LAYER, budget
    return Reason.BUDGET_COVERS_CACHE if is_covered else Reason.SPARSE, budget


def _budget_of(
    layer: int, max_seq_len: int | torch.SymInt, config: QuestConfig
) -> tuple[LayerBudget, bool]:
    """The layer's budget, and whether it covers the cache. A share of a cache whose length is
    symbolic makes that length a guard."""
    if not isinstance(max_seq_len, int):
        if isinstance(config.budget_of(layer), int):
            return config.layer_budget(layer, 1), False
        max_seq_len = int(max_seq_len)
    budget = config.layer_budget(layer, max_seq_len)
    return budget, budget.covers(config.page_format.num_pages(max_seq_len))
