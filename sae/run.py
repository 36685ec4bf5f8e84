"""Where a run lies: the names of a run folder's files, and ``run.toml``.

A run folder is readable without the toolkit::

    run.toml              everything needed to do it again, and the versions that did it
    metrics.jsonl         one line per log step
    sae/                  cfg.json + sae_weights.safetensors
    checkpoints/          training state of an unfinished run
    evaluation.json       metrics on the test split
    features/train/       the feature index; features/score/ the same over the score split, features/weights/ what
                          the weights alone tell
    labels.sqlite         labels and notes, the only file that people edit
"""

import dataclasses
import difflib
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from activations.config import ExclusionRule
from activations.corpus import CorpusConfig
from activations.errors import InputError
from activations.files import FORMAT_VERSION, write_bytes
from sae.config import SAEConfig, TrainConfig

VERSIONED = ("saescope", "torch", "transformers", "transformer-lens", "numpy")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """``run.toml``."""
        return self.path / "run.toml"

    @property
    def sae(self) -> Path:
        """The folder of the trained SAE."""
        return self.path / "sae"

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl``."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints of an unfinished training."""
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """``evaluation.json``."""
        return self.path / "evaluation.json"

    @property
    def index(self) -> Path:
        """The folder of the feature index over the train split."""
        return self.path / "features" / "train"

    @property
    def score_index(self) -> Path:
        """The folder of the feature index over the score split, which labels are judged on."""
        return self.path / "features" / "score"

    @property
    def weights(self) -> Path:
        """The folder of what the weights alone tell of the features."""
        return self.path / "features" / "weights"

    @property
    def labels(self) -> Path:
        """``labels.sqlite``."""
        return self.path / "labels.sqlite"

    @property
    def tokens(self) -> Path:
        """The folder of the token blocks, one folder for each split."""
        return self.path / "tokens"

    @property
    def activations(self) -> Path:
        """The folder of stored activations; large, and only there while it is needed."""
        return self.path / "activations"


def write_run_config(folder: Path, config: TrainConfig) -> None:
    """Write ``run.toml``: the configuration and the versions of what runs it."""
    table = {
        "format_version": FORMAT_VERSION,
        **config_to_table(config),
        "versions": {name: version(name) for name in VERSIONED},
    }
    write_bytes(RunFolder(folder).config, tomli_w.dumps(table).encode())


def read_run_config(folder: Path) -> TrainConfig:
    """Read ``run.toml``.

    Raises:
        InputError: the folder is no run, or the file is broken, newer than this saescope, or has unknown keys or
            values of a wrong type.
    """
    path = RunFolder(folder).config
    if not path.is_file():
        raise InputError(f"{folder} is not a run: it has no {path.name}.")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML ({error}).") from None
    found = table.pop("format_version", None)
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise InputError(
            f"{path} was written in format {found}, and this saescope reads up to format {FORMAT_VERSION}: install a"
            " newer saescope."
        )
    table.pop("versions", None)
    return config_from_table(table, path)


def config_from_table(table: dict[str, Any], path: Path) -> TrainConfig:
    """The configuration that a TOML table holds, laid out as in ``run.toml``; missing keys have their defaults.

    Args:
        path: the file, for messages.

    Raises:
        InputError: unknown keys, or values of a wrong type.
    """
    table = dict(table)
    parts = {"corpus": CorpusConfig, "sae": SAEConfig, "rule": ExclusionRule}
    for name in parts:
        if not isinstance(table.setdefault(name, {}), dict):
            raise InputError(f"{path} has {name} = {table[name]!r}, and it must be a table.")
    made: dict[str, Any] = {name: _build(kind, table.pop(name), path) for name, kind in parts.items()}
    return dataclasses.replace(_build(TrainConfig, table, path), **made)


def config_to_table(config: TrainConfig) -> dict[str, Any]:
    """What :func:`config_from_table` reads: TOML has no null, so a missing key stands for None."""
    return _without_none(dataclasses.asdict(config))


def _build(kind: type[T], table: dict[str, Any], path: Path) -> T:
    kinds = get_type_hints(kind)
    for key, value in table.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            right = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(kinds))}."
            raise InputError(f"{path} has an unknown key {key!r}: {right}")
        if not fits(value, kinds[key]):
            raise InputError(f"{path} has {key} = {value!r}, and it must be {in_words(kinds[key])}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from TOML can stand in a field of this type."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in options
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in options)
    if origin is tuple:
        return isinstance(value, list) and all(fits(item, options[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """A field's type as a reader of ``run.toml`` would say it."""
    options = [option for option in get_args(hint) if option is not NoneType]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(options)}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(in_words, options))
    if get_origin(hint) is tuple:
        return f"a list, each item {in_words(options[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, "a table")


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
