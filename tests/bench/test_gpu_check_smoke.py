"""What gpu-check compares with plain torch on small inputs: wrong operators are found."""

import sys

import pytest

from quest_compile import ops
from quest_compile.bench.gpu_check import smoke as subject
from quest_compile.bench.gpu_check.smoke import smoke
from quest_compile.ops import reference


@pytest.mark.parametrize("name", ["score_pages", "select_pages", "update_page_summary"])
def test_smoke_finds_a_wrong_operator(name):
    class Wrong:
        def __getattr__(self, operator):
            if operator == name and name == "update_page_summary":
                return lambda *arguments, **settings: None
            if operator == name:
                return lambda *a, **s: getattr(ops, name)(*a, **s).roll(1, -1)
            return getattr(ops, operator)

    rows = {row["operator"]: row["ok"] for row in smoke("cpu", {"wrong": Wrong()})}
    assert rows["attend_pages"]
    for setting in ("", ", minmax", ", 1 bit, none"):
        assert not rows[f"{name}{setting}"]


@pytest.mark.parametrize(
    ("operator", "setting", "value"),
    [
        ("select_pages", "top_p", 1.0),
        ("sparse_decode", "top_p", 1.0),
        ("select_pages", "budget_fraction", 1.0),
        ("sparse_decode", "budget_fraction", 1.0),
    ],
)
def test_smoke_finds_a_way_to_select_that_is_not_heeded(operator, setting, value):
    class Deaf:
        def __getattr__(self, name):
            def call(*arguments, **settings):
                if name == operator and setting in settings:
                    settings[setting] = value
                return getattr(ops, name)(*arguments, **settings)

            return call

    wrong = {row["operator"] for row in smoke("cpu", {"deaf": Deaf()}) if not row["ok"]}
    assert f"{operator}, {setting}" in wrong
    assert all(name.startswith(operator) and name.endswith(setting) for name in wrong)


def test_smoke_runs_the_kernels_that_are_asked_for(monkeypatch):
    class Refused:
        def __getattr__(self, name):
            raise AssertionError(name)

    monkeypatch.setattr(subject, "sources_of", lambda d: {"native": ops, "triton": Refused()})
    monkeypatch.setattr(sys, "argv", ["smoke", "cpu", "native"])
    assert subject.main() == 0
    monkeypatch.setattr(sys, "argv", ["smoke", "cpu"])
    with pytest.raises(AssertionError):
        subject.main()


def test_reference_can_be_checked_against_itself():
    class Reference:
        def __getattr__(self, operator):
            def call(*arguments, **settings):
                out = getattr(reference, operator)(*arguments, **settings)
                return out[0] if operator.startswith("sparse") else out

            return call

    assert all(row["relative_error"] == 0 for row in smoke("cpu", {"reference": Reference()}))
