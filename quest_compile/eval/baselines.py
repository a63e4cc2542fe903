"""What other methods keep of the cache, as plain torch: rules from logits to positions.

All see the same number of tokens as Quest, the newest page (its tokens so far) included, so that a
budget means the same for every method. Shapes: B batch 1, K KV heads, G query heads per KV head,
T positions of the cache, P pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from quest_compile import ops
from quest_compile.config import QuestConfig
from quest_compile.ops import Selection, reference

_NUM_SINKS = 4
# SnapKV, arXiv 2404.14469: queries at the end of the context vote, neighbours are kept together.
SNAP_WINDOW = 32
_SNAP_POOL = 5


@dataclasses.dataclass(frozen=True)
class Step:
    """One decode step in one layer.

    ``query`` [1, Q, 1, D]; ``key`` [1, K, T, D]; ``weights`` [1, K, G, T] of dense attention,
    0 behind ``seq_len``; ``context_len``: positions that were prefilled; ``h2o`` [K, T], ``snap``
    [K, G, T]: attention that the context gave its own positions, all queries or the last ones;
    ``scale`` of query.key.
    """

    query: Tensor
    key: Tensor
    weights: Tensor
    seq_len: int
    context_len: int
    h2o: Tensor | None
    snap: Tensor | None
    config: QuestConfig
    selection: Selection
    scale: float
    generator: torch.Generator

    @property
    def num_tokens(self) -> int:
        """Positions that a method may keep besides those of the newest page, or the new ones."""
        return max(1, (self.page_budget - 1) * self.config.page_size)

    @property
    def page_budget(self) -> int:
        return self.selection.budget // self.config.page_size

    @property
    def seq_lens(self) -> Tensor:
        return torch.tensor([self.seq_len], device=self.key.device)

    @property
    def fits(self) -> bool:
        """Does the budget hold all pages?"""
        arguments = (self.key.shape[2], self.selection, self.config.page_size)
        return bool(reference.fits_budget(self.seq_lens, *arguments))


Keep = Callable[[Step], Tensor]


def oracle(step: Step) -> Tensor:
    """The pages with the most attention, known only after dense attention: the most that any
    choice of pages for a whole group can keep."""
    return keep_best_pages(step, _in_pages(step.weights.sum(2), step.config.page_size).sum(-1))


def random_pages(step: Step) -> Tensor:
    shape = (*step.key.shape[:2], -(-step.key.shape[2] // step.config.page_size))
    return keep_best_pages(step, torch.rand(shape, generator=step.generator).to(step.key.device))


def streaming(step: Step) -> Tensor:
    """The first four positions and the last ones (StreamingLLM, arXiv 2309.17453)."""
    position = torch.arange(step.key.shape[2], device=step.key.device)
    newest_page = (step.seq_len - 1) // step.config.page_size * step.config.page_size
    keep = (position < _NUM_SINKS) | (position >= newest_page - step.num_tokens + _NUM_SINKS)
    return keep.expand(1, step.key.shape[1], -1)


def h2o(step: Step) -> Tensor:
    """Half of the budget for what the context attended most, half for its end
    (H2O, arXiv 2306.14048), decided once, after the prefill."""
    assert step.h2o is not None
    return _evicted(step, step.h2o, num_last=step.num_tokens // 2)


def snapkv(step: Step) -> Tensor:
    """What the last queries of the context attended most, and the end of the context.

    Neighbours are pooled per query head; what a group keeps is decided by the sum over its heads.
    """
    assert step.snap is not None
    pooled = torch.nn.functional.max_pool1d(step.snap, _SNAP_POOL, 1, _SNAP_POOL // 2)
    return _evicted(step, pooled.sum(1), num_last=min(SNAP_WINDOW, step.num_tokens // 2))


def quest_reference(step: Step) -> Tensor:
    """Quest in plain torch: what the operators have to agree with. [1, K or Q, T]"""
    seq_lens, page_format = step.seq_lens, step.config.page_format
    rows = ops.build_page_summary(step.key, seq_lens, **page_format.as_kwargs())
    arguments = (step.query, rows, seq_lens, None, step.selection, page_format, step.scale)
    _, chosen = reference.score_and_select(*arguments)
    chosen, num_pages = chosen.long(), rows.shape[2]
    keep = torch.zeros(*chosen.shape[:2], num_pages + 1, dtype=torch.bool, device=chosen.device)
    keep.scatter_(-1, torch.where(chosen < 0, num_pages, chosen), True)
    return _positions(keep[..., :num_pages], step)


KEEP: dict[str, Keep] = {
    "quest-reference": quest_reference,
    "oracle": oracle,
    "streaming": streaming,
    "random": random_pages,
    "h2o": h2o,
    "snapkv": snapkv,
}


def keep_best_pages(step: Step, scores: Tensor) -> Tensor:
    """The newest page and, by score [1, K, P], the best of the others up to the page budget."""
    newest = (step.seq_len - 1) // step.config.page_size
    scores = scores.float().clone()
    scores[..., newest + 1 :] = -torch.inf
    scores[..., newest] = torch.inf
    chosen = scores.topk(min(step.page_budget, newest + 1), -1).indices
    return _positions(torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True), step)


def _evicted(step: Step, scores: Tensor, num_last: int) -> Tensor:
    """The end of the context, the best of the rest, and all that came after the context."""
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    end = max(0, step.context_len - num_last)
    keep[:, end:] = True
    num_best = min(end, step.num_tokens - num_last)
    keep.scatter_(-1, scores[:, :end].topk(num_best, -1).indices, True)
    return keep[None]


def _in_pages(x: Tensor, page_size: int) -> Tensor:
    """[..., T] -> [..., P, page_size], filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % page_size)).unflatten(-1, (-1, page_size))


def _positions(keep_pages: Tensor, step: Step) -> Tensor:
    """[1, H, P] -> [1, H, T]"""
    return keep_pages.repeat_interleave(step.config.page_size, -1)[..., : step.key.shape[2]]
