"""The starting weights of the recall model: a retrieval circuit set by hand, in small noise.

Layer 0 copies the codes of the previous two tokens into free channels of the residual stream, the
last layer looks for the position whose previous two tokens are the current last two, and copies the
token there. The middle layer and all MLPs start as small noise.

Residual stream (128 channels), filled by the embedding (`OWN`, `ONE`) and by layer 0 (the others):
the code of the token itself, the first channels of the codes of the two tokens before it, and a
constant from which layer 0 makes queries and keys that depend on the position alone.
"""

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from quest_compile.recall.task import FILLER, VOCAB_SIZE

HIDDEN_SIZE = 128
NUM_LAYERS = 3
NUM_Q_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 64
GROUP_SIZE = NUM_Q_HEADS // NUM_KV_HEADS
ROPE_THETA = 1e6

OWN = slice(0, 48)
PREVIOUS = slice(48, 88)
SECOND_PREVIOUS = slice(88, 127)
ONE = 127

CODE_SCALE = 0.25  # root mean square of a token's code, per channel
ONE_VALUE = 3 * CODE_SCALE
NOISE_STD = 0.02
# Of a new filler code, the part (in amplitude) that the fillers do not share.
FILLER_SPREAD = 0.3
# |q| and |k| per rotation pair in layer 0: the wanted distance leads its neighbours by 7 nats.
POSITION_SHARPNESS = 8.2
# Attention logit (nats) that one matching code adds in the last layer, and the gain of the copy.
MATCH_LOGIT = 9.0
COPY_GAIN = 4.0
# The last layer matches on the rotation pairs that turn by less than 1 radian in 4096 tokens.
FIRST_SLOW_PAIR = 20

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_Q_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    # transformers 5 reads rope_parameters, transformers 4 rope_theta.
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    "rope_theta": ROPE_THETA,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}


def _head(index: int) -> slice:
    return slice(index * HEAD_DIM, (index + 1) * HEAD_DIM)


def _attention_weights(model: LlamaForCausalLM, layer: int) -> dict[str, Tensor]:
    return {
        name: model.get_parameter(f"model.layers.{layer}.self_attn.{name}.weight")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }


def _codes(num_codes: int, generator: torch.Generator) -> Tensor:
    """Random codes [num_codes, 48] of equal length."""
    codes = torch.randn(num_codes, OWN.stop, generator=generator)
    return _rescaled(codes)


def _rescaled(codes: Tensor) -> Tensor:
    return codes * (CODE_SCALE * math.sqrt(OWN.stop) / codes.norm(dim=1, keepdim=True))


def _normalised_code_scale() -> float:
    """Root mean square per channel of an embedded token's code after RMSNorm."""
    square_sum = OWN.stop * CODE_SCALE**2 + ONE_VALUE**2
    return CODE_SCALE / math.sqrt(square_sum / HIDDEN_SIZE)


@torch.no_grad()
def structured_init(model: LlamaForCausalLM, seed: int) -> None:
    """Overwrites every matrix of a fresh model made from `CONFIG`; the norms stay at one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * NOISE_STD)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(0.3)
    _set_embedding(model.get_parameter("model.embed_tokens.weight"), generator)
    _set_previous_token_heads(_attention_weights(model, layer=0))
    _set_match_and_copy_heads(_attention_weights(model, layer=NUM_LAYERS - 1), generator)


def _set_embedding(weight: Tensor, generator: torch.Generator) -> None:
    """Random codes for the symbols; the fillers share most of theirs.

    In a trained model the keys of unremarkable tokens lie close together, and Quest lives on that:
    with 16 unrelated keys per page every page's elementwise maximum is about the same.
    """
    weight.zero_()
    weight[:, OWN] = _codes(VOCAB_SIZE, generator)
    weight[:, ONE] = ONE_VALUE
    shared = _codes(1, generator)
    own = _codes(len(FILLER), generator)
    mixed = math.sqrt(1 - FILLER_SPREAD**2) * shared + FILLER_SPREAD * own
    weight[FILLER.start : FILLER.stop, OWN] = _rescaled(mixed)


def _set_previous_token_heads(attention: dict[str, Tensor]) -> None:
    """Heads 0 and 1 copy the code of the token 1 and 2 positions back into the free channels.

    With queries and keys made from `ONE` alone, RoPE makes the logit a sum over the rotation pairs
    of cos(frequency * (distance - offset)), which peaks at distance == offset. Heads 2 and 3 attend
    in the same way (offsets 3 and 1) and write nothing yet.
    """
    num_pairs = HEAD_DIM // 2
    frequency = 1.0 / ROPE_THETA ** (torch.arange(num_pairs) / num_pairs)
    code_scale = _normalised_code_scale()
    sharpness = POSITION_SHARPNESS / (code_scale * ONE_VALUE / CODE_SCALE)

    for weight in attention.values():
        weight.zero_()
    for kv_head in range(NUM_KV_HEADS):
        attention["k_proj"][_head(kv_head)][:num_pairs, ONE] = sharpness
        attention["v_proj"][_head(kv_head)][: OWN.stop, OWN] = torch.eye(OWN.stop)
    for q_head, offset in enumerate((1, 2, 3, 1)):
        query = attention["q_proj"][_head(q_head)]
        query[:num_pairs, ONE] = sharpness * torch.cos(frequency * offset)
        query[num_pairs:, ONE] = -sharpness * torch.sin(frequency * offset)
    for q_head, channels in enumerate((PREVIOUS, SECOND_PREVIOUS)):
        size = channels.stop - channels.start
        output = attention["o_proj"][:, _head(q_head)]
        output[channels, :size] = torch.eye(size) * CODE_SCALE / code_scale


def _set_match_and_copy_heads(attention: dict[str, Tensor], generator: torch.Generator) -> None:
    """Query (own, previous) meets key (previous, second previous); value and output copy `OWN`."""
    num_pairs = HEAD_DIM // 2
    slow_pairs = torch.arange(FIRST_SLOW_PAIR, num_pairs)
    slow = torch.cat([slow_pairs, slow_pairs + num_pairs])
    sizes = [channels.stop - channels.start for channels in (PREVIOUS, SECOND_PREVIOUS)]
    strength = math.sqrt(MATCH_LOGIT * math.sqrt(HEAD_DIM) / sizes[0])
    copy = torch.zeros(HEAD_DIM, HIDDEN_SIZE)
    copy[: OWN.stop, OWN] = torch.eye(OWN.stop)

    for kv_head in range(NUM_KV_HEADS):
        query, key = torch.zeros(2, HEAD_DIM, HIDDEN_SIZE)
        own_to_previous, previous_to_second = (
            torch.randn(len(slow), size, generator=generator) * strength / math.sqrt(len(slow))
            for size in sizes
        )
        query[slow, OWN.start : OWN.start + sizes[0]] = own_to_previous
        key[slow, PREVIOUS] = own_to_previous
        query[slow, PREVIOUS.start : PREVIOUS.start + sizes[1]] = previous_to_second
        key[slow, SECOND_PREVIOUS] = previous_to_second
        attention["k_proj"][_head(kv_head)] = key
        attention["v_proj"][_head(kv_head)] = copy
        for q_head in range(kv_head * GROUP_SIZE, (kv_head + 1) * GROUP_SIZE):
            attention["q_proj"][_head(q_head)] = query
            output_gain = COPY_GAIN * 2 * CODE_SCALE / NUM_Q_HEADS
            attention["o_proj"][:, _head(q_head)] = copy.T * output_gain


@torch.no_grad()
def break_group_symmetry(model: LlamaForCausalLM, seed: int) -> None:
    """Makes the query heads of a group differ in the last layer.

    They start equal, so their gradients are equal and training keeps them equal. Then selecting
    pages per query head, by the group's sum or by one head of it would be the same, and a bug in
    grouped-query selection would be invisible.
    """
    generator = torch.Generator().manual_seed(seed)
    attention = _attention_weights(model, layer=NUM_LAYERS - 1)
    for q_head in range(NUM_Q_HEADS):
        sign = 1 if q_head % GROUP_SIZE == 0 else -1
        query = attention["q_proj"][_head(q_head)]
        query[:, OWN] *= 1 + 0.25 * sign
        query[:, OWN.stop :] *= 1 - 0.25 * sign
        query += torch.randn(query.shape, generator=generator) * query.std() * 0.3
        attention["o_proj"][:, _head(q_head)] *= 1 - 0.2 * sign
