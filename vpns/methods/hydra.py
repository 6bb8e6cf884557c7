"""HYDRA: scores are learned on plain images (Sehwag et al., 2020; here one budget for all layers)."""

from __future__ import annotations

from vpns.methods.base import Method, register, scaled_start

HYDRA = register(Method("hydra", scaled_start, learns_scores=True, is_prompted=False))
