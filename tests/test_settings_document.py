"""docs/settings.md is what the code says; ``python tests/test_settings_document.py`` writes it."""

import dataclasses
import inspect
import re
from pathlib import Path

from quest_compile import QuestConfig
from quest_compile.choices import PRESETS
from quest_compile.ops import Selection, SummaryFormat

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
BEGIN, END = "<!-- generated from QuestConfig -->\n", "<!-- end -->\n"


def meanings():
    """Name -> text of the class's docstring."""
    arguments = inspect.getdoc(QuestConfig).partition("Args:\n")[2].partition("\n\nRaises:")[0]
    parts = re.split(r"^    (\w+): ", arguments, flags=re.MULTILINE)[1:]
    return {
        name: " ".join(text.split()).replace("``", "`")
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def value(x):
    return f'`"{x}"`' if isinstance(x, str) else f"`{x}`"


def generated():
    meaning = meanings()
    of_operators = {*Selection.names(), *SummaryFormat.names()}
    lines = ["| setting | default | |", "|---|---|---|"]
    for field in dataclasses.fields(QuestConfig):
        name = f"`{field.name}`" + (" *" if field.name in of_operators else "")
        lines.append(f"| {name} | {value(field.default)} | {meaning[field.name]} |")
    lines += ["", "| preset | sets |", "|---|---|"]
    for name, settings in PRESETS.items():
        given = ", ".join(f"`{key}={x!r}`".replace("'", '"') for key, x in settings.items())
        lines.append(f'| `preset="{name}"` | {given} |')
    return "\n".join(lines) + "\n"


def with_tables(text):
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + generated() + END + rest.partition(END)[2]


def test_every_setting_is_explained():
    assert list(meanings()) == [field.name for field in dataclasses.fields(QuestConfig)]


def test_the_document_is_what_the_code_says():
    text = DOCUMENT.read_text("utf-8")
    assert with_tables(text) == text


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8")), "utf-8")
