"""The totals of quest::audit: made with the first call of a graph, read by the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quest_compile import ops

AUDIT_COLUMNS = ("audited", "kept mass", "output error", "page recall")


def audit_cells(audit: ops.Audit | None) -> tuple[str, ...]:
    """Columns of the report: audited calls and means; "-" where no query was beyond the budget."""
    if audit is None:
        return ("-",) * len(AUDIT_COLUMNS)
    means = (audit.kept_mass, audit.output_error, audit.page_recall)
    return (str(audit.audited_calls), *("-" if x is None else f"{x:.4f}" for x in means))


class GraphAudits:
    """Totals of the sparse calls of one graph, in their order; ``devices``: of these calls."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._devices = devices
        self._totals: list[torch.Tensor] = []

    def append_to(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Call ``compiled`` with the totals behind its other arguments."""

        def step(*args: Any) -> Any:
            if not self._totals:
                # Outside inference mode, so that they may be written in either mode later.
                with torch.inference_mode(False), torch.no_grad():
                    self._totals = [ops.new_audit_totals(device) for device in self._devices]
            return compiled(*args, *self._totals)

        return step

    def read(self) -> list[ops.Audit]:
        """Waits for the device."""
        totals = self._totals or [ops.new_audit_totals(torch.device("cpu")) for _ in self._devices]
        return [ops.read_audit(each) for each in totals]
