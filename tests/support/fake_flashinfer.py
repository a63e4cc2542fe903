"""The part of FlashInfer that is used, in plain torch, with its signatures and its conditions.

After flashinfer/decode.py of FlashInfer 0.6 (August 2026): page tables of int32, caches in the
layout asked for with the same strides for keys and values.
"""

import importlib.machinery
import math
import types

import torch


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
        jit_args=None,
    ):
        assert float_workspace_buffer.dtype == torch.uint8 and not float_workspace_buffer.any()
        assert kv_layout == "HND"
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert use_cuda_graph == all(isinstance(x, torch.Tensor) for x in buffers)
        self.use_tensor_cores = use_tensor_cores
        self.num_plans = 0

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        pos_encoding_mode="NONE",
        q_data_type="float16",
        kv_data_type=None,
        sm_scale=None,
    ):
        for tensor in (indptr, indices, last_page_len):
            assert tensor.dtype == torch.int32 and tensor.dim() == 1
        assert len(indptr) == len(last_page_len) + 1 and int(indptr[-1]) == len(indices)
        assert (indptr.diff() >= 1).all()
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        assert num_qo_heads % num_kv_heads == 0 and head_dim in (64, 128, 256)
        # Without tensor cores it is compiled for these groups alone.
        assert self.use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 4, 8)
        self.planned = (indptr, indices, last_page_len, page_size, q_data_type, kv_data_type)
        self.heads = (num_qo_heads, num_kv_heads, head_dim)
        self.sm_scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
        self.num_plans += 1

    def run(self, q, paged_kv_cache, *, out=None, lse=None, return_lse=False):
        indptr, indices, last_page_len, page_size, q_dtype, kv_dtype = self.planned
        num_qo_heads, num_kv_heads, head_dim = self.heads
        keys, values = paged_kv_cache
        assert q.shape == (len(last_page_len), num_qo_heads, head_dim) and q.dtype == q_dtype
        assert keys.dtype == values.dtype == kv_dtype
        assert keys.stride() == values.stride() and keys.stride(-1) == 1
        assert keys.shape[1:] == values.shape[1:] == (num_kv_heads, page_size, head_dim)
        assert not return_lse
        outs = []
        for row, query in enumerate(q.float()):
            pages = indices[indptr[row] : indptr[row + 1]].long()
            num_tokens = (len(pages) - 1) * page_size + int(last_page_len[row])
            key, value = (x[pages, 0].flatten(0, 1)[:num_tokens].float() for x in (keys, values))
            logits = query @ key.mT * self.sm_scale
            outs.append(logits.softmax(-1) @ value)
        return torch.stack(outs).to(q.dtype)


def module():
    found = types.ModuleType("flashinfer")
    found.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    found.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    return found
