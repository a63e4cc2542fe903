"""Run the passes on the graph Dynamo hands to the backend: match, decide, add, replace."""

from __future__ import annotations

import dataclasses
import logging
import time

import torch
from torch import fx

from quest_compile.config import QuestConfig
from quest_compile.passes.add_audits import add_audits
from quest_compile.passes.add_page_summaries import SummaryInputs, add_page_summaries
from quest_compile.passes.add_recordings import add_recordings
from quest_compile.passes.decide import Decision, decide
from quest_compile.passes.graph import copy_graph, example_value, module_of
from quest_compile.passes.mark_static_caches import mark_static_caches
from quest_compile.passes.match_attention import match_attention
from quest_compile.passes.replace_attention import replace_attention
from quest_compile.passes.replace_linear import LinearLayers, replace_linear

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A rewritten graph: ``gm`` takes the inputs of the original, then the state of ``summaries``,
    then the totals of ``audits`` and the pages of ``recordings``, one each per sparse call.

    ``gm`` is the original object when nothing was rewritten.
    """

    gm: fx.GraphModule
    decisions: list[Decision]
    summaries: list[SummaryInputs]
    seconds: float
    audits: list[fx.Node] = dataclasses.field(default_factory=list)
    recordings: list[fx.Node] = dataclasses.field(default_factory=list)
    linear: LinearLayers = LinearLayers()

    def state_values(self) -> list[torch.Tensor]:
        """Fakes of the added inputs, in their order."""
        nodes = [node for inputs in self.summaries for node in inputs.nodes]
        return [example_value(node) for node in (*nodes, *self.audits, *self.recordings)]

    def audit_values(self) -> list[torch.Tensor]:
        """Fakes of the totals."""
        return [example_value(node) for node in self.audits]

    def recording_values(self) -> list[torch.Tensor]:
        """Fakes of the recorded pages."""
        return [example_value(node) for node in self.recordings]


def run_passes(gm: fx.GraphModule, *, config: QuestConfig) -> Rewrite:
    """Give attention over static caches in ``gm`` Quest decoding, and linear layers of few rows
    their operator; ``gm`` itself is not edited."""
    start = time.perf_counter()
    graph = copy_graph(gm)
    calls = match_attention(graph, prefill=config.prefill != "sdpa")
    decisions = decide(calls, config)
    summaries: list[SummaryInputs] = []
    audits: list[fx.Node] = []
    recordings: list[fx.Node] = []
    linear = replace_linear(graph, config=config)
    is_rewritten = linear.num_replaced > 0
    if any(decision.is_rewritten for decision in decisions):
        summaries = add_page_summaries(graph, decisions, config=config)
        replace_attention(graph, decisions, summaries, config=config)
        if config.audit:
            audits = add_audits(graph, config=config)
        if config.record:
            recordings = add_recordings(graph, config=config)
        mark_static_caches(decisions)
        is_rewritten = True
    rewritten = gm
    if is_rewritten:
        graph.lint()
        rewritten = module_of(graph, gm)
    seconds = time.perf_counter() - start
    log.debug(
        "%d attention calls, %d page summaries, %.3f s", len(decisions), len(summaries), seconds
    )
    return Rewrite(rewritten, decisions, summaries, seconds, audits, recordings, linear)
