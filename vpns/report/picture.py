"""What does the prompt look like? Alone on grey, and on an image as the network sees it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vpns.config import PromptConfig
from vpns.data import make_batch
from vpns.prompt import build_prompt


@torch.no_grad()
def picture_prompt(config: PromptConfig, tensors: Mapping[str, Tensor], example: Tensor) -> dict[str, Tensor]:
    """Pictures [3, canvas, canvas] in [0, 1]: the learned prompt, the image without it and with it.

    Args:
        tensors: the learned prompt's.
        example: one image, uint8 [1, 3, H, W].
    """
    prompt = build_prompt(config)
    prompt.load_state_dict(dict(tensors))
    image = make_batch(example, prompt.image_size)
    # On mid-grey a prompt that is added shows in both directions, and one that starts there by its change.
    grey = torch.full_like(image, 0.5)
    return {
        "prompt": prompt.compose(grey, prompted=True)[0],
        "image": prompt.compose(image, prompted=False)[0],
        "prompted": prompt.compose(image, prompted=True)[0],
    }
