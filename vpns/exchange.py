"""How does a finished run leave for other tools? As ONNX or as a plain state_dict, read back and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from vpns.deploy import check_logits, first_images
from vpns.files import replace_file
from vpns.inference import Inference
from vpns.run import open_finished
from vpns.stages.networks import load_start
from vpns.stages.pruned import Pruned, load_pruned
from vpns_kernels.onnx_file import run_onnx, to_onnx
from vpns_kernels.patterns import Channel, parse_pattern
from vpns_kernels.shrink import shrink

_IMAGES = 5
# Of the largest logit: ONNX Runtime sums in another order.
_LARGEST_ERROR = 1e-4


def export_as(folder: Path, kind: Literal["onnx", "torch"]) -> Path:
    """Write export/network.onnx or export/network.pth; returns its path.

    onnx: images [N, 3, size, size] in [0, 1] → logits of the classes, with prompt and label map; of the
    channel pattern the smaller network, else zeros in place. torch: the state_dict that torch.load takes.

    Raises:
        NotImplementedError: packages of the extra [onnx] that are missing.
        RuntimeError: what is read back does not compute what the run's network does (a defect).
    """
    context = open_finished(folder)
    pruned = load_pruned(context).cpu()
    images = first_images(context, pruned, _IMAGES)
    if kind == "torch":
        path = context.stage_folder("export") / "network.pth"
        replace_file(path, lambda tmp: torch.save(pruned.network.state_dict(), tmp))
        plain = load_start(context).eval().cpu()
        plain.load_state_dict(torch.load(path, weights_only=True))
        found = _inference(pruned, plain)(images)
    else:
        path = context.stage_folder("export") / "network.onnx"
        network = pruned.network
        if isinstance(parse_pattern(context.config.pattern), Channel):
            network = shrink(network)
        content = to_onnx(_inference(pruned, network), images[:2], any_batch=True)
        replace_file(path, lambda tmp: _write_bytes(tmp, content))
        found = run_onnx(path.read_bytes())(images)
    check_logits(path, found, _inference(pruned, pruned.network)(images), _LARGEST_ERROR)
    return path


def _inference(pruned: Pruned, network: nn.Module) -> Inference:
    return Inference(pruned.prompt, network, pruned.is_prompted, pruned.label_map)


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
