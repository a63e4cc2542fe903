"""FX passes that substitute Quest attention for scaled-dot-product attention."""

from quest_compile.passes.decide import Decision, Treatment
from quest_compile.passes.match_attention import AttentionCall, AttentionSite
from quest_compile.passes.pipeline import Rewrite, run_passes
from quest_compile.passes.reasons import LinearReason, Reason
from quest_compile.passes.replace_linear import LinearLayers

__all__ = [
    "AttentionCall",
    "AttentionSite",
    "Decision",
    "LinearLayers",
    "LinearReason",
    "Reason",
    "Rewrite",
    "Treatment",
    "run_passes",
]
