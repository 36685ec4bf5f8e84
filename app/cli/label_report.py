"""Labels and their scores as a person reads them in the terminal."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from app.cli.terminal import console
from features.index import FeatureIndex
from features.labels import Label, Labels, Score, ScoreKind
from features.llm.cases import TASKS
from features.llm.explain import Explained
from features.llm.scoring import Scored
from features.own_label import not_scored_because
from features.score import counts

T = TypeVar("T")
_EXAMPLES = 5
_REASONS = 3


def print_automatic(index: FeatureIndex, labels: Labels) -> None:
    """How many labels predict well and better than their control, and some of every quality."""
    found = labels.all("automatic").values()
    n_live = sum(bool(index.count[label.feature] > 0) for label in found)
    scores = [(label, score) for label in found if (score := label.score_of("tokens"))]
    _say(
        f"  {n_live:,} of {index.d_sae:,} features fire. Their labels, on text that they were not made from:"
    )
    for threshold in (0.5, 0.8):
        n = sum(counts(score, threshold) for _, score in scores)
        _say(f"  F1 ≥ {threshold}, and above the shuffled control: {n:,} ({n / max(n_live, 1):.1%})")
    _say("  Some of them, from the best to the worst:")
    for label, score in _spread(sorted(scores, key=lambda item: -item[1].value)):
        upper, control = _figure(score.upper), _figure(score.control)
        figures = f"F1 {_figure(score.value)}, upper half of firings {upper}, control {control}; {score.n:,} firings"
        _say_label(label, figures)


def print_explained(result: Explained, record: Path) -> None:
    """How many features have a label, and why the others have none; ``record`` says it of each."""
    _say(f"  {counted(len(result.labels), 'feature')} labelled.")
    _print_reasons(result.failed.values(), "feature", f"got none (each is in {record})")


def print_labels(labels: Sequence[Label]) -> None:
    """Some labels, with the scores that they have."""
    for label in _spread(labels):
        _say(f"    {label.feature}: {label.summary}")


def print_own(label: Label) -> None:
    """A person's label and its score by its pattern, or why it has none."""
    _say(f"  {label.feature}: {label.summary}")
    score = label.score_of("tokens")
    if score is None:
        _say(f"  It is not scored: {not_scored_because(label)}.")
        return
    precision, recall, control = map(_figure, (score.precision, score.recall, score.control))
    _say(
        f"  precision {precision}, recall {recall}, upper half of firings {_figure(score.upper)},"
        f" shuffled control {control}; {counted(score.n, 'firing')} on text that nobody made it from"
    )


def counted(n: int, noun: str) -> str:
    """A number of things: ``1 feature``, ``2,000 features``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def print_scored(source: str, labels: Sequence[Label], result: Scored, judge: str) -> None:
    """Mean scores beside their controls, and some labels of every quality."""
    by = "their own patterns" if judge == "pattern" else judge
    if result.scores:
        what = counted(len(result.scores), f"{source} label")
        _say(f"  {what} judged by {by}, mean balanced accuracy (chance is 0.5):")
    for task in TASKS:
        scores = [score for some in result.scores.values() for score in some if score.kind == task]
        controls = [score.control for score in scores if score.control is not None]
        if scores:
            mean = sum(score.value for score in scores) / len(scores)
            control = f"{sum(controls) / len(controls):.2f}" if controls else "none"
            n_hard = sum(hard.get(task, 0) for hard in result.hard.values())
            share = n_hard / max(sum(score.n for score in scores) / 2, 1)
            _say(f"  {task:<10} {mean:.2f}, shuffled control {control}; {share:.0%} of negatives hard")
    by_id = {label_id: sorted(some, key=lambda score: score.kind) for label_id, some in result.scores.items()}
    judged = [(label, by_id[label.id]) for label in labels if label.id in by_id]
    if judged:
        _say("  Some of them, from the best to the worst, with 95% intervals:")
    for label, some in _spread(sorted(judged, key=lambda item: -item[1][0].value)):
        hard = result.hard[label.id or 0]
        _say_label(label, "; ".join(_in_words(score, hard) for score in some))
    _print_reasons(result.failed.values(), f"{source} label", "not scored in full")


def _print_reasons(reasons: Iterable[str], noun: str, what: str) -> None:
    """How many failed, and the commonest reasons."""
    found = Counter(reasons)
    if found:
        _say(f"  {counted(found.total(), noun)} {what}:")
    for reason, n in found.most_common(_REASONS):
        _say(f"    {n:,} × {reason}")
    if len(found) > _REASONS:
        _say(f"    and {len(found) - _REASONS:,} other reasons")


def _say(line: str, style: str | None = None) -> None:
    console.print(line, style=style, soft_wrap=True)


def _say_label(label: Label, figures: str = "") -> None:
    _say(f"    {label.feature}: {label.text}")
    if figures:
        _say(f"      {figures}", style="dim")


def _in_words(score: Score, hard: Mapping[ScoreKind, int]) -> str:
    interval = f"[{_figure(score.low)}, {_figure(score.high)}]"
    return (
        f"{score.kind} {_figure(score.value)} {interval} of {score.n} cases ({hard.get(score.kind, 0)} hard),"
        f" control {_figure(score.control)}"
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _spread(items: Sequence[T]) -> list[T]:
    """A few of them, evenly from the first to the last."""
    if len(items) <= _EXAMPLES:
        return list(items)
    return [items[round(place * (len(items) - 1) / (_EXAMPLES - 1))] for place in range(_EXAMPLES)]
