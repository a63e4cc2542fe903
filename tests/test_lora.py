"""Adapters of peft: copied into the one that is there they cost no graph."""

import pytest
import torch
from tiny_models import SHORT, random_prompt, tiny_model

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.config import QuestConfig
from quest_compile.decoding import prefill, step_inputs

peft = pytest.importorskip("peft", reason="needs peft")
hotswap = pytest.importorskip("peft.utils.hotswap", reason="needs a peft that swaps adapters")
NUM_STEPS, LENGTH = 3, 200


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two adapters that answer differently."""
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        config.init_lora_weights = False
        model = base()
        torch.manual_seed(seed)
        peft.get_peft_model(model, config).save_pretrained(folder)
    return folders


def base():
    return tiny_model("llama", num_hidden_layers=3)


@torch.no_grad()
def decode(model, step):
    """Logits of NUM_STEPS given tokens."""
    tokens = random_prompt(1, LENGTH + NUM_STEPS)
    cache = prefill(model, tokens[:, :LENGTH], 512)
    steps = range(LENGTH, LENGTH + NUM_STEPS)
    return torch.cat([step(**step_inputs(cache, tokens[:, i : i + 1], i)).logits for i in steps])


def test_a_swapped_adapter_decodes_sparsely_in_the_same_graph(adapters):
    expected = []
    for folder in adapters:
        model = peft.PeftModel.from_pretrained(base(), folder).eval()
        expected.append(decode(model, model))
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch._dynamo.reset()
    ops.reset_counters()
    backend = QuestBackend(QuestConfig(**SHORT, budget=256, inner="eager"))
    model = peft.PeftModel.from_pretrained(base(), adapters[0]).eval()
    step = torch.compile(model, backend=backend)
    torch.testing.assert_close(decode(model, step), expected[0], rtol=1e-4, atol=1e-4)
    hotswap.hotswap_adapter(model, adapters[1], adapter_name="default")
    torch.testing.assert_close(decode(model, step), expected[1], rtol=1e-4, atol=1e-4)
    assert len(backend.report().graphs) == 1
    assert ops.counters()["sparse_calls_covered"] == 2 * NUM_STEPS
