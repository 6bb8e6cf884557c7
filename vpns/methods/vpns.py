"""VPNs: scores and a visual prompt are learned together (the paper's method)."""

from __future__ import annotations

from vpns.methods.base import Method, register, scaled_start

VPNS = register(Method("vpns", scaled_start, learns_scores=True, is_prompted=True))
