"""docs/limits.md explains every reason of the report, and no other; links of the documents."""

import re
from pathlib import Path

import pytest

from quest_compile.passes import LinearReason, Reason

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = (*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("*/README.md"))
ROWS = re.findall(
    r"^\| `([A-Z_]+)`: (.+?) \| (.+?) \|(.*)\|$",
    (DOCS / "limits.md").read_text("utf-8"),
    re.MULTILINE,
)


def test_every_reason_is_explained_once_and_no_other():
    assert sorted(name for name, *_ in ROWS) == sorted(reason.name for reason in Reason)


@pytest.mark.parametrize(("name", "text", "cause", "advice"), ROWS)
def test_an_explanation_begins_with_what_the_report_prints_and_says_more(name, text, cause, advice):
    assert text == Reason[name].value
    assert len(cause) > 20
    assert cause != text


def test_every_reason_to_leave_a_linear_layer_is_explained():
    text = (DOCS / "limits.md").read_text("utf-8")
    section = text.partition("## Linear layers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .{20,} \|$", section, re.MULTILINE)
    assert rows == [reason.value for reason in LinearReason]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
        assert link.startswith("https://") or (document.parent / link).exists(), link
