"""The record-recall task and the shipped model that answers it."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from quest_compile.recall import load_model, make_context, model_path
from quest_compile.recall.task import (
    BOS,
    FILLER,
    KEYS,
    QUESTION,
    RECORD,
    RECORD_LEN,
    VALUES,
    max_records,
)


def records_in(tokens):
    """Every record of a context as {(k1, k2): (v1, v2)}, read back from the tokens."""
    starts = (tokens == RECORD).nonzero().flatten().tolist()
    rows = [tokens[start + 1 : start + RECORD_LEN].tolist() for start in starts]
    return {(k1, k2): (v1, v2) for k1, k2, v1, v2 in rows}


@pytest.mark.parametrize(
    ("num_tokens", "num_records", "num_questions"),
    [(9, 1, 1), (100, 12, 5), (1024, 127, 127), (4096, 64, 16), (4099, 511, 3)],
)
class TestMakeContext:
    def test_same_seed_same_context(self, num_tokens, num_records, num_questions):
        first, second = (
            make_context(num_tokens, num_records, num_questions, seed=3) for _ in range(2)
        )
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.questions, second.questions)
        assert torch.equal(first.answers, second.answers)
        other = make_context(num_tokens, num_records, num_questions, seed=4)
        assert not torch.equal(first.tokens, other.tokens)

    def test_shapes_and_symbols(self, num_tokens, num_records, num_questions):
        context = make_context(num_tokens, num_records, num_questions, seed=0)
        assert context.tokens.shape == (num_tokens,)
        assert context.questions.shape == (num_questions, 3)
        assert context.answers.shape == (num_questions, 2)
        for tensor in (context.tokens, context.questions, context.answers):
            assert tensor.dtype == torch.int64
        assert context.tokens[0] == BOS
        assert context.tokens.max() < FILLER.stop
        assert (context.questions[:, 0] == QUESTION).all()

    def test_records_are_present_with_unique_keys(self, num_tokens, num_records, num_questions):
        tokens = make_context(num_tokens, num_records, num_questions, seed=1).tokens
        assert (tokens == RECORD).sum() == num_records
        records = records_in(tokens)
        assert len(records) == num_records
        for keys, values in records.items():
            assert all(key in KEYS for key in keys)
            assert all(value in VALUES for value in values)

    def test_answers_are_those_of_the_records(self, num_tokens, num_records, num_questions):
        context = make_context(num_tokens, num_records, num_questions, seed=2)
        records = records_in(context.tokens)
        asked = [tuple(question[1:]) for question in context.questions.tolist()]
        assert len(set(asked)) == num_questions
        assert [records[keys] for keys in asked] == [tuple(a) for a in context.answers.tolist()]


@pytest.mark.parametrize(("stray", "expected"), [(0.0, 0.0), (0.02, 0.02), (1.0, 1.0)])
def test_stray_is_the_share_of_symbols_in_the_filler(stray, expected):
    tokens = make_context(8192, 1, 1, seed=0, stray=stray).tokens
    num_strays = int(((tokens >= KEYS.start) & (tokens < VALUES.stop)).sum()) - (RECORD_LEN - 1)
    assert num_strays / 8192 == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("num_tokens", "num_records", "num_questions", "options", "named"),
    [
        (8, 1, 1, {}, "num_tokens"),
        (0, 1, 1, {}, "num_tokens"),
        (-5, 1, 1, {}, "num_tokens"),
        (128, 0, 1, {}, "num_records"),
        (128, 16, 1, {}, "num_records"),
        (100_000, 4097, 1, {}, "num_records"),
        (128, 4, 0, {}, "num_questions"),
        (128, 4, 5, {}, "num_questions"),
        (128, 4, 4, {"seed": -1}, "seed"),
        (128, 4, 4, {"seed": 2**63}, "seed"),
        (128, 4, 4, {"stray": -0.1}, "stray"),
        (128, 4, 4, {"stray": 1.1}, "stray"),
        (128, 4, 4, {"stray": float("nan")}, "stray"),
    ],
)
def test_bad_arguments_raise(num_tokens, num_records, num_questions, options, named):
    with pytest.raises(ValueError, match=f"^{named} must be"):
        make_context(num_tokens, num_records, num_questions, **{"seed": 0, **options})


def test_max_records_is_the_largest_that_fits():
    for num_tokens in (9, 16, 17, 1000):
        make_context(num_tokens, max_records(num_tokens), 1, seed=0)


@torch.no_grad()
def test_shipped_model_answers_by_plain_static_cache_decoding():
    transformers = pytest.importorskip("transformers")
    model = load_model()
    assert not model.training
    context = make_context(2048, 16, 16, seed=0)
    prefilled = transformers.StaticCache(config=model.config, max_cache_len=2048 + 8)
    model(context.tokens[None], past_key_values=prefilled)

    num_right = 0
    for question, answer in zip(context.questions, context.answers, strict=True):
        cache = copy.deepcopy(prefilled)
        decoded = []
        for step in range(4):
            token = question[step] if step < 3 else decoded[-1]
            logits = model(token.view(1, 1), past_key_values=cache).logits
            if step >= 2:
                decoded.append(logits[0, -1].argmax())
        num_right += torch.stack(decoded).equal(answer)
    assert num_right >= 15


def test_load_model_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install"):
        load_model()


def test_the_task_needs_no_transformers():
    code = "import sys; sys.modules['transformers'] = None; import quest_compile.recall"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_query_heads_of_a_group_differ():
    """Otherwise a grouped-query selection bug would not change any answer."""
    pytest.importorskip("transformers")
    attention = load_model().model.layers[-1].self_attn
    queries = attention.q_proj.weight.view(2, 2, 64, 128)
    difference = (queries[:, 0] - queries[:, 1]).norm(dim=(1, 2))
    assert (difference > 0.3 * queries[:, 0].norm(dim=(1, 2))).all()


@pytest.mark.nightly
def test_training_script_runs_every_phase_and_writes_a_loadable_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    command = [sys.executable, "-m", "quest_compile.recall.train", str(tmp_path)]
    finished = subprocess.run(
        [*command, "--max-steps-per-phase", "2"], check=True, capture_output=True, text=True
    )
    phases = [line.split()[1] for line in finished.stdout.splitlines() if "step 2/2" in line]
    assert phases == ["A", "B", "C", "B", "C"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads((model_path() / "config.json").read_text())
    transformers.LlamaForCausalLM.from_pretrained(tmp_path)
