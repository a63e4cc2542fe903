"""How many tokens a model was made for."""

from __future__ import annotations

from typing import Any


def context_length(config: Any) -> int | None:
    """Tokens of prompt and answer together; None where the config sets no limit.

    Rotary factors that stretch the original length count (YaRN): with them
    ``max_position_embeddings`` often stays what it was.
    """
    config = config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None) or 0
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = rope.get("original_max_position_embeddings") or 0
    most = max(most, int(original * (rope.get("factor") or 0)))
    return most if most > 0 else None
