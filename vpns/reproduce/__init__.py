"""Experiments in one command each: the four arms, and the paper's first three."""

from vpns.reproduce.command import EXPERIMENTS, do_reproduce, make_grid

__all__ = ["EXPERIMENTS", "do_reproduce", "make_grid"]
