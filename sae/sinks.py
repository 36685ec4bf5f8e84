"""Where the lines of ``metrics.jsonl`` go besides: TensorBoard and Weights & Biases, imported only when asked for."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from activations.errors import InputError
from activations.files import hash_json
from sae.config import TrainConfig

Sink = Callable[[Mapping[str, float]], None]
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_sinks(names: Sequence[str]) -> None:
    """Raise InputError unless the packages that these need are installed."""
    for name in names:
        _imported(name)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError:
        raise InputError(f"log_to {name} needs a package that is not installed: pip install {name}") from None


def open_sinks(names: Sequence[str], folder: Path, config: TrainConfig, tokens_done: int) -> list[Sink]:
    """The sinks of one run.

    Args:
        folder: the run folder; TensorBoard's files and those of Weights & Biases go into it.
        tokens_done: where the run goes on: what an interrupted run logged beyond it is not shown.
    """
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [makers[name](_imported(name), folder, config, tokens_done) for name in names]


def _tensorboard(module: Any, folder: Path, config: TrainConfig, tokens_done: int) -> Sink:
    writer = module.SummaryWriter(
        str(folder / "tensorboard"), purge_step=tokens_done + 1 if tokens_done else None
    )

    def write(line: Mapping[str, float]) -> None:
        for name, value in line.items():
            if name != "tokens":
                writer.add_scalar(name, value, int(line["tokens"]))
        writer.flush()

    return write


def _wandb(module: Any, folder: Path, config: TrainConfig, tokens_done: int) -> Sink:
    run = module.init(
        project="saescope",
        name=folder.name,
        id=hash_json([str(folder.absolute()), asdict(config)])[
            :16
        ],  # so that a resumed run goes on in the same one
        resume="allow",
        dir=str(folder),
        config=asdict(config),
        reinit="create_new",
    )

    def write(line: Mapping[str, float]) -> None:
        run.log(dict(line), step=int(line["tokens"]))

    return write
