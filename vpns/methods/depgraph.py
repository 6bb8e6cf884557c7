"""DepGraph (Fang et al., 2023), by torch-pruning itself: channels go with all that depends on them."""

from __future__ import annotations

import torch
from torch import Tensor

from vpns.masking import rank
from vpns.methods.base import Method, Start, expect_channels, register
from vpns_kernels.channels import trace_streams
from vpns_kernels.convert import stream_name

# The dependencies of a network do not change with the size of its images, as long as they are not too small.
_SIDE = 64


def score_groups(start: Start) -> dict[str, Tensor]:
    """Ranks, by stream, of torch-pruning's group magnitude in the fine-tuned network."""
    expect_channels("depgraph", start.pattern)
    assert start.fine_tuned is not None
    try:
        import torch_pruning
    except ImportError as error:
        raise ValueError(
            f"method depgraph: expected torch-pruning, got {error} "
            "(pip install -c constraints.txt -e '.[peers]')"
        ) from error
    network = start.fine_tuned.cpu().eval()
    example = torch.zeros(1, 3, _SIDE, _SIDE)
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=example)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    _, streams = trace_streams(network)
    scores = {}
    for number, stream in enumerate(streams):
        first = network.get_submodule(stream.producers[0])
        prune = graph.get_pruner_of_module(first).prune_out_channels
        group = graph.get_pruning_group(first, prune, idxs=list(range(stream.channels)))
        scores[stream_name(number)] = rank(importance(group).detach())
    return scores


DEPGRAPH = register(
    Method("depgraph", score_groups, learns_scores=False, is_prompted=False, needs_fine_tuned=True)
)
