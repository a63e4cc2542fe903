"""Progress of commands: a bar on a terminal, elsewhere lines; nothing for what is soon over."""

import io

from quest_compile import progress


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, *title, **options):
    monkeypatch.setattr("sys.stderr", stream)
    with progress.progress_bar(3, "cell", *title, **options) as bar:
        for name in "abc":
            bar.doing(name)
            bar.update()
    return stream.getvalue()


def test_without_a_terminal_what_is_soon_over_shows_nothing(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""


def test_without_a_terminal_there_are_lines(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BEFORE", 0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    lines = shown(monkeypatch, io.StringIO()).splitlines()
    assert [line[:6] for line in lines[1:4]] == ["a:  33", "b:  67", "c: 100"]
    assert "\r" not in "".join(lines)


def test_a_terminal_has_one_line_that_changes(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BEFORE", 0)
    text = shown(monkeypatch, _Terminal())
    assert "c: " in text
    assert text.count("\n") == 1


def test_what_goes_on_stands_behind_a_title(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BEFORE", 0)
    assert "bench: c: 100%" in shown(monkeypatch, _Terminal(), "bench")


def test_not_shown(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BEFORE", 0)
    assert shown(monkeypatch, io.StringIO(), is_shown=False) == ""
