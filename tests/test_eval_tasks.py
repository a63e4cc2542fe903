"""Samples: what is hidden is in the context, what is asked is what was hidden, lengths hold."""

import random

import pytest
import torch
from word_encoder import WordEncoder

from quest_compile.eval import metrics
from quest_compile.eval.copy_tasks import NOT_SCORED, PASSAGE, copy_group, text_of
from quest_compile.eval.generators import TEXT_TASKS
from quest_compile.eval.needles import read_sentences
from quest_compile.eval.recall_tasks import recall_group
from quest_compile.eval.tasks import answer_group, text_group

BOOK = [f"Sentence {i} of the book says that {i} follows {i - 1}." for i in range(1, 400)]


@pytest.mark.parametrize("name", TEXT_TASKS)
class TestGenerators:
    def sample(self, name, size=80, number=0, seed=0):
        return TEXT_TASKS[name].generate(size, number, random.Random(seed), BOOK)

    def test_the_answers_are_in_the_context(self, name):
        sample = self.sample(name)
        for _, _, answers in sample.questions:
            assert metrics.string_match_all(sample.context, answers) == 1
            assert len(set(answers)) == len(answers)

    def test_the_question_does_not_give_the_answer_away(self, name):
        for question, prefix, answers in self.sample(name).questions:
            assert metrics.string_match_part(question + prefix, answers) == 0

    def test_same_seed_same_sample(self, name):
        assert self.sample(name) == self.sample(name)
        assert self.sample(name) != self.sample(name, seed=1)

    def test_contexts_fill_the_length_without_exceeding_it(self, name):
        length = 8000 if name == "cwe" else 3000
        group = answer_group(name, length, 5, WordEncoder(), BOOK, seed=0)
        for number in range(group.num_contexts):
            assert 0.9 * length <= group.make(number).num_tokens <= length
        assert torch.equal(group.make(1).tokens, group.make(1).tokens)

    def test_a_length_without_room_for_the_task_is_an_error(self, name):
        with pytest.raises(ValueError, match=f"task {name} does not fit into --lengths 40"):
            answer_group(name, 40, 5, WordEncoder(), BOOK, seed=0)

    def test_there_are_as_many_questions_as_asked_for(self, name):
        group = answer_group(name, 8000, 10, WordEncoder(), BOOK, seed=0)
        asked = sum(len(group.make(i).questions) for i in range(group.num_contexts))
        assert 10 <= asked < 10 + TEXT_TASKS[name].num_questions


def test_passkeys_lie_at_all_depths():
    samples = [TEXT_TASKS["passkey"].generate(100, i, random.Random(i), ()) for i in range(20)]
    depths = sorted(s.context.index("The pass key") / len(s.context) for s in samples)
    assert depths[0] < 0.1
    assert depths[-1] > 0.9
    assert max(b - a for a, b in zip(depths, depths[1:])) < 0.15


def test_common_words_are_the_most_common():
    sample = TEXT_TASKS["cwe"].generate(500, 0, random.Random(0), ())
    listed = sample.context.split("\n")[1].split()[1::2]
    counts = {word: listed.count(word) for word in set(listed)}
    (_, _, answers) = sample.questions[0]
    assert set(answers) == {word for word, count in counts.items() if count == 30}
    assert set(counts.values()) == {3, 30}
    assert len(answers) == 10


def test_frequent_words_are_the_most_frequent():
    sample = TEXT_TASKS["fwe"].generate(2000, 0, random.Random(0), ())
    words = sample.context.split("\n")[1].split()
    by_count = sorted(set(words), key=words.count, reverse=True)
    assert tuple(by_count[:3]) == sample.questions[0][2]
    assert words.count(by_count[2]) > words.count(by_count[3])


def test_variables_are_assigned_before_they_are_handed_on():
    sample = TEXT_TASKS["vt"].generate(50, 0, random.Random(3), ())
    places = [sample.context.index(f"VAR {name} =") for name in sample.questions[0][2]]
    assert places == sorted(places)


def test_a_book_is_needed_where_a_book_is_the_haystack():
    with pytest.raises(ValueError, match="give one with --haystack"):
        answer_group("niah_single_2", 2000, 5, WordEncoder(), [], seed=0)


def test_sentences_of_a_book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Call me Ishmael. Some years\nago!  Never mind how long? " * 10)
    assert read_sentences(path)[:3] == [
        "Call me Ishmael.",
        "Some years ago!",
        "Never mind how long?",
    ]
    path.write_text("no sentences")
    with pytest.raises(ValueError, match="has 1 sentences"):
        read_sentences(path)


def test_windows_of_a_text_end_with_what_is_decoded(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(1000)))
    encoder = WordEncoder()
    group = text_group("perplexity", path, 200, 3, 16, encoder)
    first, last = group.make(0), group.make(2)
    (question,) = first.questions
    words = encoder.decode([*first.tokens.tolist(), *question.tokens, question.expected[-1]])
    assert words.split() == [f"w{i}" for i in range(199)]
    assert question.tokens[1:] == question.expected[:-1]
    assert len(question.tokens) == 16
    assert encoder.decode(last.questions[0].expected).split()[-1] == "w998"
    with pytest.raises(ValueError, match="has 1000 tokens, too few for --lengths 1001"):
        text_group("perplexity", path, 1001, 3, 16, encoder)
    with pytest.raises(ValueError, match="must be more than the 16 decoded tokens"):
        text_group("perplexity", path, 17, 3, 16, encoder)


WORDS = " ".join(f"w{i}" for i in range(5000))


class TestCopy:
    def group(self, name, samples=6, length=2048):
        return copy_group(name, WORDS, length, samples, WordEncoder())

    @pytest.mark.parametrize("name", ["copy", "copy-multi"])
    def test_what_is_read_stands_in_the_context_and_is_scored_when_the_place_is_known(self, name):
        group = self.group(name)
        for number in range(group.num_contexts):
            context = group.make(number)
            tokens = context.tokens.tolist()
            assert context.num_tokens < group.max_seq_len == 2048
            for question in context.questions:
                assert set(question.tokens) < set(tokens)
                assert len(question.tokens) == PASSAGE - 1
                assert question.expected[:-1] == question.tokens[NOT_SCORED:]
                assert len(question.expected) == PASSAGE - NOT_SCORED

    def test_passages_begin_at_a_tenth_half_and_four_fifths_of_the_context(self):
        context = self.group("copy").make(1)
        tokens = context.tokens.tolist()
        places = [tokens.index(q.tokens[0]) for q in context.questions]
        assert places == [185, 928, 1484]
        for place, question in zip(places, context.questions):
            assert tokens[place : place + PASSAGE] == [*question.tokens, question.expected[-1]]

    def test_copy_multi_goes_on_where_each_passage_stopped(self):
        context = self.group("copy-multi").make(0)
        (question,) = context.questions
        read = [*question.tokens, question.expected[-1]]
        places = [context.tokens.tolist().index(token) for token in read]
        starts = [185, 928, 1484, 185 + 32, 928 + 32, 1484 + 32]
        assert places == [start + i for start in starts for i in range(32)]

    def test_contexts_come_from_all_over_the_text_and_stay_when_there_are_more(self):
        firsts = [self.group("copy", 24).make(i).tokens[1].item() for i in range(8)]
        assert min(firsts) < 100 and max(firsts) > 2600
        assert len(set(firsts)) == 8
        assert firsts[:2] == [self.group("copy").make(i).tokens[1].item() for i in range(2)]

    def test_there_are_as_many_passages_as_asked_for(self):
        assert [self.group("copy", n).num_contexts for n in (1, 3, 4)] == [1, 1, 2]
        assert [self.group("copy-multi", n).num_contexts for n in (1, 3, 4)] == [1, 3, 4]

    def test_lengths_that_do_not_fit_are_errors(self):
        with pytest.raises(ValueError, match="copy needs --lengths of at least 1152, got 1151"):
            self.group("copy", length=1151)
        with pytest.raises(ValueError, match="the text has 5000 tokens, too few for --lengths 6"):
            self.group("copy", length=6000)
        assert self.group("copy", length=1152).make(0).num_tokens == 1151

    def test_without_a_file_the_text_is_what_python_says_about_itself(self, tmp_path):
        text = text_of(None)
        assert len(text) > 300_000 and text == text_of(None)
        assert "Assignment statements" in text
        path = tmp_path / "text.txt"
        path.write_text("mine", encoding="utf-8")
        assert text_of(path) == "mine"


@pytest.mark.parametrize(
    ("name", "vocab_size", "message"),
    [
        ("recall-16", 32000, "is for the recall model"),
        ("recall-0", 512, "with N records from 1 to 12"),
        ("recall-13", 512, "with N records from 1 to 12"),
        ("recall-x", 512, "with N records from 1 to 12"),
    ],
)
def test_recall_that_does_not_fit_is_an_error(name, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        recall_group(name, 100, 10, vocab_size, seed=0)


@pytest.mark.parametrize(
    ("metric", "text", "answers", "expected"),
    [
        ("string_match_all", "It is 12 and BLUE.", ("12", "blue"), 1),
        ("string_match_all", "It is 12.", ("12", "blue"), 0.5),
        ("string_match_part", "It is 12.", ("12", "blue"), 1),
        ("string_match_part", "", ("12",), 0),
        ("first_number", " is 123. 456", ("123",), 1),
        ("first_number", " is 456 or 123", ("123",), 0),
        ("first_number", " is 1234", ("123",), 0),
        ("first_number", "none", ("123",), 0),
        ("qa_f1", "The red, fox", ("a red fox",), 1),
        ("qa_f1", "red", ("red fox", "fox"), 2 / 3),
        ("qa_f1", "", ("fox",), 0),
        ("rouge_l", "cat sat mat", ("cat lay mat",), 2 / 3),
        ("rouge_l", "mat cat", ("cat mat",), 0.5),
    ],
)
def test_metrics(metric, text, answers, expected):
    assert metrics.METRICS[metric](text, answers) == pytest.approx(expected)
