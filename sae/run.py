"""Where a run lies: the names of a run folder's files, and ``run.toml``.

A run folder is readable without the toolkit::

    run.toml              everything needed to do it again, and the versions that did it
    metrics.jsonl         one line per log step
    sae/                  cfg.json + sae_weights.safetensors
    checkpoints/          training state of an unfinished run
    evaluation.json       metrics on the test split
    features/train/       the feature index
    labels.sqlite         labels and notes, the only file that people edit
"""

import dataclasses
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

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
    def evaluation(self) -> Path:
        """``evaluation.json``."""
        return self.path / "evaluation.json"

    @property
    def index(self) -> Path:
        """The folder of the feature index over the train split."""
        return self.path / "features" / "train"

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
        **_without_none(dataclasses.asdict(config)),
        "versions": {name: version(name) for name in VERSIONED},
    }
    write_bytes(RunFolder(folder).config, tomli_w.dumps(table).encode())


def read_run_config(folder: Path) -> TrainConfig:
    """Read ``run.toml``.

    Raises:
        InputError: the folder is no run, or the file is broken, newer than this saescope, or has unknown keys.
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
    table["corpus"] = _build(CorpusConfig, table.get("corpus", {}), path)
    table["sae"] = _build(SAEConfig, table.get("sae", {}), path)
    return _build(TrainConfig, table, path)


def _build(kind: type[T], table: dict[str, Any], path: Path) -> T:
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise InputError(f"{path} has an unknown key {key!r}: known are {', '.join(sorted(known))}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a missing key stands for None."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
