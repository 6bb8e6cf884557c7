"""Is accuracy kept, does the prompt help, and could it be chance?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from vpns.report.facts import Facts
from vpns.report.finding import Finding, Verdict
from vpns.report.pairs import accuracy_error

# Points of accuracy that pruning may cost.
TOLERATED_DROP = 1.5


def judge_accuracy(facts: Facts) -> Finding:
    """Against dense, at the run's own inference setting."""
    pair = facts.pair("dense", facts.own)
    drop = 0.0 - pair.difference
    name = "accuracy drop against dense, points"
    if drop <= TOLERATED_DROP:
        cause = f"Only dense gets {pair.only_first:,} of the images right, only sparse {pair.only_second:,}."
        return Finding(name, drop, TOLERATED_DROP, "ok", cause)
    return Finding(name, drop, TOLERATED_DROP, "failed", _explain_drop(facts))


def _explain_drop(facts: Facts) -> str:
    """Learned too little, or learned what does not carry over: training images tell."""
    trained = {row["stage"]: row["train_accuracy"] for row in facts.metrics}
    if "tune" not in trained or "dense" not in trained:
        return "Tuning trained no epoch: raise tune.epochs."
    both = f"{trained['tune']:.1f}% of training images right in the last epoch, dense {trained['dense']:.1f}%"
    validated = facts.result("tune")["val_accuracy"]
    if validated < trained["tune"] / 2:
        return (
            f"Validation stays at {validated:.1f}% ({both}): the running averages of batch norm lag behind "
            f"the pruned network after only {facts.result('tune')['updates']} updates. Raise search.epochs "
            "and tune.epochs."
        )
    if trained["tune"] < trained["dense"] - TOLERATED_DROP:
        return (
            f"The sparse network has learned less ({both}): raise tune.epochs, tune.lr or density; a finer "
            "pattern keeps more accuracy."
        )
    return (
        f"The sparse network has learned as much ({both}), yet it does not carry over: take more training "
        "images, more search.epochs, or a higher density."
    )


def judge_prompt(facts: Facts) -> Finding:
    """The tuned network with its prompt against itself without."""
    name = "accuracy gained by the prompt at inference, points"
    if not facts.has_prompt:
        return Finding(name, None, 0.0, "absent", "This run has no prompt.")
    pair = facts.pair("sparse", "sparse, prompted")
    gain, is_own = pair.difference, facts.result("eval")["is_prompted"]
    if abs(gain) < 2 * pair.standard_error:
        cause = f"Within two standard errors ({2 * pair.standard_error:.1f}) of none, so it may be chance."
        return Finding(name, gain, 0.0, "unclear", cause)
    if gain < 0 and is_own:
        cause = (
            "The prompt harms where it is applied: it was not learned long enough, or too fast. Change "
            "search.prompt_lr, raise search.epochs, or leave it out with prompt.at_inference=false."
        )
        return Finding(name, gain, 0.0, "failed", cause)
    if gain < 0:
        return Finding(name, gain, 0.0, "ok", "This run's own inference leaves the prompt out, rightly.")
    if is_own:
        cause = (
            "The network never trained without its prompt, so taking it away shifts its input: no evidence "
            "of a gain. Compare with a run of prompt.prompt_in=none."
        )
        return Finding(name, gain, 0.0, "ok", cause)
    cause = "This run's own inference leaves the prompt out: prompt.at_inference=true would gain that much."
    return Finding(name, gain, 0.0, "ok", cause)


def judge_certainty(facts: Facts) -> Iterator[Finding]:
    """A drop can be seen where it is two standard errors; below one it is noise."""
    limit = TOLERATED_DROP / 2
    name = "standard error of validation accuracy, points"
    error = accuracy_error(facts.result("tune")["val_accuracy"], facts.val_images)
    needed = math.ceil(facts.val_images * (error / limit) ** 2)
    hint = f"take some {needed:,} (data.val_fraction)."
    yield _judge_error(name, error, limit, f"{facts.val_images:,} validation images", hint)
    pair = facts.pair("dense", facts.own)
    needed = math.ceil(pair.images * (pair.standard_error / limit) ** 2)
    name = "standard error of the accuracy drop, points"
    hint = f"take some {needed:,}, or the mean over several seeds."
    yield _judge_error(name, pair.standard_error, limit, f"{pair.images:,} test images", hint)


def _judge_error(name: str, error: float, limit: float, images: str, hint: str) -> Finding:
    if error <= limit:
        return Finding(name, error, limit, "ok", f"{images} tell {TOLERATED_DROP} points from chance.")
    verdict: Verdict = "failed" if error > TOLERATED_DROP else "unclear"
    cause = (
        f"Too few images: {images} cannot tell differences below {2 * error:.1f} points from chance; {hint}"
    )
    return Finding(name, error, limit, verdict, cause)
