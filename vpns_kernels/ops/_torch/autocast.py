"""What dtype does an op of ours compute in under autocast? That of torch's convolutions."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype to which autocast brings the inputs of convolutions; x itself where it is off.

    >>> x = torch.ones(2)
    >>> autocast_input(x) is x
    True
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_input(x).dtype
    torch.bfloat16
    """
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    # As torch: double precision was asked for and stays.
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))
