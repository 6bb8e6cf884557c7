"""Whose data may be read behind the back of torch's dispatcher?"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

_PLAIN_TYPES = (Tensor, nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Whether x is only what its memory holds, and nobody watches what is done with it.

    Fake and wrapped tensors have no data, lazily negated ones hold the opposite; tracers, transforms of
    functions, dispatch modes (counters of FLOPs, say) and forward-mode derivatives must see an op.
    """
    return (
        type(x) in _PLAIN_TYPES
        and not torch.compiler.is_compiling()
        and not x.is_neg()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )
