"""Results as a person reads them in the terminal."""

from pathlib import Path

from app.cli.terminal import console, table, text_pair
from features.demonstration import Demonstration
from features.labels import Labels
from sae.evaluate import Evaluation

CONTROL_NAMES = {"principal_components": "principal components", "random_weights": "random weights"}


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


def print_demonstration(shown: Demonstration, labels: Labels, folder: Path) -> None:
    """One feature steered: both texts, and the share of the feature's own tokens in them."""
    label = labels.get(shown.feature)
    name = f"feature {shown.feature}" + (f", {label.text}" if label else "")
    console.print(f"  {name}; {shown.method} at {shown.strength:g} × its maximum", soft_wrap=True, markup=False)
    text_pair("  default", shown.prompt + shown.default, "  steered", shown.prompt + shown.steered)
    console.print(
        f"  Share of the feature's own tokens: {shown.default_share:.0%} → {shown.steered_share:.0%} in these texts,"
        f" {shown.mean_default_share:.0%} → {shown.mean_steered_share:.0%} over {shown.n_seeds} seeds.",
        soft_wrap=True,
    )
    console.print(
        f"  Again: sae steer {folder} {shown.feature} {shown.prompt!r} --strength {shown.strength:g}"
        f" --method {shown.method} --seed {shown.seed} --tokens {shown.max_new_tokens}"
        f" --temperature {shown.temperature:g}",
        soft_wrap=True,
        markup=False,
    )
