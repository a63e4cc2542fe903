"""What the operators support of tensors; what they support of settings is in settings.py."""

from __future__ import annotations

import torch

HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 256
IN_FEATURES_MULTIPLE = 8
MAX_LINEAR_ROWS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
