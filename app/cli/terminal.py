"""What the command line shows: stages, progress with a rate and a time left, tables."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(highlight=False, markup=False)
_PLAIN_EVERY_SECONDS = 15.0


def stage(text: str) -> None:
    """Announce a stage."""
    console.print(Text(text, style="bold"), soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:>9,.0f} {task.fields['unit']}/s" if speed else "", style="dim")


@contextmanager
def progress(description: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then elsewhere (:class:`activations.progress.Progress`)."""
    if not console.is_terminal:
        with plain_lines(description, total, unit) as step:
            yield step
        return
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, unit=unit)
        yield lambda done: bar.advance(task, done)


def progress_bar() -> Progress:
    """A bar with a rate and the time left; its tasks have a field ``unit``."""
    return Progress(
        TextColumn("  {task.description:<10}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


@contextmanager
def plain_lines(
    description: str, total: int, unit: str, note: Callable[[], str] = lambda: ""
) -> Iterator[Callable[[int], None]]:
    """A line now and then; ``note`` is asked what to add to it."""
    begun = last = time.monotonic()
    done = 0

    def say(elapsed: float) -> None:
        rate = done / max(elapsed, 1e-9)
        left = f", {max(total - done, 0) / rate:,.0f} s left" if done < total and rate else ""
        console.print(
            f"  {description}: {done:,}/{total:,} {unit}, {rate:,.0f} {unit}/s{left}{note()}", soft_wrap=True
        )

    def step(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last > _PLAIN_EVERY_SECONDS:
            last = now
            say(now - begun)

    yield step
    say(time.monotonic() - begun)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2))
    for number, column in enumerate(columns):
        side: Literal["left", "right"] = "left" if number == 0 else "right"
        grid.add_column(column, justify=side, header_style="dim", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    console.print(grid)


def print_text(text: Text) -> None:
    """Print a text as it is, with a bar at its left."""
    for line in text.split("\n", allow_blank=True):
        console.print(Text("  │ ") + line, soft_wrap=True)
