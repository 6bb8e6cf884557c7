"""How is a pruned network run where it is measured? Compiled; made smaller first where channels are gone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vpns_kernels.engine import Engine, compile
from vpns_kernels.patterns import Channel, Pattern
from vpns_kernels.shrink import shrink


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
        self._sizes_before = _sizes(network)
        self._images = len(x)
        if engine is None:
            may_shrink = pattern is None or isinstance(pattern, Channel)
            engine = compile(shrink(network) if may_shrink else network, x, dtype=dtype)  # type: ignore[arg-type]
        self.engine = engine

    @property
    def dtype(self) -> str:
        """Of activations and weights."""
        plan = self.engine.plan
        assert plan.input is not None
        return str(plan.values[plan.input].dtype).removeprefix("torch.")

    def __call__(self, x: Tensor) -> Tensor:
        """The engine's outputs."""
        return self.engine(x)

    def rows(self) -> dict[str, dict[str, Any]]:
        """By layer, for the whole batch: sparse_ms, ms of what was chosen, choice, kernel and reason."""
        after = {layer.name: layer.packed.geometry.weight_shape[:2] for layer in self.engine.plan.layers}
        found = {}
        for row in self.engine.explain(quiet=True).rows():
            name = row["name"]
            before_it = self._sizes_before.get(name)
            is_smaller = name in after and before_it not in (None, after[name])
            sparse_ms = row["ms"] if is_smaller else row["sparse_ms"]
            reason = row["reason"]
            if is_smaller and not row["is_sparse"]:
                before, now = (" ".join(map(str, sizes)) for sizes in (before_it or (), after[name]))
                reason = f"cut: {now} of {before} output and input channels are left"
            found[name] = {
                "sparse_ms": None if sparse_ms is None else sparse_ms * self._images,
                "ms": row["ms"] * self._images,
                "choice": "sparse" if row["is_sparse"] or is_smaller else "dense",
                "kernel": row["kernel"] or row["op"],
                "reason": reason,
            }
        return found

    def dense_ms(self) -> dict[str, float]:
        """By layer, for the whole batch: without what was pruned, as the engine timed it when it chose."""
        rows = self.engine.explain(quiet=True).rows()
        return {row["name"]: row["dense_ms"] * self._images for row in rows if row["dense_ms"] is not None}


def _sizes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(module.weight.shape[:2])
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
