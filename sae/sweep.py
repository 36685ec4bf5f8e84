"""Many configurations at once: what a sweep trains, and what each of its runs is called.

A sweep is one base configuration and what is changed in it: grids (every combination of their values) and single
runs. On disk it is ``run.toml`` with tables for the changes::

    tokens = 2_000_000

    [sae]
    d_sae = 4096

    [[grid]]
    architecture = ["topk", "batch_topk"]
    k = [16, 32, 64]
    seed = [0, 1]

    [[grid]]
    architecture = "relu"
    sparsity_weight = [2, 5, 10]

    [[run]]
    architecture = "jumprelu"
    target_l0 = 32

Fields of the SAE and of the training stand side by side, as the command's flags do. This module imports no torch.
"""

import dataclasses
import difflib
import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import tomli_w

from activations.errors import InputError
from activations.files import FORMAT_VERSION, write_bytes
from sae.config import SAEConfig, TrainConfig
from sae.run import config_from_table, config_to_table, fits, in_words

SWEEP_FILE = "sweep.toml"
CHANGES = ("grid", "run")  # the tables in it that say what is changed
FIXED = (  # one model reads one text, and its activations serve all runs
    *("model", "device", "dtype", "center_writing_weights", "corpus", "store", "order"),
    *("tokens", "context_length", "rule", "log_to"),
)
_SAE_FIELDS = get_type_hints(SAEConfig)
_TRAIN_FIELDS = {name: kind for name, kind in get_type_hints(TrainConfig).items() if name != "sae"}
_FIELDS = {**_TRAIN_FIELDS, **_SAE_FIELDS}
_SHORT = {
    "hook_name": "",
    "hook_out": "to-",
    "architecture": "",
    "d_sae": "d",
    "k": "k",
    "target_l0": "l0-",
    "sparsity_weight": "lambda",
    "learning_rate": "lr",
    "seed": "s",
}
_LAST = ("learning_rate", "seed")


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep trains.

    Attributes:
        base: what all runs have in common.
        grids: each a mapping from the name of a field (of TrainConfig or SAEConfig) to its values; every combination
            within one grid is a run.
        runs: single runs, each a mapping from fields to values.
    """

    base: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    grids: tuple[Mapping[str, Sequence[Any]], ...] = ()
    runs: tuple[Mapping[str, Any], ...] = ()

    def expand(self) -> list[tuple[str, TrainConfig]]:
        """Every run with its name, which is that of its folder: what distinguishes it from the others.

        Raises:
            InputError: an unknown field, one that a sweep cannot vary or that the architecture does not heed, a value
                that does not fit, settings that cannot work, or the same run twice.
        """
        changes = [
            *(dict(zip(grid, values, strict=True)) for grid in self.grids for values in _products(grid)),
            *map(dict, self.runs),
        ]
        configs = [_changed(self.base, change) for change in changes or [{}]]
        names = _names(configs)
        for name, config, change in zip(names, configs, changes or [{}], strict=True):
            _check(name, config, change)
        for name, times in Counter(names).items():
            if times > 1:
                raise InputError(f"The sweep has the run {name} {times} times: give every run once.")
        return list(zip(names, configs, strict=True))

    @classmethod
    def read(cls, path: Path | str) -> "SweepConfig":
        """Read a sweep from a TOML file; see the module's docstring.

        Raises:
            InputError: no such file, not TOML, unknown keys, or values of a wrong type.
        """
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise InputError(
                f"{path} cannot be read: give a TOML file, as sae sweep --help shows it."
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid TOML ({error}).") from None
        table.pop("format_version", None)
        changes = {key: _tables(table.pop(key, []), key, path) for key in CHANGES}
        for key in table:
            near = difflib.get_close_matches(key, [*CHANGES, *_TRAIN_FIELDS], 1)
            if key not in _TRAIN_FIELDS and near and near[0] in CHANGES:
                raise InputError(f"{path} has an unknown key {key!r}: did you mean {near[0]}?")
        grids = tuple({name: _as_values(values) for name, values in grid.items()} for grid in changes["grid"])
        return cls(config_from_table(table, path), grids, tuple(changes["run"]))

    def write(self, path: Path) -> None:
        """Write the file that :meth:`read` reads."""
        table = {
            "format_version": FORMAT_VERSION,
            **config_to_table(self.base),
            "grid": [{name: list(values) for name, values in grid.items()} for grid in self.grids],
            "run": [dict(run) for run in self.runs],
        }
        write_bytes(path, tomli_w.dumps(table).encode())


def grid_from_words(words: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """A grid as it is typed: ``["architecture=topk,relu", "seed=0,1"]``; values are TOML's, or text.

    Raises:
        InputError: a word without ``=``, or a field named twice.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.replace("-", "_")
        if not (name and equals and text):
            raise InputError(f"--grid takes FIELD=VALUE,VALUE,…, and {word!r} is not of that form.")
        if name in grid:
            raise InputError(f"--grid names {name} twice: give all its values at once.")
        grid[name] = _typed(text)
    return grid


def stream_of(config: TrainConfig) -> tuple[Any, ...]:
    """What runs must share to be trained side by side: all that decides which batches a training reads."""
    return (
        config.hook_name,
        config.hook_out,
        config.passes,
        config.resolved_batch_tokens(),
        config.order_seed,
        config.buffer_tokens,
    )


def _typed(text: str) -> tuple[Any, ...]:
    try:
        return tuple(tomllib.loads(f"values = [{text}]")["values"])
    except tomllib.TOMLDecodeError:
        words = text.split(",")
        return tuple(words) if len(words) == 1 else tuple(value for word in words for value in _typed(word))


def _tables(found: Any, key: str, path: Path) -> list[dict[str, Any]]:
    """One table, or an array of tables."""
    tables = [found] if isinstance(found, dict) else found
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{path} has {key} = {found!r}, and it must be tables: write [[{key}]].")
    return tables


def _as_values(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, list) else (values,)


def _products(grid: Mapping[str, Sequence[Any]]) -> itertools.product:
    for name, values in grid.items():
        if not values:
            raise InputError(f"The grid gives {name} no value: give one, or leave it out.")
    return itertools.product(*grid.values())


def _changed(base: TrainConfig, change: Mapping[str, Any]) -> TrainConfig:
    """The configuration with some fields replaced, each by a value of its type."""
    fields: dict[str, Any] = {}
    for name, value in change.items():
        if name in FIXED:
            raise InputError(f"{name} is the same for all runs of a sweep: give it outside the grid.")
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f"; did you mean {near[0]}?" if near else f": known are {', '.join(sorted(_FIELDS))}."
            raise InputError(f"A sweep cannot vary {name!r}, which is no field of a run{hint}")
        listed = list(value) if isinstance(value, tuple) else value
        if not fits(listed, _FIELDS[name]):
            raise InputError(f"The sweep has {name} = {value!r}, and it must be {in_words(_FIELDS[name])}.")
        fields[name] = tuple(listed) if get_origin(_FIELDS[name]) is tuple else listed
    sae = {name: value for name, value in fields.items() if name in _SAE_FIELDS}
    train = {name: value for name, value in fields.items() if name not in _SAE_FIELDS}
    return dataclasses.replace(base, sae=dataclasses.replace(base.sae, **sae), **train)


def _check(name: str, config: TrainConfig, change: Mapping[str, Any]) -> None:
    """Refuse settings that cannot work, naming the run."""
    for field in change:
        if not config.sae.heeds(field):
            raise InputError(
                f"Run {name} of the sweep: {field} says nothing to {config.sae.architecture}, so give each architecture"
                " a grid of its own."
            )
    try:
        config.check()
        config.sae.check()
    except InputError as error:
        raise InputError(f"Run {name} of the sweep: {error}") from None


def _names(configs: Sequence[TrainConfig]) -> list[str]:
    """Each run by the fields that are not the same in all runs: ``topk-k32-s0``."""
    others = [name for name in _FIELDS if name not in _SHORT and name not in FIXED]
    order = [*(name for name in _SHORT if name not in _LAST), *others, *_LAST]
    varied = [name for name in order if len({_value(config, name) for config in configs}) > 1]
    names = ["-".join(part for field in varied if (part := _part(config, field))) for config in configs]
    return [name or config.sae.architecture for name, config in zip(names, configs, strict=True)]


def _value(config: TrainConfig, name: str) -> Any:
    return getattr(config.sae if name in _SAE_FIELDS else config, name)


def _part(config: TrainConfig, name: str) -> str:
    """What a field adds to the name of a run; nothing where it says nothing."""
    value = _value(config, name)
    if value is None or value == () or not config.sae.heeds(name):
        return ""
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    items = value if isinstance(value, tuple) else (value,)
    text = "+".join(repr(i).removesuffix(".0") if isinstance(i, float) else str(i) for i in items)
    return re.sub(r"[^\w.+-]", "_", _SHORT.get(name, name) + text)
