"""quest-compile look: the HTML file says what the operators read, and a browser shows it."""

import base64
import json
import re

import pytest
import torch
from attended_pages import recorded_pages
from browser import run_in_browser
from test_cli import model_folder  # noqa: F401
from tiny_models import SHORT

import quest_compile
from quest_compile import cli
from quest_compile.look.html import data_of, write_html
from quest_compile.look.looked import look_at
from quest_compile.reading import read

TEXT = "To be, or not to be, that is the question. " * 12
ASKED = " <b>&amp;</script> they say?"
SETTINGS = {**SHORT, "budget": 64, "inner": "eager"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def reading(model_folder):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    return read(model, AutoTokenizer.from_pretrained(model_folder), TEXT, 64)


def bits_of(text, num_pages):
    marked = base64.b64decode(text)
    return [page for page in range(num_pages) if marked[page // 8] >> page % 8 & 1]


def looked(reading, asked=" Whether", **settings):
    quest = quest_compile.backend(**SETTINGS, record=True, **settings)
    return look_at(reading, quest, reading.encode(asked), 5)


def test_the_pages_in_the_file_are_those_that_were_attended(reading):
    data = data_of(looked(reading, "W"), "tiny")
    torch._dynamo.reset()
    # Asked again without recording, the pages seen in the output of quest::sparse_decode.
    with recorded_pages() as attended:
        plain = look_again(reading)
    assert [step["text"] for step in data["steps"]] == plain
    calls = [heads for step in data["steps"] for heads in step["read"]]
    assert len(calls) == len(attended) == 2 * 5
    for heads, seen in zip(calls, attended):
        per_head = len(seen) // len(heads)
        for number, of_head in enumerate(seen):
            assert bits_of(heads[number // per_head], len(data["pages"])) == (
                of_head.nonzero()[:, 0].tolist()
            )


def look_again(reading):
    from quest_compile.reading import answer

    step = torch.compile(reading.model, backend=quest_compile.backend(**SETTINGS))
    made = answer(step, reading, reading.encode("W"), max_new_tokens=5)
    return [reading.tokenizer.decode([token]) for token in made.tokens]


def test_the_pages_in_the_file_are_as_many_tokens_as_were_counted(reading):
    data = data_of(looked(reading, "W"), "tiny")
    num_tokens = 0
    for step in data["steps"]:
        for heads in step["read"]:
            for head in heads:
                pages = bits_of(head, len(data["pages"]))
                num_tokens += sum(min(16, step["seqLen"] - 16 * page) for page in pages)
    # Two query heads share a selection.
    assert 2 * num_tokens == data["counters"]["tokens_attended"] > 0
    assert "".join(data["pages"]).startswith(TEXT + "W")


def test_mass_is_that_of_the_one_step(reading):
    """It is read from sums over all steps."""
    found = looked(reading, "W", audit=1)
    (graph,) = found.quest.report().graphs
    for row, audit in graph.audited_rows()[2:]:
        masses = [step.kept_mass[row.layer] for step in found.steps]
        assert len(set(masses)) == len(masses) == audit.audited_calls
        assert sum(masses) / len(masses) == pytest.approx(audit.kept_mass)
    assert looked(reading).steps[0].kept_mass == {}


def test_nothing_sparse_is_an_error_with_the_report(reading):
    quest = quest_compile.backend(**SETTINGS | {"budget": 2048}, record=True)
    with pytest.raises(ValueError, match="no layer was sparse(.|\n)*0 sparse"):
        look_at(reading, quest, reading.encode("W"), 2)


def test_a_browser_shows_another_picture_for_another_token(reading, tmp_path):
    # The second token of the answer begins a page.
    found = looked(reading, ASKED)
    assert found.steps[0].seq_len % 16 == 0
    found.dense = found.answer
    write_html(found, "tiny <i>", tmp_path / "look.html")
    shown = run_in_browser(
        tmp_path / "look.html",
        """
        const all = selector => [...document.querySelectorAll(selector)];
        const text = id => document.getElementById(id).textContent;
        const counts = () => all("#strip button").map(cell => +cell.dataset.count);
        const first = counts(), sum = text("sum");
        all("#answer button")[3].click();
        all("#strip button")[2].focus();
        const page = text("text"), find = document.getElementById("find");
        find.value = "QUESTION. to be";
        find.dispatchEvent(new Event("input"));
        return {first, sum, fourth: counts(), sumOfFourth: text("sum"), page, asked: text("asked"),
                foundPages: all("#strip .found").length, forced: all("#strip .forced").length};
        """,
    )
    data = data_of(found, "tiny")
    for name, step in (("first", data["steps"][0]), ("fourth", data["steps"][3])):
        heads = [bits_of(head, len(data["pages"])) for heads in step["read"] for head in heads]
        assert shown[name] == [
            sum(page in head for head in heads) for page in range(len(data["pages"]))
        ]
    assert shown["first"] != shown["fourth"] and shown["sum"] != shown["sumOfFourth"]
    assert shown["page"] == TEXT[32:48]
    assert shown["asked"] == ASKED
    assert shown["foundPages"] >= 11 and shown["forced"] == 3


@pytest.mark.parametrize(
    "fault", ["console.error('x')", "throw Error('x')", "Promise.reject(Error('x'))"]
)
def test_a_fault_of_a_page_is_one_of_its_test(fault, tmp_path):
    for name, script in (("good", ""), ("bad", fault)):
        page = tmp_path / f"{name}.html"
        page.write_text(f"<!doctype html><meta charset='utf-8'><body><script>{script}</script>")
    assert run_in_browser(tmp_path / "good.html", "return 7") == 7
    with pytest.raises(AssertionError, match="CONSOLE"):
        run_in_browser(tmp_path / "bad.html", "return 7")


def test_the_command_writes_a_file_that_needs_nothing_else(model_folder, tmp_path, capsys):  # noqa: F811
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    files = ["--prompt-file", str(tmp_path / "book.txt"), "--output", str(tmp_path / "x.html")]
    asked = ["--ask", " Whether", "--budget", "64", "--max-new-tokens", "4", "--dense"]
    assert cli.main(["look", "--model", str(model_folder), *files, *asked, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    most = found["counters"]["max_tokens_attended"]
    # Four pages, of which the last is not full yet.
    assert 48 < most <= 64
    said = f"4 tokens, 2 sparse layers; 22 sparse attention calls, at most {most} tokens per query"
    assert f"{said} of {len(TEXT)}." in err
    assert (found["file"], found["answer_tokens"]) == (str(tmp_path / "x.html"), 4)
    assert (found["sparse_layers"], found["context_tokens"]) == ([2, 3], len(TEXT))
    assert found["counters"]["sparse_calls"] == 22 and found["dense_answer"] is not None
    html = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href|@import|url)\s*[=(]", html) and "http" not in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert len(data["steps"]) == len(data["dense"]) == 4
