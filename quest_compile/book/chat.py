"""Questions of the user about the book: several turns on one cache, which is kept."""

from __future__ import annotations

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.reading import Reading, Step, answer, print_piece

_MAX_NEW_TOKENS = 48
_HELP = "Ask about the book; an empty line ends. Every answer stays in the cache for the next."


def chat(reading: Reading, step: Step, quest: QuestBackend) -> None:
    """Until an empty line or the end of the input; then what was read."""
    print(f"\n{_HELP}")
    ops.reset_counters()
    position, num_steps = reading.length, 0
    carried: list[int] = []
    while question := _asked():
        ids = carried + reading.encode(f"\n\nQuestion: {question}\nAnswer:")
        if position + len(ids) + _MAX_NEW_TOKENS > reading.length + reading.room:
            print("[the cache is full: back to the end of the book]")
            position, ids, carried = reading.length, ids[len(carried) :], []
        if len(ids) + _MAX_NEW_TOKENS > reading.room:
            print(f"[{len(ids)} tokens are too many: {reading.room - _MAX_NEW_TOKENS} at most]")
            continue
        made = answer(
            step,
            reading,
            ids,
            position=position,
            max_new_tokens=_MAX_NEW_TOKENS,
            stop=("\n",),
            on_token=print_piece,
        )
        rate = len(made.step_seconds) / sum(made.step_seconds)
        print(f"\n[first token after {made.first_seconds:.1f} s, {rate:.0f} tokens/s]")
        # The last token was not fed yet.
        position, carried = position + len(made.step_seconds), made.tokens[-1:]
        num_steps += len(made.step_seconds)
    counted = ops.counters()
    if num_steps:
        print(
            f"\n{quest.report()}\n\nQuest was active: {counted['sparse_calls']} sparse attention "
            f"calls in {num_steps} steps, at most {counted['max_tokens_attended']} tokens per "
            f"query of {position}."
        )


def _asked() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""
