"""Questions about records, asked with one method after the other over the same contexts."""

from attended_pages import kept_pages, recorded_pages

from quest_compile import ops
from quest_compile.config import QuestConfig
from quest_compile.eval.methods import REFERENCE, parse_method
from quest_compile.eval.protocol import Session
from quest_compile.eval.recall_tasks import recall_group

CONTEXT_TOKENS, NUM_QUESTIONS, STEPS = 4096, 64, 4
CONFIG = QuestConfig(num_dense_layers=2, inner="eager")
# As in the documents, the newest page is the only one that is always attended.
_NEWEST = "num_sink_pages=0,num_recent_pages=1"
SETTINGS = {
    "defaults": "num_dense_layers=2",
    "sketch": f"{_NEWEST},summary=sketch,group_reduce=softmax",
    "one bit": f"{_NEWEST},summary=sketch,group_reduce=softmax,sketch_bits=1",
    "minmax": f"{_NEWEST},summary=minmax,group_reduce=sum",
    "paper": "preset=paper",
}
# With the budgets they are compared at.
RUNS = [("defaults", 256), ("sketch", 64), ("one bit", 64), ("minmax", 64), ("paper", 256)]


def method_of(name):
    return parse_method(name, CONFIG)


def quest(settings):
    return method_of(f"quest:{SETTINGS[settings]}")


def quest_reference(settings):
    return method_of(f"quest-reference:{SETTINGS[settings]}")


class Asked:
    """What one method answered: tokens and logits of every step, and what was counted."""

    def __init__(self, decoder, method, budget):
        self._call = decoder.begin(method, budget, f"{method.name}{budget}")
        self.right = 0
        self.tokens, self.logits = [], []

    def ask(self, session, questions):
        for question in questions:
            answer = []
            for i, logits in enumerate(session.logits(self._call, _fed(question, answer)), 1):
                self.logits.append(logits)
                self.tokens.append(int(logits.argmax()))
                if i >= len(question.tokens):
                    answer.append(self.tokens[-1])
            self.right += tuple(answer) == question.expected

    def count(self, decoder):
        self.counters = ops.counters()
        self.activity = decoder.activity()
        self.masses = decoder.attention.kept.masses


def _fed(question, answer):
    yield from question.tokens
    yield answer[0]


class Recall:
    """One number of records; every method and budget is asked once, when it is first wanted."""

    def __init__(
        self, decoder, num_records, num_tokens=CONTEXT_TOKENS, num_questions=NUM_QUESTIONS
    ):
        self.group = recall_group(f"recall-{num_records}", num_tokens, num_questions, 512, seed=0)
        self.contexts = [self.group.make(i) for i in range(self.group.num_contexts)]
        self.decoder = decoder
        self.sessions = [self.session() for _ in self.contexts]
        self._asked = {}
        self.fill()

    def session(self):
        return Session(self.decoder.model, self.group.max_seq_len)

    def fill(self):
        self.decoder.model.set_attn_implementation("sdpa")
        for session, context in zip(self.sessions, self.contexts):
            session.prefill(context.tokens)

    def __call__(self, method, budget=256):
        if (method, budget) not in self._asked:
            self._asked[method, budget] = self.ask(method, budget)
        return self._asked[method, budget]

    def ask(self, method, budget, asked=slice(None)):
        """``asked``: which questions of each context."""
        found = Asked(self.decoder, method, budget)
        for session, context in zip(self.sessions, self.contexts):
            found.ask(session, context.questions[asked])
        found.count(self.decoder)
        return found

    def attended(self, method, budget, asked=slice(None)):
        """Of each call that left something out, bool [num_q_heads, num_pages]."""
        with kept_pages() if method.kind == REFERENCE else recorded_pages() as found:
            self.ask(method, budget, asked)
        return found
