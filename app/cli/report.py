"""Results as a person reads them in the terminal."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.text import Text

from activations.models import LanguageModel
from activations.store import ActivationStore
from app.cli.terminal import console, print_text, table
from features.demonstration import Demonstration
from features.explain import visible
from features.labels import Labels
from sae.evaluate import Evaluation

CONTROL_NAMES = {"principal_components": "PCA", "reduced_rank": "linear map", "random_weights": "random SAE"}


def _figure(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"


def print_evaluation(evaluation: Evaluation) -> None:
    """The metrics with their 95% intervals, beside the controls at the same L0."""
    controls = list(evaluation.controls)
    rows = []
    for row in evaluation.rows():
        interval = "" if row.interval is None else " – ".join(_figure(bound) for bound in row.interval)
        beside = [_figure(row.controls[name]) if name in row.controls else "" for name in controls]
        rows.append([row.name, _figure(row.value), interval, *beside])
    table(["", "SAE", "95% interval", *(CONTROL_NAMES.get(name, name) for name in controls)], rows)
    console.print(
        f"  {evaluation.tokens:,} tokens of {evaluation.documents:,} documents of the {evaluation.split} split",
        style="dim",
    )


def print_sweep(evaluations: Mapping[str, Evaluation]) -> None:
    """The SAEs of a sweep, one a line, with 95% intervals."""

    def with_interval(evaluation: Evaluation, key: str) -> str:
        bounds = "–".join(_figure(bound) for bound in evaluation.intervals[key])
        return f"{_figure(getattr(evaluation, key))} ({bounds})"

    rows = [
        [
            name,
            _figure(evaluation.l0),
            with_interval(evaluation, "explained_variance"),
            with_interval(evaluation, "ce_loss_recovered"),
            "–" if evaluation.dead_fraction is None else f"{evaluation.dead_fraction:.1%}",
        ]
        for name, evaluation in evaluations.items()
    ]
    table(["", "L0", "explained variance", "CE loss recovered", "dead"], rows)


def print_store(store: ActivationStore) -> None:
    """How many rows of each hook count, and why the others do not."""
    for name in store.hook_names:
        held = store.at(name)
        left_out = (
            ", ".join(f"{n:,} {why}" for why, n in held.counts.items() if n and why != "kept") or "none"
        )
        console.print(
            f"  {name}: {held.counts['kept']:,} rows of width {held.width:,} count; left out: {left_out}",
            soft_wrap=True,
        )


def print_demonstration(shown: Demonstration, model: LanguageModel, labels: Labels, folder: Path) -> None:
    """One feature steered: both texts with the feature's own tokens marked, and how large their share is."""
    label = labels.get(shown.feature)
    vocabulary = model.tokenizer.vocabulary()
    own = " ".join(f"{visible(vocabulary[token])}" for token in shown.own_tokens)
    console.print(
        f"  Feature {shown.feature}" + (f", {label.summary}" if label and label.text else ""),
        soft_wrap=True,
        markup=False,
    )
    console.print(f"  Its own tokens: {own}", soft_wrap=True)
    strength = f"{shown.method} at {shown.strength:g} × its maximum"
    for title, text in (("default", shown.default), (f"steered, {strength}", shown.steered)):
        console.print(Text(f"  {title}", style="dim"))
        print_text(_marked(model, shown.prompt, text, shown.own_tokens))
    console.print(
        f"  Share of its own tokens: {shown.default_share:.0%} → {shown.steered_share:.0%} in these texts,"
        f" {shown.mean_default_share:.0%} → {shown.mean_steered_share:.0%} over {shown.n_seeds} seeds.",
        soft_wrap=True,
    )
    console.print(
        f"  Again: sae steer {folder} {shown.feature} {shown.prompt!r} --strength {shown.strength:g}"
        f" --method {shown.method} --seed {shown.seed} --tokens {shown.max_new_tokens}"
        f" --temperature {shown.temperature:g}",
        soft_wrap=True,
    )


def _marked(model: LanguageModel, prompt: str, text: str, own: Iterable[int]) -> Text:
    """The text with the feature's own tokens in colour."""
    ids = model.tokenizer.encode(text)
    marked = Text(prompt)
    for token, piece in zip(ids, model.tokenizer.pieces(ids), strict=True):
        marked.append(piece, style="bold dark_orange" if token in set(own) else "")
    return marked
