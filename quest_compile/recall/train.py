"""Makes the recall model: `python -m quest_compile.recall.train OUT_DIR` (minutes on one core).

The model is not learned from scratch: structured initialisation and fine-tuning. From random
weights a model this small, trained this briefly, stays near chance. It starts from a retrieval
circuit set by hand (`structured_init.py`), which alone answers 98 % of the questions at 512 tokens,
91 % at 4096 and 81 % at 8192. All weights are then trained on the answer tokens, so that it works
at these lengths, with keys that training shaped.

Round one, over growing lengths, since short contexts hold more questions per token:
    A  short, few steps: the circuit already answers here, the other weights adapt to it
    B  medium, many records: keys that share a symbol must be told apart
    C  long, decaying rate: attention must stay sharp among 4096 positions
Then the query heads of each group are made to differ (`break_group_symmetry` says why), and round
two repeats B and C, shorter, to recover the accuracy that this cost.

Steps and seeds are fixed and one thread computes: a machine makes the same file every time.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from quest_compile.recall.evaluate import evaluate_dense
from quest_compile.recall.structured_init import CONFIG, break_group_symmetry, structured_init
from quest_compile.recall.task import (
    ANSWER_LEN,
    QUESTION_LEN,
    RecallContext,
    make_context,
    max_records,
)

SEED = 0
TOKENS_PER_STEP = 4096
NUM_WARMUP_STEPS = 20
STEPS_PER_PROGRESS_LINE = 10


@dataclass(frozen=True)
class Phase:
    """Contexts of `num_tokens` with `num_records` each, both drawn from (first, last) per step."""

    name: str
    num_steps: int
    num_tokens: tuple[int, int]
    num_records: tuple[int, int]
    max_questions: int
    learning_rate: float
    decays: bool = False


ROUND_ONE = (
    Phase("A", 16, (129, 513), (2, 32), 24, 1e-3),
    Phase("B", 73, (513, 2049), (8, 96), 64, 7e-4),
    Phase("C", 40, (2049, 4096), (16, 256), 128, 4e-4, decays=True),
)
ROUND_TWO = (
    Phase("B", 60, (257, 1537), (4, 64), 48, 5e-4),
    Phase("C", 24, (2049, 4096), (8, 128), 96, 4e-4, decays=True),
)


def draw_contexts(phase: Phase, generator: torch.Generator) -> list[RecallContext]:
    """The contexts of one step, all of one shape, about `TOKENS_PER_STEP` tokens together."""

    def draw(first: int, last: int) -> int:
        return int(torch.randint(first, last + 1, (), generator=generator))

    num_tokens = draw(*phase.num_tokens)
    num_records = min(draw(*phase.num_records), max_records(num_tokens))
    num_questions = min(num_records, phase.max_questions)
    return [
        make_context(num_tokens, num_records, num_questions, seed=draw(0, 2**62))
        for _ in range(max(1, TOKENS_PER_STEP // num_tokens))
    ]


def answer_loss(model: LlamaForCausalLM, contexts: list[RecallContext]) -> tuple[Tensor, float]:
    """Cross entropy and accuracy of the answer tokens, all questions asked in one sequence."""
    num_tokens, num_questions = len(contexts[0].tokens), len(contexts[0].questions)
    input_ids = torch.stack(
        [
            torch.cat([c.tokens, torch.cat([c.questions, c.answers], dim=1).flatten()])
            for c in contexts
        ]
    )
    targets = torch.stack([c.answers.flatten() for c in contexts])
    question_starts = num_tokens + torch.arange(num_questions) * (QUESTION_LEN + ANSWER_LEN)
    before_answers = question_starts[:, None] + QUESTION_LEN - 1 + torch.arange(ANSWER_LEN)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids, logits_to_keep=before_answers.flatten(), use_cache=False)
    logits = output.logits.float()
    accuracy = (logits.argmax(-1) == targets).float().mean().item()
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), accuracy


def train_round(
    model: LlamaForCausalLM,
    phases: tuple[Phase, ...],
    generator: torch.Generator,
    max_steps_per_phase: int | None,
) -> None:
    """Trains all weights through the phases with one optimizer, warming up in each phase."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    started = time.monotonic()
    for phase in phases:
        num_steps = phase.num_steps
        if max_steps_per_phase is not None:
            num_steps = min(num_steps, max_steps_per_phase)
        for step in range(num_steps):
            rate = phase.learning_rate * min(1.0, (step + 1) / NUM_WARMUP_STEPS)
            if phase.decays:
                rate *= 1 - 0.9 * step / phase.num_steps
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, accuracy = answer_loss(model, draw_contexts(phase, generator))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % STEPS_PER_PROGRESS_LINE == 0 or step == num_steps - 1:
                print(
                    f"phase {phase.name} step {step + 1}/{num_steps}: loss {loss.item():.3f}, "
                    f"accuracy {accuracy:.3f}, {time.monotonic() - started:.0f} s",
                    flush=True,
                )


def export(model: LlamaForCausalLM, out_dir: Path) -> None:
    """Writes a folder for `from_pretrained`: config.json and model.safetensors (float32)."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    # named_parameters lists the tied embedding once.
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--max-steps-per-phase", type=int, help="for a quick trial of the script")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig.from_dict(CONFIG))
    structured_init(model, seed=SEED)
    train_round(model, ROUND_ONE, generator, arguments.max_steps_per_phase)
    break_group_symmetry(model, seed=SEED)
    train_round(model, ROUND_TWO, generator, arguments.max_steps_per_phase)
    export(model, arguments.out_dir)

    model.eval()
    for num_tokens, num_records in ((4096, 16), (4096, 64), (8192, 16)):
        num_contexts = 128 // num_records
        accuracies = [
            evaluate_dense(model, make_context(num_tokens, num_records, num_records, seed=seed))
            for seed in range(num_contexts)
        ]
        print(
            f"{num_tokens} tokens, {num_records} records: {sum(accuracies) / num_contexts:.1%} "
            f"of {num_contexts * num_records} questions right"
        )


if __name__ == "__main__":
    main()
