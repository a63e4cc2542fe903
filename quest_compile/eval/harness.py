"""lm-evaluation-harness with Quest: generate tasks through the compiled decode path.

    from quest_compile.eval.harness import QuestLM
    lm_eval.simple_evaluate(model=QuestLM(path, budget=2048), tasks=["niah_single_1"])

The harness puts the question into the prompt, which would be prefilled densely, and the first token
of the answer comes from the prefill. Here the last tokens of the prompt are decoded one by one
(``num_decoded_prompt_tokens``), so that question and answer both meet Quest.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from typing_extensions import Never

from quest_compile import ops
from quest_compile.backend import backend
from quest_compile.budgets import DEFAULT_BUDGET
from quest_compile.eval.protocol import Session

try:
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "lm_eval":
        raise
    raise ImportError(
        "quest_compile.eval.harness needs lm-evaluation-harness: "
        "pip install 'quest-compile[lm-eval]'"
    ) from error

_WHY_NOT = (
    "log-likelihood tasks score a text in one forward pass and never decode: Quest would not run, "
    "and the score would be that of dense attention. Choose tasks with generate_until."
)


class QuestLM(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """HFLM that decodes with ``torch.compile(model, backend=quest_compile.backend(...))``.

    Args:
        pretrained: a transformers model, or its folder or name; further options of HFLM by name.
        num_decoded_prompt_tokens: of the end of each prompt. 0 leaves only the answer to Quest.
        quest: settings of ``quest_compile.backend`` such as ``{"preset": "paper"}``.
        budget: tokens.

    ``activity`` counts, over all samples: steps, those with a sparse attention call, and samples.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: a bad setting; a task that is sampled, or batches of more than one.
        NotImplementedError: a log-likelihood task.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        budget: int = DEFAULT_BUDGET,
        num_decoded_prompt_tokens: int = 128,
        quest: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if num_decoded_prompt_tokens < 0:
            raise ValueError(
                f"num_decoded_prompt_tokens must be at least 0, got {num_decoded_prompt_tokens}"
            )
        if options.setdefault("batch_size", 1) not in (1, "1"):
            raise ValueError(f"batch_size must be 1, got {options['batch_size']!r}")
        super().__init__(pretrained, backend="causal", **options)
        self.quest = backend(budget=budget, **(quest or {}))
        self.activity = {"samples": 0, "steps": 0, "sparse_steps": 0}
        self._num_decoded = num_decoded_prompt_tokens
        self._compiled = torch.compile(self.model.eval(), backend=self.quest)
        self._session: Session | None = None

    def loglikelihood(self, *args: Never, **kwargs: Never) -> NoReturn:
        raise NotImplementedError(_WHY_NOT)

    loglikelihood_rolling = loglikelihood
    _loglikelihood_tokens = loglikelihood

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation: Any
    ) -> torch.Tensor:
        """Greedy: ``context`` [1, T] and what follows, at most ``max_length`` tokens together."""
        if generation.get("do_sample") or generation.get("temperature"):
            raise ValueError(f"only greedy decoding is supported, the task asks for {generation}")
        if len(context) != 1:
            raise ValueError(f"one sample at a time, got a batch of {len(context)}")
        prompt = context[0].tolist()
        # At least one token is prefilled, and one is decoded.
        num_prefilled = max(1, len(prompt) - max(1, self._num_decoded))
        session = self._session_of(max_length)
        session.prefill(context[0, :num_prefilled])
        generated: list[int] = []
        pending = prompt[num_prefilled:]

        def fed():
            yield from pending
            while len(prompt) + len(generated) < max_length and not self._is_done(generated, stop):
                yield generated[-1]

        for i, logits in enumerate(session.logits(self._step, fed()), 1):
            if i >= len(pending):
                generated.append(int(logits.argmax()))
        self.activity["samples"] += 1
        return torch.tensor([[*prompt, *generated]], device=context.device)

    def _session_of(self, max_length: int) -> Session:
        """A cache for all samples, larger only when one needs it: each size is compiled once."""
        if self._session is None or self._session.max_seq_len < max_length:
            self._session = Session(self.model, 1 << (max_length - 1).bit_length())
        return self._session

    def _step(self, **inputs: Any) -> Any:
        before = ops.counters()["sparse_calls"]
        out = self._compiled(**inputs)
        self.activity["steps"] += 1
        self.activity["sparse_steps"] += ops.counters()["sparse_calls"] > before
        return out

    def _is_done(self, generated: list[int], stop: list[str]) -> bool:
        if not generated:
            return False
        text = self.tok_decode(generated, skip_special_tokens=False)
        return generated[-1] == self.eot_token_id or any(end in text for end in stop if end)
