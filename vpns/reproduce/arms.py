"""Is it the prompt that helps? Four arms that differ in nothing else, paired by seed.

An arm without a prompt sees the image on the whole canvas at the same cost; a frame that is never learned
tells what shrinking the image costs; the shrunken image alone, at the density that costs as many operations,
tells whether smaller images would do as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpns.config import RunConfig
from vpns.report.arms import Arm
from vpns.reproduce.experiment import Comparison, DottedSettings, Experiment, keep_existing

FULL, FROZEN, LEARNED, INSIDE = "a_full_image", "b_frozen_frame", "c_learned_frame", "d_inside_alone"


def build_axes(config: RunConfig) -> DottedSettings:
    """The four arms at the run's own canvas, frame and density."""
    prompt = config.prompt
    inside = prompt.canvas - 2 * prompt.frame
    same_flops = min(1.0, config.density * (prompt.canvas / inside) ** 2)
    return {
        "arm": {
            FULL: {"method": "hydra"},
            FROZEN: {"prompt.frozen": True},
            LEARNED: {},
            INSIDE: {
                "method": "hydra",
                "prompt.canvas": inside,
                "prompt.frame": 0,
                "density": round(same_flops, 4),
            },
        }
    }


def compare(arms: Sequence[Arm]) -> list[Comparison]:
    """The prompt against none is what the experiment is for."""
    wanted = [
        Comparison(FULL, LEARNED, is_primary=True),
        Comparison(FROZEN, LEARNED),
        Comparison(INSIDE, LEARNED),
    ]
    return keep_existing(wanted, arms)


ARMS = Experiment(
    name="arms",
    title="Is it the prompt? Four arms on paired seeds",
    question="Does a learned frame gain accuracy over the same pruning without a prompt?",
    # Four hundred images and not a hundred: with those the differences of a pilot's three seeds spread by 1.8
    # points, through which no half hour sees half a point.
    embedded={
        "pattern": "block:16x16",
        "density": 0.1,
        "prompt.frame": 4,
        "data.train_count": 400,
        "search.epochs": 15,
        "tune.epochs": 8,
    },
    # Differences between arms spread by 1.8 points over 100 seeds: so many pairs see half a point.
    seeds=104,
    build_axes=build_axes,
    until="eval",
    compare=compare,
    wanted_points=0.5,
)
