"""Training as it goes: a bar with rate and time left, and what the last lines of the metrics say, run by run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from app.cli.terminal import console, plain_lines, progress, progress_bar

if TYPE_CHECKING:
    from sae.train import Run

_SHOWN = {
    "loss": ("loss", "{:.4g}"),
    "l0": ("L0", "{:.1f}"),
    "explained_variance": ("explained variance", "{:.4f}"),
    "held_out_explained_variance": ("held out", "{:.4f}"),
    "dead": ("dead", "{:,}"),
}


class TrainingView:
    """Listens to training (``watch``) and shows it where ``progress`` is asked to.

    On a terminal a table under the bar has a row for every run; elsewhere the plain lines say how the last run that
    reported stands.
    """

    def __init__(self) -> None:
        self._lines: dict[str, dict[str, float]] = {}
        self._last = ""

    def watch(self, run: "Run", line: Mapping[str, float]) -> None:
        """Take down a line of a run's metrics; what it does not say stays as it was."""
        self._last = run.folder.name
        self._lines.setdefault(self._last, {}).update(line)

    @contextmanager
    def progress(self, description: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """As :func:`app.cli.terminal.progress`, with the metrics where it is training that is shown."""
        if description != "train":
            with progress(description, total=total, unit=unit) as step:
                yield step
        elif not console.is_terminal:
            with plain_lines(description, total, unit, self._note) as step:
                yield step
        else:
            bar = progress_bar()
            task = bar.add_task(description, total=total, unit=unit)
            with Live(
                get_renderable=lambda: self._shown(bar),
                console=console,
                refresh_per_second=4,
                transient=False,
            ):
                yield lambda done: bar.advance(task, done)

    def _note(self) -> str:
        cells = _cells(self._lines.get(self._last, {}))
        return "".join(
            f"; {title} {cell}" for (title, _), cell in zip(_SHOWN.values(), cells, strict=True) if cell
        )

    def _shown(self, bar: RenderableType) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2))
        table.add_column("  run", header_style="dim")
        for title, _ in _SHOWN.values():
            table.add_column(title, justify="right", header_style="dim", no_wrap=True)
        for name, line in self._lines.items():
            table.add_row(f"  {name}", *_cells(line))
        return Group(bar, table) if self._lines else bar


def _cells(line: Mapping[str, float]) -> list[str]:
    return [form.format(line[name]) if name in line else "" for name, (_, form) in _SHOWN.items()]
