"""``sae info``: what a run holds, or which hooks a model has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from activations.errors import InputError
from app.cli.arguments import parse


@dataclass(frozen=True)
class Arguments:
    """Say what a run folder holds, or where a model can be read."""

    run: Positional[Path | None] = None
    """A run folder."""
    model: str | None = None
    """A model: builtin, a local Hugging Face folder, or a hub name."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "info", arguments)
    if (given.run is None) == (given.model is None):
        raise InputError("sae info takes a run folder or --model NAME, one of the two.")
    if given.model is not None:
        _describe_model(given.model)
    elif given.run is not None:
        _describe_run(given.run)


def _describe_model(name: str) -> None:
    from activations.models import LanguageModel
    from app.cli.terminal import console, table

    model = LanguageModel.load(name)
    console.print(
        f"{name}: {model.n_layers} layers, d_model {model.d_model}, {model.n_heads} heads, vocabulary"
        f" {model.d_vocab:,}, context {model.context_length:,} tokens, {model.dtype} on {model.device}\n",
        soft_wrap=True,
    )
    sites: dict[str, tuple[int, int]] = {}
    for hook, width in model.hook_widths().items():
        site = ".".join(hook.split(".")[2:])
        sites[site] = (width, sites.get(site, (0, 0))[1] + 1)
    table(
        ["hook_name", "width", "layers"],
        [[f"blocks.L.{site}", str(width), f"0–{layers - 1}"] for site, (width, layers) in sites.items()],
    )
    console.print("\nEvery other TransformerLens hook is served through TransformerBridge, more slowly.")


def _describe_run(path: Path) -> None:
    from activations.files import read_json
    from app.cli.report import print_evaluation
    from app.cli.terminal import console, table
    from sae.evaluate import Evaluation
    from sae.run import RunFolder, read_run_config

    config, folder = read_run_config(path), RunFolder(path)
    sae = config.sae
    shape = f"{sae.architecture}, {sae.d_sae:,} features" + (
        f", k {sae.k}" if sae.architecture == "topk" else ""
    )
    stages = {
        "SAE": folder.sae,
        "evaluation": folder.evaluation,
        "index": folder.index,
        "labels": folder.labels,
    }
    table(
        ["", ""],
        [
            ["model", config.model],
            ["hook", config.hook_name],
            ["SAE", shape],
            [
                "training tokens",
                f"{config.tokens:,}" + (f", read {config.passes} times" if config.passes > 1 else ""),
            ],
            *([name, str(where) if where.exists() else "not there yet"] for name, where in stages.items()),
        ],
    )
    if folder.evaluation.is_file():
        content = read_json(folder.evaluation)
        content.pop("format_version", None)
        console.print()
        print_evaluation(Evaluation.from_json(content))
