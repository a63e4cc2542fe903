"""Why an attention call was treated as it was."""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """The reason for each row of the report; the value is what a user reads."""

    SPARSE = "reads only the selected pages"
    DENSE_LAYER = "one of the first num_dense_layers layers"
    UNKNOWN_LAYER = (
        "num_dense_layers or budget asks which layer this is, and the graph does not say"
    )
    BUDGET_COVERS_CACHE = "the budget covers the whole cache"
    PREFILL = "many queries at once: attends everything, page summaries kept up to date"
    PREFILL_ALONE = "many queries at once: attends everything, over no static cache"
    NOT_A_CACHE = "keys or values do not come from a static cache (DynamicCache, or none)"
    COMPUTED_FROM_CACHE = "keys or values are computed from the cache at every step (MLA)"
    CACHE_CREATED_IN_GRAPH = "the cache is created inside this graph (first call of a new cache)"
    NO_CACHE_WRITE = "nothing is written to this cache here (cross attention)"
    UNKNOWN_CACHE_WRITE = (
        "the cache is written in a way that is not known (sliding window, rolling)"
    )
    UNKNOWN_CACHE_USE = "the cache is also used in a way that is not known, which might write it"
    UNKNOWN_POSITION = "the positions written are not known to count on (rolling buffer)"
    SEVERAL_CACHE_WRITES = "the cache is written more than once"
    READ_BEFORE_WRITE = "the cache is read before the new keys are written"
    UNKNOWN_CACHE_READ = "the cache is read through operations that are not known (slicing)"
    KEY_VALUE_MISMATCH = "key and value cache differ in shape, position or number of repeats"
    HEAD_COUNTS = "batch or head counts of query and cache do not fit"
    LAYOUT = "head_dim is not contiguous in the cache"
    HEAD_DIM = "head_dim is not a multiple of 8 up to 256"
    DTYPE = "dtype is not float32, bfloat16 or float16, or differs (query, cache, autocast)"
    NO_MASK = "no attention mask: the call attends unwritten positions too"
    MASK_DTYPE = "the mask is not boolean: a bias would not be seen by the page scores"
    MASK_SHAPE = "the mask is not [batch or 1, heads or 1, queries or 1, max_seq_len]"
    IS_CAUSAL = "is_causal=True with one query attends the first key only"
    DROPOUT = "dropout is active"
    GRADIENTS = "gradients are enabled and wanted (use torch.no_grad())"
    TENSOR_SUBCLASS = "query or cache is a tensor subclass (DTensor, quantised)"


class LinearReason(enum.Enum):
    """Why a linear layer is left to torch."""

    MANY_ROWS = "many rows at once"
    TENSOR_SUBCLASS = "input or weight is a tensor subclass (DTensor, quantised)"
    GRADIENTS = "gradients are enabled and wanted (use torch.no_grad())"
    DTYPE = "dtype is not float32, bfloat16 or float16, or differs (input, weight, bias, autocast)"
    LAYOUT = "the weight is not [out_features, a multiple of 8], with rows that are contiguous"


class Refused(Exception):
    """Raised inside the matcher where a call turns out not to be a site."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def require(condition: object, reason: Reason) -> None:
    """Refuse the call with this reason unless the condition holds."""
    if not condition:
        raise Refused(reason)
