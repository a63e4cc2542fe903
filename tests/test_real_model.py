"""SmolLM2-135M as quest-compile fetch makes it: it is the trained model, and Quest decodes with it.

The texts are the documents of this repository, and a paragraph whose loss is known.
"""

from pathlib import Path

import pytest
import torch

import quest_compile
from quest_compile import ops
from quest_compile.eval.copy_tasks import NOT_SCORED, PASSAGE
from quest_compile.real_model import model_folder, resolve_model

NAME = "smollm2"
ROOT = Path(__file__).resolve().parents[1]
PARAGRAPH = (
    "The lighthouse keeper climbed the stairs every evening at seven o'clock. In winter the wind "
    "shook the windows, and the sea threw its spray as high as the lamp. He wrote the weather into "
    "a book: the temperature, the direction of the wind, and the ships that had passed during the "
    "day. In 1887 there were 312 of them. When the fog came in, he rang the bell until morning, "
    "because a ship that cannot see the light can still hear the bell."
)

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        not model_folder(NAME).is_dir(), reason=f"no {NAME}: quest-compile fetch {NAME} gets it"
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(NAME))


@pytest.fixture
def model():
    from transformers import AutoModelForCausalLM

    torch._dynamo.reset()
    return AutoModelForCausalLM.from_pretrained(resolve_model(NAME), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def documents(tokenizer):
    """Token ids of prose, README first."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    return torch.tensor(tokenizer(text, verbose=False).input_ids)


@torch.no_grad()
def read(model, tokens):
    """Loss of every token but the first, and whether it was the first choice."""
    logits = model(tokens[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    return losses, (logits.argmax(-1) == tokens[1:]).float()


def generated(model, tokens, num_tokens):
    mask = torch.ones_like(tokens)[None]
    out = model.generate(
        tokens[None], attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        do_sample=False,
    )  # fmt: skip
    return out[0, len(tokens) :].tolist()


def test_the_weights_are_those_that_were_trained(model, tokenizer):
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    losses, hits = read(model, torch.tensor(tokenizer(PARAGRAPH).input_ids))
    assert losses.mean().item() == pytest.approx(3.3364, abs=2e-3)
    assert hits.mean().item() == pytest.approx(33 / 102, abs=0.02)


def test_the_tokenizer_splits_digits_and_gives_the_text_back(tokenizer):
    text = "In 1887  312 ships,\n\n\tnaïve café."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("1887").input_ids) == list("1887")
    assert tokenizer("<|im_start|>").input_ids == [tokenizer.bos_token_id]
    assert tokenizer.eos_token == "<|im_end|>"


def test_what_was_read_before_is_known(model, documents):
    """The fact behind the task copy: first choices right, first reading and second."""
    context = documents[:1200]
    passage = context[200 : 200 + PASSAGE]
    _, hits = read(model, torch.cat([context, passage]))
    first = hits[199 + NOT_SCORED : 199 + PASSAGE].mean().item()
    second = hits[len(context) - 1 + NOT_SCORED :].mean().item()
    assert second > 0.9
    assert first < second - 0.25


def test_a_budget_that_covers_the_context_generates_what_dense_attention_does(model, documents):
    prompt = documents[:400]
    dense = generated(model, prompt, 12)
    quest_compile.compile_for_generate(model, budget=1024, inner="eager")
    ops.reset_counters()
    assert generated(model, prompt, 12) == dense
    assert ops.counters()["sparse_calls"] == 0


def test_a_small_budget_is_sparse_in_every_layer_but_the_first_two(model, documents):
    prompt = documents[:400]
    quest_compile.compile_for_generate(model, budget=128, inner="eager")
    ops.reset_counters()
    generated(model, prompt, 12)
    counted = ops.counters()
    # The first of the twelve comes from the prefill.
    assert counted["sparse_calls"] == 28 * 11
    assert counted["max_tokens_attended"] <= 128
