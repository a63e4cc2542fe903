"""One dense prefill per context; then every question, token by token, with every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from quest_compile.decoding import rewind, step_inputs
from quest_compile.eval.encode import Encoder
from quest_compile.eval.metrics import METRICS, NEVER_FALLING
from quest_compile.eval.samples import AGREEMENT, COPY, PERPLEXITY, Context, Question

Call = Callable[..., Any]

# A mask of this many rows and the context's columns is made at once.
_SLICE = 2048


class Session:
    """A static cache of ``max_seq_len`` positions, filled for one context after the other."""

    def __init__(self, model: Any, max_seq_len: int) -> None:
        from transformers import StaticCache

        self._model = model
        # A multiple of any page size: no page hangs over the end.
        self.max_seq_len = -(-max_seq_len // 128) * 128
        self.cache = StaticCache(config=model.config, max_cache_len=self.max_seq_len)
        self.length = 0
        self._saved: list[tuple[Any, dict[str, Any]]] = []

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor) -> None:
        """Dense, not compiled, with the attention that the model has now."""
        rewind(self.cache, 0)
        for start in range(0, len(tokens), _SLICE):
            part = tokens[None, start : start + _SLICE].to(self._model.device)
            self._model(**step_inputs(self.cache, part, start), logits_to_keep=1)
        self.length = len(tokens)
        # Positions of a static layer are overwritten in place; rings and recurrent states are not.
        others = [x for x in self.cache.layers if type(x).__name__ != "StaticLayer"]
        self._saved = [(layer, _copied(vars(layer))) for layer in others]

    def _roll_back(self) -> None:
        rewind(self.cache, self.length)
        for layer, saved in self._saved:
            for name, value in saved.items():
                if torch.is_tensor(value):
                    getattr(layer, name).copy_(value)
                else:
                    setattr(layer, name, value)

    def logits(self, call: Call, tokens: Iterable[int]) -> Iterator[torch.Tensor]:
        """Roll back to the context, feed the tokens; float32 [vocabulary] after each of them."""
        self._roll_back()
        for position, token in enumerate(tokens, self.length):
            fed = torch.tensor([[token]], device=self._model.device)
            with torch.no_grad():
                out = call(**step_inputs(self.cache, fed, position)).logits
            yield out[0, -1].float()


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {
        name: value.clone() if torch.is_tensor(value) else value
        for name, value in attributes.items()
        if torch.is_tensor(value) or isinstance(value, plain)
    }


def generate(
    session: Session, call: Call, question: Question, is_done: Callable[[list[int]], bool]
) -> list[int]:
    """Greedy, until ``is_done`` or ``max_new_tokens``."""
    generated: list[int] = []

    def fed() -> Iterator[int]:
        yield from question.tokens
        while len(generated) < question.max_new_tokens and not is_done(generated):
            yield generated[-1]

    for i, logits in enumerate(session.logits(call, fed()), 1):
        if i >= len(question.tokens):
            generated.append(int(logits.argmax()))
    return generated


class Measurement:
    """Asks the questions of a context, and scores what comes."""

    def __init__(self, model: Any, encoder: Encoder | None) -> None:
        self._encoder = encoder
        self._ends = _end_tokens(model)
        self._dense: list[tuple[list[int], torch.Tensor]] = []

    def cell(
        self, kind: str, session: Session, call: Call, context: Context, is_dense: bool
    ) -> dict[str, list]:
        """All questions with one method: what a line of the records holds, a list per question."""
        if kind in (PERPLEXITY, COPY):
            read = [self._read(session, call, question) for question in context.questions]
            found = {"losses": [losses for losses, _ in read]}
            return found if kind == PERPLEXITY else found | {"scores": [hits for _, hits in read]}
        if kind == AGREEMENT:
            if is_dense:
                self._dense = [self._continue(session, call, q) for q in context.questions]
                return {"scores": [[1.0] * len(tokens) for tokens, _ in self._dense]}
            pairs = zip(context.questions, self._dense)
            compared = [self._compare(session, call, q, *dense) for q, dense in pairs]
            return {"scores": [s for s, _ in compared], "kl": [kl for _, kl in compared]}
        answers = [self._answer(session, call, question) for question in context.questions]
        return {
            "scores": [[self._score(q, tokens)] for q, tokens in zip(context.questions, answers)],
            "tokens": answers,
            "texts": [self._text(tokens) for tokens in answers],
        }

    def _answer(self, session: Session, call: Call, question: Question) -> list[int]:
        stops = question.metric in NEVER_FALLING

        def is_done(tokens: list[int]) -> bool:
            return bool(tokens) and (
                tokens[-1] in self._ends or (stops and self._score(question, tokens) == 1)
            )

        return generate(session, call, question, is_done)

    def _score(self, question: Question, tokens: list[int]) -> float:
        if question.expected:
            return float(tuple(tokens) == question.expected)
        return METRICS[question.metric](self._text(tokens), question.answers)

    def _text(self, tokens: list[int]) -> str:
        return "" if self._encoder is None else self._encoder.decode(tokens)

    def _read(
        self, session: Session, call: Call, question: Question
    ) -> tuple[list[float], list[float]]:
        """Per expected token: its loss, and whether it was the first choice."""
        not_scored = len(question.tokens) - len(question.expected)
        losses, hits = [], []
        for i, row in enumerate(session.logits(call, question.tokens), -not_scored):
            if i >= 0:
                token = question.expected[i]
                losses.append(float(-row.log_softmax(-1)[token]))
                hits.append(float(int(row.argmax()) == token))
        return losses, hits

    def _continue(
        self, session: Session, call: Call, question: Question
    ) -> tuple[list[int], torch.Tensor]:
        """The dense continuation, and its log-probabilities [tokens, vocabulary] on the CPU."""
        generated: list[int] = []
        rows = []

        def fed() -> Iterator[int]:
            yield from question.tokens
            while len(generated) < question.max_new_tokens:
                yield generated[-1]

        for i, logits in enumerate(session.logits(call, fed()), 1):
            if i >= len(question.tokens):
                rows.append(logits.log_softmax(-1).cpu())
                generated.append(int(logits.argmax()))
        return generated, torch.stack(rows)

    def _compare(
        self, session: Session, call: Call, question: Question, tokens: list[int], dense: Any
    ) -> tuple[list[float], float]:
        """Per token of the dense continuation: is it the first choice? And the mean KL in nats."""
        fed = [*question.tokens, *tokens[:-1]]
        rows = list(session.logits(call, fed))[len(question.tokens) - 1 :]
        found = torch.stack([row.log_softmax(-1).cpu() for row in rows])
        divergence = torch.nn.functional.kl_div(found, dense, log_target=True, reduction="none")
        same = [float(int(row.argmax()) == token) for row, token in zip(rows, tokens)]
        return same, float(divergence.sum(-1).mean())


def _end_tokens(model: Any) -> set[int]:
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}
