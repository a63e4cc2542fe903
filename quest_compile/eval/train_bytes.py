"""Train a small byte-level Llama to evaluate: `train_bytes OUT TEXT...`

For one GPU of 80 GB or more, within `--minutes`. Half of what it reads are windows of the texts
(public-domain books; keep one out, for perplexity), half samples of the tasks of
`quest-compile eval` with the texts as haystack, their answers weighted. Lengths grow with the time
that is used up. The result is a folder with a tokenizer of one token per byte: 8,192 of its tokens
are about 2,000 of those of usual models. Evaluate it on the book that was kept out with

    quest-compile eval OUT --device cuda --lengths 4096 8192 16384 --haystack BOOK --text BOOK \\
        --budgets 128 256 512 1024 2048 --tasks passkey niah_single_2 niah_multikey_1 vt perplexity
"""

from __future__ import annotations

import argparse
import itertools
import math
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from quest_compile.eval.byte_tokenizer import BOS, make_tokenizer
from quest_compile.eval.generators import TEXT_TASKS
from quest_compile.eval.needles import read_sentences

TASKS = ("passkey", "niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "vt")
# Share of the time by whose end a length is trained, and the length in bytes.
CURRICULUM = ((0.40, 1024), (0.70, 4096), (0.90, 8192), (1.0, 16384))
TOKENS_PER_STEP = 131072
ANSWER_WEIGHT = 5.0
LEARNING_RATE, NUM_WARMUP_STEPS = 1e-3, 200
VOCAB_SIZE = 264

MODEL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": None,
}


class Samples:
    """Rows of ``length`` tokens with weights of their targets."""

    def __init__(self, texts: list[Path], seed: int) -> None:
        self._rng = random.Random(seed)
        self._books = [path.read_bytes() for path in texts]
        self._sentences = [sentence for path in texts for sentence in read_sentences(path)]
        self._unit_bytes = {name: self._bytes_per_unit(name) for name in TASKS}

    def batch(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8-valued int16 tokens [B, length + 1] and float32 weights [B, length]."""
        rows = [self._row(length, i) for i in range(max(1, TOKENS_PER_STEP // length))]
        tokens, weights = zip(*rows)
        return torch.stack(tokens), torch.stack(weights)

    def _row(self, length: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        text, answers = self._task(length) if number % 2 else (b"", [])
        text += self._window(length - len(text))
        tokens = torch.tensor([BOS, *text[:length]], dtype=torch.int16)
        weights = torch.ones(length)
        for start, end in answers:
            weights[start:end] = ANSWER_WEIGHT
        return tokens, weights

    def _task(self, length: int) -> tuple[bytes, list[tuple[int, int]]]:
        """A sample that fits, with all its questions answered, and where the answers are."""
        name = self._rng.choice(TASKS)
        size = int(length * self._rng.uniform(0.6, 0.9) / self._unit_bytes[name])
        while True:
            size = max(size, TEXT_TASKS[name].min_size)
            text, answers = self._answered(name, size)
            if len(text) < length or size == TEXT_TASKS[name].min_size:
                return (text, answers) if len(text) < length else (b"", [])
            size = size * 3 // 4

    def _answered(self, name: str, size: int) -> tuple[bytes, list[tuple[int, int]]]:
        number = self._rng.randrange(10**6)
        sample = TEXT_TASKS[name].generate(size, number, self._rng, self._sentences)
        text, answers = sample.context.encode(), []
        for question, prefix, wanted in sample.questions:
            text += (question + prefix).encode()
            answer = f" {', '.join(wanted)}.".encode()
            answers.append((len(text), len(text) + len(answer)))
            text += answer
        return text + b"\n", answers

    def _window(self, length: int) -> bytes:
        book = self._rng.choice(self._books)
        start = self._rng.randrange(max(1, len(book) - length))
        return book[start : start + length].ljust(length)

    def _bytes_per_unit(self, name: str) -> float:
        small, large = (len(self._answered(name, size)[0]) for size in (200, 400))
        return max(1.0, (large - small) / 200)


def prefetched(samples: Samples, lengths: Iterator[int]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches made in another thread, a few ahead."""
    ready: queue.Queue = queue.Queue(maxsize=4)

    def work() -> None:
        for length in lengths:
            ready.put(samples.batch(length))
        ready.put(None)

    threading.Thread(target=work, daemon=True).start()
    yield from iter(ready.get, None)


def train(model: Any, samples: Samples, minutes: float, max_steps: int | None) -> None:
    """Train for so long, printing the losses of all bytes and of answers."""
    device = next(model.parameters()).device
    step_model = torch.compile(model) if device.type == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    began = time.monotonic()

    def used() -> float:
        """The share of the time; of the steps, if they are limited."""
        return (time.monotonic() - began) / (60 * minutes)

    def lengths() -> Iterator[int]:
        for step in itertools.count() if max_steps is None else range(max_steps):
            share = used() if max_steps is None else step / max_steps
            if share >= 1:
                return
            yield next(length for end, length in CURRICULUM if share < end)

    num_tokens = 0
    for step, (tokens, weights) in enumerate(prefetched(samples, lengths())):
        tokens, weights = tokens.to(device).long(), weights.to(device)
        rate = LEARNING_RATE * min(1.0, (step + 1) / NUM_WARMUP_STEPS)
        rate *= 0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, used()))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16):
            logits = step_model(tokens[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view_as(weights)
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        num_tokens += weights.numel()
        if step % 50 == 0:
            answers = losses[weights > 1].mean().item()
            print(
                f"step {step}, {weights.shape[1]} bytes: loss {losses.mean().item():.3f}, answers "
                f"{answers:.3f}, {num_tokens / 1e6:.0f} M bytes, {time.monotonic() - began:.0f} s",
                flush=True,
            )


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser(prog="python -m quest_compile.eval.train_bytes")
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", help="UTF-8 books")
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--max-steps", type=int, help="for a trial of the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    samples = Samples(arguments.texts, arguments.seed)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).to(arguments.device)
    train(model, samples, arguments.minutes, arguments.max_steps)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    make_tokenizer().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
