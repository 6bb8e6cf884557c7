"""What did a run end with? The pruned network, its masks, prompt and label map, ready to use."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from vpns.files import read_tensors
from vpns.label_map import LabelMap
from vpns.prompt import Prompt
from vpns.stages.context import Context
from vpns.stages.networks import is_prompted_at_inference, label_map_from_list, load_trained, make_prompt


@dataclass(frozen=True, eq=False)
class Pruned:
    """A tuned sparse network, in eval mode.

    Args:
        network: plain, with zeros where weights are pruned.
        masks: bool masks of the pattern's units, by name of the layer (or, for channels, of the stream).
        is_prompted: whether the run's own inference applies the prompt.
    """

    network: nn.Module
    masks: dict[str, Tensor]
    prompt: Prompt
    label_map: LabelMap
    is_prompted: bool

    def cpu(self) -> Pruned:
        """The same, on the CPU; what was elsewhere is moved."""
        return replace(
            self, network=self.network.cpu(), prompt=self.prompt.cpu(), label_map=self.label_map.cpu()
        )


def load_pruned(context: Context) -> Pruned:
    """Read what tune wrote."""
    folder = context.stage_folder("tune")
    label_map = label_map_from_list(context.finished["search"].result["label_map"])
    return Pruned(
        network=load_trained(context, "tune").eval(),
        masks=read_tensors(folder / "masks.safetensors"),
        prompt=make_prompt(context, read_tensors(folder / "prompt.safetensors")),
        label_map=label_map.to(context.device),
        is_prompted=is_prompted_at_inference(context.config),
    )
