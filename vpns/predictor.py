"""What turns images into logits? The prompt, then the network, in the run's precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpns.prompt import Prompt


class Predictor(nn.Module):
    """Images [N, 3, size, size] in [0, 1] → logits [N, source classes], as anybody would write it in torch.

    Args:
        dtype: bfloat16 runs the network under autocast; its parameters stay what they are.
    """

    def __init__(self, prompt: Prompt, network: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.prompt, self.network, self.dtype = prompt, network, dtype

    def forward(self, images: Tensor, prompted: bool) -> Tensor:
        """Args: prompted: False shows the same geometry without the prompt."""
        if self.dtype is None:
            return self.compute(images, prompted)
        with torch.autocast(images.device.type, self.dtype):
            return self.compute(images, prompted).float()

    def compute(self, images: Tensor, prompted: bool) -> Tensor:
        """The logits, in whatever precision is set around it."""
        logits: Tensor = self.network(self.prompt(images, prompted))
        return logits
