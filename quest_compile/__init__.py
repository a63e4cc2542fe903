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


def __getattr__(name: str) -> object:
    """What needs transformers is imported when it is asked for."""
    if name == "OffloadedStaticCache":
        from quest_compile.offloaded_cache import OffloadedStaticCache

        return OffloadedStaticCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "OffloadedStaticCache",
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
