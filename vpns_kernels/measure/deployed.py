"""How is a pruned network run where it is measured? Compiled; made smaller first where channels are gone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpns_kernels.convert import sparsify
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.engine import Engine, compile
from vpns_kernels.measure.timing import interleave
from vpns_kernels.patterns import Channel, Pattern
from vpns_kernels.shrink import shrink
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

_LAYER_ROUNDS = 10
_SPARSE = (SparseConv2d, SparseLinear)


class Deployed:
    """A compiled network, and what its layers were before.

    Args:
        network: in evaluation mode, zeros where pruned.
        pattern: of its mask; None where it is not known.
        x: [N, C, H, W] float32.
        dtype: as compile takes it.
        engine: of this network, where it is compiled already.
    """

    def __init__(
        self,
        network: nn.Module,
        pattern: Pattern | None,
        x: Tensor,
        dtype: str = "auto",
        engine: Engine | None = None,
    ) -> None:
        self._pattern, self._channels_before = pattern, _count_channels(network)
        self._images = len(x)
        if engine is None:
            may_shrink = pattern is None or isinstance(pattern, Channel)
            engine = compile(shrink(network) if may_shrink else network, x, dtype=dtype)  # type: ignore[arg-type]
        self.engine = engine

    @property
    def dtype(self) -> str:
        """The type of activations and weights inside, such as "bfloat16"."""
        plan = self.engine.plan
        assert plan.input is not None
        return dtype_name(plan.values[plan.input].dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The engine's outputs."""
        return self.engine(x)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Figures by layer, for the whole batch: sparse_ms, ms (what was chosen), choice, kernel, reason."""
        found, cuts = {}, self._cuts()
        for row in self.engine.explain(quiet=True).rows():
            cut = cuts.get(row["name"])
            is_sparse = row["is_sparse"] or cut is not None
            sparse_ms = row["ms"] if cut is not None else row["sparse_ms"]
            found[row["name"]] = {
                "sparse_ms": None if sparse_ms is None else sparse_ms * self._images,
                "ms": row["ms"] * self._images,
                "choice": "sparse" if is_sparse else "dense",
                "kernel": row["kernel"] or row["op"],
                "reason": row["reason"] if cut is None or row["is_sparse"] else cut,
            }
        return found

    def dense_ms(self) -> dict[str, float]:
        """Milliseconds by layer, for the whole batch, with everything, as timed when compiling."""
        rows = self.engine.explain(quiet=True).rows()
        return {row["name"]: row["dense_ms"] * self._images for row in rows if row["dense_ms"] is not None}

    def _cuts(self) -> dict[str, str]:
        """Layers that channel pruning has made smaller, and by how much in words."""
        if self._pattern is not None and not isinstance(self._pattern, Channel):
            return {}
        layers = self.engine.plan.layers
        cuts = {}
        for layer in layers:
            g = layer.packed.geometry
            outputs, inputs = self._channels_before.get(layer.name, (g.out_channels, g.in_channels))
            left = [(g.out_channels, outputs, "output"), (g.in_channels, inputs, "input")]
            if layer is layers[-1]:
                # Results are fewer only where a label map takes some of them, which prunes nothing.
                del left[0]
            told = [f"{now} of {before} {kind}" for now, before, kind in left if now != before]
            if told:
                cuts[layer.name] = (
                    f"channel pruning left {' and '.join(told)} channels; the smaller layer runs dense"
                )
        return cuts


class Untraced:
    """A network that no engine can take over, as torch runs it in float32: its pruned layers are sparse."""

    dtype = "float32"

    def __init__(self, network: nn.Module, pattern: Pattern | None, x: Tensor, *_: object) -> None:
        self._network = sparsify(network, pattern=pattern).to(x.device).eval()
        self._x = x

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The network's outputs."""
        y: Tensor = self._network(x)
        return y

    def rows(self) -> dict[str, dict[str, Any]]:
        """Figures by layer as `Deployed.rows` has them: each layer is timed alone."""
        calls = record_layers(self._network, self._x, (*_SPARSE, nn.Conv2d, nn.Linear))
        with torch.no_grad():
            timed = interleave({name: partial(layer, x) for name, layer, x in calls}, _LAYER_ROUNDS)
        found = {}
        for name, layer, x in calls:
            is_pruned, took_ms = isinstance(layer, _SPARSE), timed[name].median_ms
            kernel = layer.kernel_for(x) if is_pruned else "dense"
            found[name] = {
                "sparse_ms": took_ms if is_pruned else None,
                "ms": took_ms,
                "choice": "dense" if kernel == "dense" else "sparse",
                "kernel": "torch" if kernel == "dense" else kernel,
                "reason": "the network cannot be traced: torch calls each layer",
            }
        return found

    def dense_ms(self) -> dict[str, float]:
        """No times: no engine has made a choice."""
        return {}


# A pruned network, ready to run.
Deployment = Deployed | Untraced


def record_layers(
    network: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...]
) -> list[tuple[str, Any, Tensor]]:
    """The layers of these kinds as a forward pass calls them: name, module and input."""
    found: list[tuple[str, Any, Tensor]] = []
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, kinds):

            def note(layer: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                found.append((name, layer, args[0]))

            hooks.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _count_channels(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Output and input channels of each layer, by name."""
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            found[name] = (layer.out_channels, layer.in_channels)
        elif isinstance(layer, nn.Linear):
            found[name] = (layer.out_features, layer.in_features)
    return found
