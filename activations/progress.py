"""How long work reports its progress, without knowing who listens.

A function that takes long accepts ``progress: Progress = silent`` and uses it so::

    with progress("capture", total=n_tokens, unit="tokens") as step:
        for block in blocks:
            ...
            step(block.size)

The command line passes an implementation that draws a bar with a rate and a time left.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Step = Callable[[int], None]


class Progress(Protocol):
    """Opens a piece of work of ``total`` units; yields a function to call with the units just done."""

    def __call__(self, description: str, *, total: int, unit: str) -> AbstractContextManager[Step]: ...


@contextmanager
def silent(description: str, *, total: int, unit: str) -> Iterator[Step]:
    """Report to nobody: the default in notebooks and tests."""
    yield lambda done: None
