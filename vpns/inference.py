"""What does a finished run compute? Images in [0, 1] → logits of the task's classes, as one network."""

from __future__ import annotations

from torch import Tensor, nn

from vpns.label_map import LabelMap
from vpns.prompt import Prompt


class Inference(nn.Module):
    """The run's own inference, in evaluation mode.

    Args:
        is_prompted: whether it applies the prompt.
        label_map: without one, logits are those of the source classes.
    """

    def __init__(
        self, prompt: Prompt, network: nn.Module, is_prompted: bool, label_map: LabelMap | None = None
    ) -> None:
        super().__init__()
        self.prompt, self.network, self.is_prompted = prompt, network, is_prompted
        self.label_map = LabelMap() if label_map is None else label_map
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, image_size, image_size] → [N, classes]."""
        logits: Tensor = self.label_map(self.network(self.prompt(images, self.is_prompted)))
        return logits
