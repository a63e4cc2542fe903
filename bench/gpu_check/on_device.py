"""Operators on a device for tensors on the CPU.

There they can be compared with the reference, which has other bits on CUDA tensors: torch's
division by a scalar multiplies by the rounded inverse there.
"""

from __future__ import annotations

from typing import Any

import torch

_WRITE_IN_PLACE = ("update_page_summary", "sparse_decode_step")


class OnDevice:
    """The operators of ``source``: arguments go to ``device``, results and what was written in
    place come back."""

    def __init__(self, source: Any, device: str) -> None:
        self._source, self._device = source, device

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._source, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            moved = [self._moved(x) for x in arguments]
            moved_settings = {key: self._moved(x) for key, x in settings.items()}
            out = operator(*moved, **moved_settings)
            if name in _WRITE_IN_PLACE:
                for mine, theirs in zip(arguments, moved, strict=True):
                    if mine is not theirs:
                        mine.copy_(theirs)
            if isinstance(out, tuple):
                return tuple(x.cpu() for x in out)
            return out if out is None else out.cpu()

        return call

    def _moved(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, torch.Tensor) else value
