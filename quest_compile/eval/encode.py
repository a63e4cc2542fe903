"""Text to tokens: the context, and behind it the question, through the model's chat template."""

from __future__ import annotations

from typing import Any

_MARK = "[[content]]"


class Encoder:
    """``tokenizer`` of transformers; ``use_chat``: wrap samples in its chat template, if any."""

    def __init__(self, tokenizer: Any, use_chat: bool = True) -> None:
        self._tokenizer = tokenizer
        self.before, self.after = "", ""
        if use_chat and getattr(tokenizer, "chat_template", None):
            message = [{"role": "user", "content": _MARK}]
            rendered = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
            self.before, self.after = rendered.split(_MARK)

    @property
    def uses_chat(self) -> bool:
        return bool(self.after)

    def plain(self, text: str) -> list[int]:
        """The tokens of a text, without any special ones."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def context(self, text: str) -> list[int]:
        """With the special tokens a text begins with."""
        if self.uses_chat:
            return self.plain(self.before + text)
        return self._with_special_tokens(text)

    def beginning(self) -> list[int]:
        """The special tokens a text begins with."""
        return self._with_special_tokens("")

    def question(self, question: str, answer_prefix: str) -> list[int]:
        """At least one token: it is the first that is decoded."""
        tokens = self.plain(question + self.after + answer_prefix)
        if not tokens:
            raise ValueError("a question has no text, and needs at least one token")
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _with_special_tokens(self, text: str) -> list[int]:
        tokens = self._tokenizer(text, verbose=False).input_ids
        ends = (self._tokenizer.eos_token_id, getattr(self._tokenizer, "sep_token_id", None))
        if len(tokens) > 1 and tokens[-1] in ends:
            return tokens[:-1]
        return tokens if text or tokens[-1:] != [ends[0]] else []
