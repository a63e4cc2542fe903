"""Quest decoding (arXiv 2406.10774) for unmodified models, as a torch.compile backend."""

from quest_compile.start import is_waiting

if not is_waiting():
    from quest_compile import ops
    from quest_compile.backend import QuestBackend, QuestStrictError, backend, report
    from quest_compile.config import QuestConfig
    from quest_compile.explain import explain
    from quest_compile.generate import compile_for_generate, restore
    from quest_compile.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "QuestBackend",
    "QuestConfig",
    "QuestStrictError",
    "backend",
    "compile_for_generate",
    "explain",
    "ops",
    "report",
    "restore",
    "warmup",
]
