"""Which of a run's adapters to keep: the one that gains most likeness for what it loses.

A run first learns what its photos show; later it no longer does what else a prompt asks, and draws
every thing of the kind like the photos. The rule counts likeness gained against both, each in the
difference that users tell apart: DreamBooth (arXiv:2208.12242, section 4.2) finds differences of
about 0.1 in DINO and of 0.05 in CLIP-T significant in their preference.

    points = (likeness - base's) / 0.1 + (CLIP-T - base's) / 0.05 - prior drift / 0.1

likeness is DINO where such a judge is given, else CLIP-I; prior drift is that of the same judge. A
term whose score is missing is left out; where sprites are named, the share of known ones that was
lost stands in for prior drift. Without a likeness the least validation loss decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.common.score_names import LOSS
from trainer.evaluation.examiner import Scores

ALIKE, ALIGNED, DRIFT = 0.1, 0.05, 0.1  # the differences that count as one point


@dataclass(frozen=True)
class RuleTerm:
    """A score that counts, as its difference from the base's times `weight`."""

    line: str
    weight: float
    words: str


@dataclass(frozen=True)
class Choice:
    """The step to keep, None where no score tells; why: one sentence; points: of each step, by the
    rule, empty where it was not used."""

    step: int | None
    why: str
    points: Mapping[int, float]


def step_to_keep(base: Scores, steps: Mapping[int, Scores]) -> Choice:
    """steps: the scores of the adapters by their steps. Of equals the earlier one is kept."""
    terms = _terms(base, list(steps.values()))
    if not terms:
        return _by_loss(steps)
    points = {
        step: sum(term.weight * _gain(term, base, scores) for term in terms)
        for step, scores in steps.items()
    }
    best = max(points, key=lambda step: (points[step], -step))
    seen = ", ".join(
        f"{term.line} {base[term.line]:.3f} -> {steps[best][term.line]:.3f}" for term in terms
    )
    rule = f"{points[best]:.2f} points, the most of {len(points)} steps, for "
    rule += f"{', '.join(term.words for term in terms)} ({seen})"
    if points[best] <= 0:
        rule += "; no step gains more than it loses against the base, so look at the pictures"
    return Choice(best, f"keep step {best}: {rule}", points)


def _terms(base: Scores, steps: list[Scores]) -> list[RuleTerm]:
    """What counts; nothing without a likeness."""
    every = [base, *steps]

    def known(*starts: str) -> str | None:
        lines = [line for start in starts for line in base if line.startswith(start)]
        whole = [line for line in lines if all(own.get(line) is not None for own in every)]
        return whole[0] if whole else None

    likeness = known("DINO", "CLIP-I")
    if likeness is None:
        return []
    terms = [RuleTerm(likeness, 1 / ALIKE, f"likeness gained (+ {likeness} / {ALIKE})")]
    if (aligned := known("CLIP-T")) is not None:
        said = f"text alignment (+ {aligned} / {ALIGNED})"
        terms.append(RuleTerm(aligned, 1 / ALIGNED, said))
    own = "PRES (DINO)" if likeness.startswith("DINO") else "PRES (CLIP)"
    if (shown := known("known sprites")) is not None:
        terms.append(RuleTerm(shown, 1 / DRIFT, f"known sprites kept (+ {shown} / {DRIFT})"))
    elif (drift := known(own)) is not None:
        terms.append(RuleTerm(drift, -1 / DRIFT, f"prior drift (- {drift} / {DRIFT})"))
    return terms


def _gain(term: RuleTerm, base: Scores, scores: Scores) -> float:
    now, before = scores[term.line], base[term.line]
    assert now is not None and before is not None, "a term is known of every column"
    return now - before


def _by_loss(steps: Mapping[int, Scores]) -> Choice:
    losses = {step: scores.get(LOSS) for step, scores in steps.items()}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    if not known:
        return Choice(None, "no score tells which step to keep; look at the pictures", {})
    best = min(known, key=lambda step: (known[step], step))
    return Choice(
        best, f"keep step {best}: its validation loss is the least, {known[best]:.4g}", {}
    )
