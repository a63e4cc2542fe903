"""What was looked at as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch

from quest_compile.look.looked import Looked, LookedStep

TEMPLATE = Path(__file__).parent / "page.html"
_PLACE = "QUEST_COMPILE_DATA"


def write_html(looked: Looked, model_name: str, path: Path) -> None:
    # "<" ends no script where it cannot be seen.
    data = json.dumps(data_of(looked, model_name)).replace("<", "\\u003c")
    html = TEMPLATE.read_text(encoding="utf-8").replace(_PLACE, data)
    path.write_text(html, encoding="utf-8")


def data_of(looked: Looked, model_name: str) -> dict[str, Any]:
    """What the file holds, as its script reads it."""
    reading, config = looked.reading, looked.quest.config
    fed = [*looked.answer.question, *looked.answer.tokens]
    tokens = [*reading.tokens[0].tolist(), *fed]
    size = config.page_size
    decode = reading.tokenizer.decode
    pages = [decode(tokens[first : first + size]) for first in range(0, len(tokens), size)]
    layers = list(looked.steps[0].pages)
    return {
        "model": model_name,
        "settings": repr(looked.quest),
        "promptTokens": reading.length,
        "pageSize": size,
        "sinks": config.num_sink_pages,
        "recents": config.num_recent_pages,
        "pages": pages,
        "layers": layers,
        "heads": len(looked.steps[0].pages[layers[0]]),
        "asked": decode(looked.answer.question),
        "steps": [_step(step, len(pages)) for step in looked.steps],
        "dense": [decode([token]) for token in looked.dense.tokens] if looked.dense else None,
        "counters": looked.counters,
        "report": str(looked.quest.report()),
    }


def _step(step: LookedStep, num_pages: int) -> dict[str, Any]:
    """``read``: layer by layer, head by head, a bit per page, the lowest bit of a byte first."""
    return {
        "text": step.text,
        "seqLen": step.seq_len,
        "read": [[_bits(head, num_pages) for head in heads] for heads in step.pages.values()],
        "mass": [step.kept_mass.get(layer) for layer in step.pages],
    }


def _bits(pages: torch.Tensor, num_pages: int) -> str:
    marked = bytearray(-(-num_pages // 8))
    for page in pages.tolist():
        if page >= 0:
            marked[page // 8] |= 1 << page % 8
    return base64.b64encode(marked).decode()
