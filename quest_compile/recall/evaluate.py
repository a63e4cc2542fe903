"""Dense accuracy on the record-recall task."""

import torch
from transformers import DynamicCache, PreTrainedModel

from quest_compile.decoding import cache_names
from quest_compile.recall.task import ANSWER_LEN, RecallContext


@torch.no_grad()
def evaluate_dense(model: PreTrainedModel, context: RecallContext) -> float:
    """The share of questions answered exactly by greedy decoding with dense attention.

    The right first answer token is fed instead of the model's own: where the two differ the answer
    is wrong in any case, so this counts what greedy decoding would.
    """
    cache = DynamicCache()
    cached = {cache_names()[0]: cache}
    model(context.tokens[None], **cached, logits_to_keep=1)
    num_right = 0
    for question, answer in zip(context.questions, context.answers, strict=True):
        fed = torch.cat([question, answer[:-1]])
        logits = model(fed[None], **cached, logits_to_keep=ANSWER_LEN).logits[0]
        cache.crop(-len(fed))
        num_right += int(torch.equal(logits.argmax(-1), answer))
    return num_right / len(context.questions)
