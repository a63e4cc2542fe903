"""The totals of quest::audit: made with the first call of a graph, read by the report."""

from __future__ import annotations

from quest_compile import ops
from quest_compile.added_inputs import AddedInputs

AUDIT_COLUMNS = ("audited", "kept mass", "output error", "page recall")


def audit_cells(audit: ops.Audit | None) -> tuple[str, ...]:
    """Columns of the report: audited calls and means; "-" where no query was beyond the budget."""
    if audit is None:
        return ("-",) * len(AUDIT_COLUMNS)
    means = (audit.kept_mass, audit.output_error, audit.page_recall)
    return (str(audit.audited_calls), *("-" if x is None else f"{x:.4f}" for x in means))


class GraphAudits(AddedInputs):
    """Totals of the sparse calls of one graph, in their order."""

    def read(self) -> list[ops.Audit]:
        """Waits for the device."""
        return [ops.read_audit(each) for each in self.values()]
