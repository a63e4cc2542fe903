"""Page scores that are kept from step to step, and the launcher of decide_reuse."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from quest_compile.ops.triton import reuse as kernels
from quest_compile.ops.triton.launch import on_device, power_of_two
from quest_compile.ops.triton.launch_scoring import Update


@dataclasses.dataclass(frozen=True)
class StoredScores:
    """float32 [B, S, num_pages] and int64 [2], both written; and the settings of the step."""

    page_scores: Tensor
    scored_at: Tensor
    select_every: int
    seq_lens: Tensor
    budget_tokens: int

    def end_run(self) -> None:
        """A step that scores nothing, or for several queries."""
        self.scored_at[:1].fill_(-1)
        self.scored_at[1:].copy_(self.seq_lens)

    def decide(self, update: Update, heads: Tensor, *, is_scaled: bool) -> Tensor:
        """int32 [1]: is nothing to be scored? ``heads``: int32 [B, K], as decide_reuse takes it."""
        is_reused = torch.empty(1, dtype=torch.int32, device=heads.device)
        with on_device(heads):
            kernels.decide_reuse[(1,)](
                update.first, update.num_sealed, heads, self.seq_lens, self.scored_at, is_reused,
                heads.numel(), self.budget_tokens, update.key_cache.shape[2], self.select_every,
                HAS_NEXT=update.num_sealed.shape[0] == 2, IS_SCALED=is_scaled,
                PAGE_SIZE=update.page_size, HEADS_PAD=power_of_two(heads.numel()),
            )  # fmt: skip
        return is_reused
