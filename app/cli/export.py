"""``sae export``: labels and features into files for other programs and other people."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from app.cli.arguments import parse


@dataclass(frozen=True)
class Arguments:
    """Write the labels of a run, or whole features, to a file or folder.

    csv and json hold labels with their scores, json also the lists; both can be read back (sae label RUN --from FILE).
    neuronpedia and delphi hold their texts as explanations. neuronpedia-batch holds features with examples, as
    Neuronpedia takes them for upload. html is one page that shows everything about the features and needs nothing else.
    """

    run: Positional[Path]
    """The run folder."""
    out: Positional[Path]
    """The file to write (csv, json, html), or a folder that is new or empty (the others)."""
    to: Literal["csv", "json", "neuronpedia", "neuronpedia-batch", "delphi", "html"]
    """The format."""
    features: tuple[int, ...] = ()
    """The features to write; all by default."""
    in_list: Annotated[str, arg(name="list")] = ""
    """Write the features of this list."""
    model_id: str = ""
    """What Neuronpedia calls the model, by default the last part of its name here."""
    source_id: str = ""
    """What Neuronpedia calls the SAE ("6-res-jb"), or delphi the module; by default the hook's name."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "export", arguments)
    from activations.errors import InputError
    from app.cli.terminal import console, progress
    from features.exchange import export
    from features.run import open_run

    if given.features and given.in_list:
        raise InputError("Both --features and --list are given: choose one of them.")
    run = open_run(given.run)
    features: Sequence[int] | None = given.features or None
    if given.in_list:
        features = list(run.labels.list_members(given.in_list))
    n = export(
        run,
        given.out,
        given.to,
        features,
        model_id=given.model_id,
        source_id=given.source_id,
        progress=progress,
    )
    console.print(f"{given.out}: {n:,} {'feature' if n == 1 else 'features'} as {given.to}", soft_wrap=True)
    if given.to == "neuronpedia-batch":
        console.print("Each file is the body of one request: POST /api/feature/upload-batch", soft_wrap=True)
