"""``sae info``: what a run, a sweep, a store or an SAE from anywhere holds, or which hooks a model has."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from activations.errors import InputError
from activations.files import MANIFEST, read_json
from app.cli.arguments import parse
from sae.sweep import SWEEP_FILE

if TYPE_CHECKING:
    from activations.models import LanguageModel
    from sae.evaluate import Evaluation

SHOWN = 80  # characters of a value of an SAE's metadata


@dataclass(frozen=True)
class Arguments:
    """Say what a run, a sweep, a store of activations or an SAE holds, or where a model can be read."""

    folder: Positional[Path | None] = None
    """A run, a sweep, a store of activations, or an SAE of any format that is read, on disk or as hf:org/name."""
    model: str | None = None
    """A model: builtin, a local Hugging Face folder, or a hub name."""
    device: str | None = None
    """Where the model is loaded: cpu, cuda or mps; chosen by what there is."""
    dtype: str | None = None
    """Of the model's weights: float32, bfloat16 or float16; float32 on the CPU, else as they are stored."""
    bridge: bool = True
    """Whether to start TransformerBridge too, and list what it adds: a few seconds more."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "info", arguments)
    if (given.folder is None) == (given.model is None):
        raise InputError(
            "sae info takes the folder of a run, a store or an SAE, or --model NAME, one of the two."
        )
    if given.folder is not None and (given.device or given.dtype or not given.bridge):
        raise InputError("--device, --dtype and --no-bridge go with --model, not with a folder.")
    if given.model is not None:
        _describe_model(given.model, given.device, given.dtype, given.bridge)
    elif given.folder is not None:
        _describe_folder(given.folder)


def _describe_folder(path: Path) -> None:
    """Whichever of the kinds it is; what is none of them is refused as no run."""
    from activations.store import KIND
    from sae.formats.detect import holds_sae
    from sae.run import RunFolder

    if (path / SWEEP_FILE).is_file():
        _describe_sweep(path)
    elif (path / MANIFEST).is_file() and read_json(path / MANIFEST).get("kind") == KIND:
        _describe_store(path)
    elif not RunFolder(path).config.is_file() and holds_sae(path):
        _describe_sae(path)
    elif (path / MANIFEST).is_file():
        _describe_store(path)
    else:
        _describe_run(path)


def _describe_sae(path: Path) -> None:
    """An SAE that lies in no run: its shape, where it belongs, and what its files say besides."""
    from app.cli.terminal import table
    from sae.formats.origin import ORIGIN
    from sae.model import SparseAutoencoder

    sae = SparseAutoencoder.load(path)
    facts = {key: value for key, value in sae.metadata.items() if value is not None}
    origin = facts.pop(ORIGIN, None)
    hooks = [facts.pop(name) for name in ("hook_name", "hook_name_out") if name in facts]
    k = f", k {sae.config.k}" if sae.config.heeds("k") else ""
    rows = [
        ["SAE", f"{sae.config.architecture}, {sae.d_sae:,} features{k}"],
        ["widths", f"{sae.d_in:,} → {sae.d_out:,}"],
        ["hook", " → ".join(map(str, hooks)) or "not said"],
        *([["format", origin["format"]]] if isinstance(origin, dict) else []),
        *([name, _in_short(value)] for name, value in facts.items()),
    ]
    table(["", ""], rows)


def _in_short(value: object) -> str:
    """A value of the metadata in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _describe_model(name: str, device: str | None, dtype: str | None, with_bridge: bool) -> None:
    from activations.models import NO_LIMIT, LanguageModel
    from app.cli.terminal import console, table

    model = LanguageModel.load(name, device=device, dtype=dtype)
    heads = f"{model.n_heads} heads" if model.n_heads else "no attention"
    limit = (
        "no limit of context"
        if model.context_length == NO_LIMIT
        else f"context {model.context_length:,} tokens"
    )
    console.print(
        f"{name}: {model.config.model_type}, {model.n_layers} layers, d_model {model.d_model}, {heads}, vocabulary"
        f" {model.d_vocab:,}, {limit}, {model.dtype} on {model.device}\n",
        soft_wrap=True,
    )
    widths = model.hook_widths()
    if widths:
        rows = _by_layer({hook: str(width) for hook, width in widths.items()})
        console.print("Served by the SDPA path, at the speed of the model:\n")
        table(["hook_name", "width", "layers"], rows)
        if not with_bridge:
            console.print("\nTransformerBridge serves every other hook of TransformerLens, more slowly.")
    else:
        console.print(
            f"The SDPA path does not serve {model.config.model_type} models: all hooks of this one are"
            " TransformerBridge's.",
            soft_wrap=True,
        )
    if with_bridge:
        console.print()
        _list_bridge_hooks(model, widths)


def _list_bridge_hooks(model: "LanguageModel", on_sdpa_path: Iterable[str]) -> None:
    """What the bridge serves and the SDPA path does not, with the shape where it is not one vector per token."""
    from app.cli.terminal import console, table

    served = set(on_sdpa_path)
    try:
        shapes = model.bridge_shapes()
    except InputError as error:
        if not served:
            raise
        console.print(f"No other hooks: {error}", soft_wrap=True)
        return
    described: dict[str, str] = {}
    for aliases, shape in shapes.items():
        vector = len(shape) == 3 and shape[:2] == ("batch", "pos")
        text = str(shape[2]) if vector else f"[{', '.join(map(str, shape))}]"
        described |= dict.fromkeys((name for name in aliases if name not in served), text)
    rows = _by_layer(described)
    console.print("Served by TransformerBridge, more slowly:\n")
    table(["hook_name", "width or shape", "layers"], rows)


def _by_layer(described: Mapping[str, str]) -> list[list[str]]:
    """Hooks that differ by their layer only, as one row: name with L for the layer, description, layers."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name, description in described.items():
        match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
        row = (f"{match[1]}.L.{match[3]}" if match else name, description)
        layers.setdefault(row, []).extend([int(match[2])] if match else [])
    return [[*row, _ranges(found)] for row, found in layers.items()]


def _ranges(layers: Sequence[int]) -> str:
    """Ascending numbers in short: 0–2, 4."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _describe_store(path: Path) -> None:
    from activations.store import ActivationStore
    from app.cli.report import print_store
    from app.cli.terminal import console

    store = ActivationStore.open(path)
    asked = sum(capture["blocks"] for capture in store.manifest["captures"])
    state = (
        "" if store.complete else f" (unfinished: {store.blocks.n_blocks:,} of {asked:,} sequences are there)"
    )
    size = sum(shard.bytes for shard in store.shards)
    console.print(
        f"{path}: {store.n_rows:,} tokens of {len(store.blocks.names):,} documents in sequences of"
        f" {store.blocks.context_length}, as {store.at(store.hook_names[0]).stored_as},"
        f" {size / 1e6:,.1f} MB{state}",
        soft_wrap=True,
    )
    for capture in store.manifest["captures"]:
        if "config" in capture:
            text = " ".join(capture["config"]["corpus"]["text"])
            console.print(f"  {capture['config']['model']} on {text}", soft_wrap=True)
    print_store(store)


def _describe_sweep(path: Path) -> None:
    """The sweep's runs, and the figures of those that were measured."""
    from app.cli.report import print_sweep
    from app.cli.terminal import console, table
    from sae.run import RunFolder
    from sae.sweep import SweepConfig

    config = SweepConfig.read(path / SWEEP_FILE)
    measured, others = {}, []
    for name, run in config.expand():
        folder = RunFolder(path / name)
        if folder.evaluation.is_file():
            measured[name] = _evaluation(folder.evaluation)
        else:
            state = "trained" if (folder.sae / MANIFEST).is_file() else "not trained yet"
            others.append([name, run.sae.architecture, state])
    base = config.base
    console.print(
        f"{path}: {len(measured) + len(others)} SAEs on {base.tokens_read():,} tokens of {base.model}\n",
        soft_wrap=True,
    )
    if measured:
        print_sweep(measured)
    if others:
        table(["", "architecture", ""], others)


def _evaluation(path: Path) -> "Evaluation":
    from activations.files import read_json
    from sae.evaluate import Evaluation

    content = read_json(path)
    content.pop("format_version", None)
    return Evaluation.from_json(content)


def _describe_run(path: Path) -> None:
    from app.cli.report import print_evaluation
    from app.cli.terminal import console, table
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
            ["hook", " → ".join(config.hook_names)],
            ["SAE", shape],
            [
                "training tokens",
                f"{config.tokens:,}" + (f", read {config.passes} times" if config.passes > 1 else ""),
            ],
            *([name, str(where) if where.exists() else "not there yet"] for name, where in stages.items()),
        ],
    )
    if folder.evaluation.is_file():
        console.print()
        print_evaluation(_evaluation(folder.evaluation))
