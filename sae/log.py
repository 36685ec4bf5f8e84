"""``metrics.jsonl``: one line per log step, in tokens; means over the steps since the last line.

Sums are kept on the device. A line's numbers are sent on their way to the host when it is due and written when the
next one is (:mod:`sae.readback`), so that no step waits for the device.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.files import write_bytes
from sae.architectures.base import Loss
from sae.readback import Readback
from sae.trainer import Trainer


@dataclass(frozen=True)
class _Line:
    """A line whose numbers are on their way: sums of ``names`` over ``n`` tokens, the dead at the end."""

    names: list[str]
    sums: Readback
    n: int
    facts: dict[str, Any]


class MetricsLog:
    """The log of one run.

    Args:
        path: the file. tokens_done: lines beyond this are of a run that was interrupted later, and dropped.
    """

    def __init__(self, path: Path, tokens_done: int) -> None:
        self.path = path
        kept = []
        if path.exists() and tokens_done:
            # A line that a full disk or a kill cut short has no end.
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line.rstrip("\n") for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["tokens"] <= tokens_done]
        write_bytes(path, "".join(line + "\n" for line in kept).encode())
        self._coming: _Line | None = None
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._n = 0

    def add(self, loss: Loss, power: Tensor, n: int) -> None:
        """Add a batch of n tokens; ``power`` is the mean squared norm of what it had to reconstruct."""
        for name, value in {**loss.terms, "power": power, "entries": loss.entries / n}.items():
            held = self._sums.get(name)
            self._sums[name] = value * n if held is None else held + value * n
        self._n += n

    def close_line(self, trainer: Trainer) -> None:
        """End the line of the steps since the last one, and write the one before it."""
        self.flush()
        sums = torch.stack([*self._sums.values(), trainer.dead.mask().sum().float()])
        facts = {
            "tokens": trainer.tokens_done,
            "learning_rate": trainer.learning_rate_at(trainer.steps_done - 1),
        }
        self._coming = _Line(list(self._sums), Readback(sums), self._n, facts)
        self._clear()

    def flush(self) -> None:
        """Write the line that is on its way, if there is one."""
        if self._coming is None:
            return
        line, self._coming = self._coming, None
        *sums, dead = line.sums.value().tolist()
        means = dict(zip(line.names, (value / line.n for value in sums), strict=True))
        power, l0 = means.pop("power"), means.pop("entries")
        values = {
            "tokens": line.facts["tokens"],
            "explained_variance": 1 - means["mse"] / power,
            "l0": l0,
            **means,
            "dead": int(dead),
            "learning_rate": line.facts["learning_rate"],
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The sums of the line that has begun; writes what is on its way."""
        self.flush()
        return {f"log.{name}": value for name, value in self._sums.items()}, {
            "names": list(self._sums),
            "n": self._n,
        }

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any], device: torch.device) -> None:
        """Take up a state that :meth:`state` gave."""
        self._sums = {name: tensors[f"log.{name}"].to(device) for name in plain["names"]}
        self._n = plain["n"]
