"""Decide for every attention call what becomes of it. Changes nothing in the graph."""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from quest_compile.config import QuestConfig
from quest_compile.passes.graph import example_value
from quest_compile.passes.match_attention import AttentionCall
from quest_compile.passes.reasons import Reason

# Where quest::dense_decode is faster than scaled_dot_product_attention.
_DENSE_DECODE_DEVICES = frozenset({"cpu"})


class Treatment(enum.Enum):
    """What an attention call attends after the rewrite."""

    SPARSE = "sparse"
    DENSE = "dense"
    UNTOUCHED = "untouched"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one attention call.

    ``uses_dense_decode``: a dense call that runs quest::dense_decode instead of SDPA.
    ``needs_summary``: the page summaries of its key cache must be kept up to date in this graph.
    """

    call: AttentionCall
    treatment: Treatment
    reason: Reason
    uses_dense_decode: bool = False
    needs_summary: bool = False

    @property
    def is_rewritten(self) -> bool:
        return self.treatment is Treatment.SPARSE or self.uses_dense_decode or self.needs_summary


def decide(calls: list[AttentionCall], config: QuestConfig) -> list[Decision]:
    """One decision per call, in order."""
    return [_decide(call, config) for call in calls]


def _decide(call: AttentionCall, config: QuestConfig) -> Decision:
    site = call.site
    if site is None:
        assert call.reason is not None
        return Decision(call, Treatment.UNTOUCHED, call.reason)
    key_cache: torch.Tensor = example_value(site.key_cache)
    max_seq_len = key_cache.shape[2]
    is_covered = (
        isinstance(max_seq_len, int) and max_seq_len <= config.page_budget * config.page_size
    )
    is_dense_layer = call.layer < config.num_dense_layers
    # A symbolic q_len becomes a guard: one graph for few queries, one for many.
    has_few_queries = guard_or_false(site.q_len <= config.max_q_len)
    if site.unfit or not has_few_queries:
        needs_summary = not (is_dense_layer or is_covered)
        # is_causal=True is how a short prompt looks too.
        is_prefill = not has_few_queries or site.unfit is Reason.IS_CAUSAL
        reason = Reason.PREFILL if is_prefill else site.unfit
        return Decision(call, Treatment.DENSE, reason, needs_summary=needs_summary)
    if is_dense_layer or is_covered:
        reason = Reason.DENSE_LAYER if is_dense_layer else Reason.BUDGET_COVERS_CACHE
        uses_dense_decode = key_cache.device.type in _DENSE_DECODE_DEVICES
        return Decision(call, Treatment.DENSE, reason, uses_dense_decode=uses_dense_decode)
    return Decision(call, Treatment.SPARSE, Reason.SPARSE, needs_summary=True)
