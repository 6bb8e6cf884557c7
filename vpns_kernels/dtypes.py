"""What are the types of numbers called? As the native library, reports and the command line call them."""

from __future__ import annotations

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """The name without the prefix of torch, such as "float32"."""
    return str(dtype).removeprefix("torch.")


# Of all that the native library computes in; a table, for small calls would feel the making of a name.
DTYPE_NAMES = {d: dtype_name(d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
