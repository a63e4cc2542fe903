"""The adapter inside the real lm-evaluation-harness, where it is installed."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quest_compile.eval.byte_tokenizer import BOS, make_tokenizer

pytest.importorskip("lm_eval.models.huggingface")


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=BOS + 1, **sizes, **heads)).eval()


@pytest.fixture
def tokenizer():
    made = make_tokenizer()
    made.eos_token = made.pad_token = made.bos_token
    return made


def answers(model, tokenizer, prompts, **options):
    """By ``generate_until`` of the harness, with its batching, truncation and stop texts."""
    from lm_eval.api.instance import Instance

    from quest_compile.eval.harness import QuestLM

    torch._dynamo.reset()
    lm = QuestLM(
        model,
        tokenizer=tokenizer,
        num_decoded_prompt_tokens=20,
        quest={"inner": "eager"},
        max_length=512,
        **options,
    )
    settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    requests = [Instance("generate_until", {}, (p, settings), i) for i, p in enumerate(prompts)]
    return lm.generate_until(requests, disable_tqdm=True), lm.activity


def test_generate_tasks_decode_sparsely_and_a_covering_budget_is_dense(model, tokenizer):
    prompts = ["the whale swam away. " * 15 + "Who swam?", "a whale was seen. " * 12 + "What?"]
    sparse, activity = answers(model, tokenizer, prompts, budget=64)
    assert len(sparse) == 2
    assert activity["samples"] == 2
    assert activity["sparse_steps"] == activity["steps"] >= 2 * 20

    covered, activity = answers(model, tokenizer, prompts, budget=1024)
    assert activity["sparse_steps"] == 0
    for prompt, answer in zip(prompts, covered):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            tokens, max_new_tokens=8, do_sample=False, eos_token_id=BOS, pad_token_id=BOS
        )
        expected = tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
        assert answer == expected.split("\n\n")[0]


def test_a_task_of_a_local_file_runs_through_simple_evaluate(model, tokenizer, tmp_path):
    pytest.importorskip("datasets")
    import lm_eval

    from quest_compile.eval.harness import QuestLM

    torch._dynamo.reset()
    rows = tmp_path / "rows.jsonl"
    asked = [{"q": "the whale swam away. " * 15 + f"Who {i}?", "a": "x"} for i in range(3)]
    rows.write_text("\n".join(map(json.dumps, asked)))
    task = {
        "task": "whales",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    settings = {"num_decoded_prompt_tokens": 20, "quest": {"inner": "eager"}, "max_length": 512}
    lm = QuestLM(model, tokenizer=tokenizer, budget=64, **settings)
    found = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)
    assert found["results"]["whales"]["sample_len"] == 3
    assert lm.activity["samples"] == 3
    assert lm.activity["sparse_steps"] == lm.activity["steps"] >= 3 * 20


def test_log_likelihood_requests_are_refused(model, tokenizer):
    from quest_compile.eval.harness import QuestLM

    lm = QuestLM(model, tokenizer=tokenizer, budget=64, quest={"inner": "eager"})
    with pytest.raises(NotImplementedError, match="never decode: Quest would not run"):
        lm.loglikelihood([])
