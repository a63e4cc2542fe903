"""The table of docs/families.md says what the reports on record say."""

import json
import pathlib
import re

TESTS = pathlib.Path(__file__).parent
SNAPSHOTS = sorted((TESTS / "snapshots").glob("*.json"))
# First words of a row -> what the calls of its families have become.
ROWS = {
    "sparse": {"SPARSE"},
    "sparse where attention is full": {"SPARSE", "UNKNOWN_CACHE_WRITE"},
    "untouched: sliding windows": {"UNKNOWN_CACHE_WRITE"},
    "untouched: computed from the cache": {"COMPUTED_FROM_CACHE"},
    "untouched: the mask": {"MASK_DTYPE"},
    "no SDPA": set(),
}


def table():
    """First column -> families."""
    text = (TESTS.parent / "docs" / "families.md").read_text("utf-8")
    lines = re.findall(r"^\| ([^|]+) \| ([a-z0-9_, ]+) \|$", text, re.MULTILINE)
    rows = {}
    for row in ROWS:
        (rows[row],) = [
            sorted(families.split(", ")) for cell, families in lines if cell.split(" (")[0] == row
        ]
    return rows


def test_every_supported_transformers_5_has_a_record():
    assert [path.stem for path in SNAPSHOTS] == ["5.17.0", "5.23.0"]


def test_the_table_says_what_is_on_record():
    """A family that differs between versions is in two rows."""
    expected = {row: set() for row in ROWS}
    for snapshot in SNAPSHOTS:
        for family, record in json.loads(snapshot.read_text()).items():
            reasons = {call.split()[2] for graph in record["graphs"] for call in graph}
            (row,) = [row for row, those in ROWS.items() if those == reasons - {"DENSE_LAYER"}]
            expected[row].add(family)
    assert table() == {row: sorted(families) for row, families in expected.items()}
