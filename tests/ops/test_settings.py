"""The names of settings, which stand in several types: all of them everywhere, in one order."""

from quest_compile.ops.settings import SUMMARIES as NAMES
from quest_compile.ops.settings import (
    SUMMED_SUMMARIES,
    ChoiceSettings,
    FormatSettings,
    Selection,
    SparseSettings,
    SummaryFormat,
)
from quest_compile.ops.summaries import SUMMARIES


def names_of(settings):
    return list(settings.__annotations__)


def test_what_chooses_pages_is_all_of_a_selection_but_the_budget_and_the_reduction():
    chosen = [name for name in Selection.names() if name not in ("budget", "group_reduce")]
    assert names_of(ChoiceSettings) == chosen
    given = {name: i + 1 for i, name in enumerate(chosen)} | {"budget_fraction": 0.5, "top_p": 0.25}
    in_pages = Selection(320, **given).in_pages(16)
    assert in_pages == {"page_budget": 20, "page_size": 16, **given}


def test_keyword_settings_are_the_fields():
    assert names_of(FormatSettings) == list(SummaryFormat.names())
    expected = {*Selection.names(), *SummaryFormat.names(), "scale"}
    assert set(SparseSettings.__annotations__) == expected


def test_every_kind_of_summary_has_its_name_and_takes_a_sum_or_does_not():
    assert tuple(SUMMARIES) == NAMES
    assert {*SUMMED_SUMMARIES} <= {*NAMES}
    assert not any(SUMMARIES[name].scores_tokens for name in SUMMED_SUMMARIES)
