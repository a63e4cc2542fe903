"""Values of settings by name; nothing here needs torch, so that the command line can offer them."""

from __future__ import annotations

from typing import Any

INNER_COMPILERS = ("inductor", "aot_eager", "eager")
LINEAR = ("auto", "torch")
# What attends many queries at once; "auto": whichever is known to be faster.
PREFILLS = ("auto", "sdpa", "dense")
DTYPES = ("float32", "bfloat16", "float16")
# But for the open one, which has no score.
NO_FORCED_PAGES = {"num_sink_pages": 0, "num_recent_pages": 1}
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2406.10774: bounds, each query head for itself.
    "paper": {"summary": "minmax", "group_reduce": "none", **NO_FORCED_PAGES, "num_dense_layers": 2}
}
