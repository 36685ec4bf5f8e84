"""``metrics.jsonl``: one line per log step, in tokens; means over the steps since the last line.

Sums are kept on the device. A line's numbers are sent on their way to the host when it is due and written when the
next one is (:mod:`sae.readback`), so that no step waits for the device. A line that says that training has diverged is
not written but raised.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.errors import InputError
from activations.files import append_line, write_bytes
from sae.architectures.base import Loss
from sae.readback import Readback
from sae.run import RunFolder
from sae.sinks import Sink
from sae.trainer import Trainer

DIVERGED_MSE = 4.0  # times the mean squared norm of what is reconstructed, and rising; an SAE that is 0 has 1
DIVERGED_AFTER = 0.1  # of the run: a fresh SAE may begin with a large error


class Diverged(InputError):
    """Training has left the numbers that it could come back from.

    Attributes:
        folders: the run folders of the trainings that did.
    """

    def __init__(self, message: str, folders: Sequence[Path]) -> None:
        super().__init__(message)
        self.folders = list(folders)

    @classmethod
    def of_all(cls, errors: Sequence["Diverged"]) -> "Diverged":
        """One error for at least one of them: the error itself, or one sentence that names every run."""
        if len(errors) == 1:
            return errors[0]
        folders = [folder for error in errors for folder in error.folders]
        return cls(
            f"{len(folders)} trainings diverged, {', '.join(map(str, folders))}: train them anew with a lower"
            " learning_rate, with clip_norm 1, or with a longer warmup.",
            folders,
        )


@dataclass(frozen=True)
class _Line:
    """A line whose numbers are on their way: sums of ``names`` over ``n`` tokens, and what is known already."""

    names: list[str]
    sums: Readback
    n: int
    facts: dict[str, Any]


class MetricsLog:
    """The log of one run.

    Args:
        run: its folder. writes: False where another process writes the file.
        tokens_done: lines beyond this are of a run that was interrupted later, and dropped.
        sinks: hear every line as well.
    """

    def __init__(
        self, run: RunFolder, tokens_done: int, sinks: Sequence[Sink] = (), *, writes: bool = True
    ) -> None:
        self.run, self._writes = run, writes
        self._sinks = sinks
        self._last = _taken_up(run.metrics, tokens_done) if writes else {}
        self._coming: _Line | None = None
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._n = 0

    def add(self, loss: Loss, power: Tensor, n: int) -> None:
        """Add a whole batch of n tokens; ``power`` is the mean squared norm of what it had to reconstruct."""
        terms = {"loss": loss.total.detach(), **loss.terms, "power": power, "entries": loss.entries / n}
        for name, value in terms.items():
            held = self._sums.get(name)
            self._sums[name] = value * n if held is None else held + value * n
        self._n += n

    def close_line(self, trainer: Trainer, held_out: dict[str, float]) -> None:
        """End the line of the steps since the last one, and write the one before it.

        Raises:
            Diverged: the one before it.
        """
        self.flush()
        sums = torch.stack(
            [*self._sums.values(), trainer.gradient_norm, trainer.dead.mask().sum().to(trainer.gradient_norm)]
        )
        facts = {
            "tokens": trainer.tokens_done,
            "step": trainer.steps_done,
            "n_steps": trainer.n_steps,
            "learning_rate": trainer.learning_rate_at(trainer.steps_done - 1),
            "peak": trainer.learning_rate,
            "held_out": held_out,
        }
        self._coming = _Line(list(self._sums), Readback(sums), self._n, facts)
        self._clear()

    def flush(self) -> None:
        """Write the line that is on its way, if there is one.

        Raises:
            Diverged: its loss is not a number, or the error is several times what was to be reconstructed, and rises.
        """
        if self._coming is None:
            return
        line, self._coming = self._coming, None
        *sums, gradient_norm, dead = line.sums.value().tolist()
        means = dict(zip(line.names, (value / line.n for value in sums), strict=True))
        power, l0 = means.pop("power"), means.pop("entries")
        values = {
            "tokens": line.facts["tokens"],
            "loss": means.pop("loss"),
            "explained_variance": 1 - means["mse"] / power if power else 0.0,
            "l0": l0,
            **means,
            "dead": int(dead),
            "gradient_norm": gradient_norm,
            "learning_rate": line.facts["learning_rate"],
            **line.facts["held_out"],
        }
        self._refuse_divergence(values, power, line.facts)
        if self._writes:
            append_line(self.run.metrics, json.dumps(values) + "\n")
        self._last = values
        for sink in self._sinks:
            sink(values)

    def _refuse_divergence(self, values: dict[str, Any], power: float, facts: dict[str, Any]) -> None:
        late = facts["step"] > DIVERGED_AFTER * facts["n_steps"]
        finite = all(math.isfinite(value) for value in values.values())
        # A dense beginning may still be on its way down.
        rising = bool(self._last) and values["explained_variance"] < self._last["explained_variance"]
        if finite and not (late and rising and values["mse"] > DIVERGED_MSE * power):
            return
        before = (
            f"; a line before they were {self._last['loss']:.4g} and {self._last['gradient_norm']:.4g}"
            if self._last
            else ""
        )
        raise Diverged(
            f"The training of {self.run.path} diverged by step {facts['step']:,} of {facts['n_steps']:,}, where the"
            f" loss was {values['loss']:.4g} and the norm of the gradient {values['gradient_norm']:.4g}{before}: train"
            f" anew with a learning_rate below {facts['peak']:.2g}, with clip_norm 1, or with a longer warmup.",
            [self.run.path],
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The sums of the line that has begun; writes what is on its way."""
        self.flush()
        tensors = {f"log.{name}": value for name, value in self._sums.items()}
        return tensors, {"names": list(self._sums), "n": self._n}

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any], device: torch.device) -> None:
        """Take up a state that :meth:`state` gave."""
        self._sums = {name: tensors[f"log.{name}"].to(device) for name in plain["names"]}
        self._n = plain["n"]


def _taken_up(path: Path, tokens_done: int) -> dict[str, Any]:
    """Drop the lines beyond ``tokens_done``; what the last one says that stays.

    Raises:
        InputError: a line is damaged.
    """
    for unfinished in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
        unfinished.unlink()
    kept: list[str] = []
    if path.exists() and tokens_done:
        # A line that a full disk or a kill cut short has no end.
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        whole = [line.rstrip("\n") for line in lines if line.endswith("\n")]
        kept = [line for number, line in enumerate(whole, 1) if _tokens_of(line, path, number) <= tokens_done]
    write_bytes(path, "".join(line + "\n" for line in kept).encode())
    last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
    return last


def _tokens_of(line: str, path: Path, number: int) -> int:
    """The training tokens after which a line was written."""
    try:
        return int(json.loads(line)["tokens"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is damaged in line {number}: delete that line and run the same command again."
        ) from None
