"""From typed words to a dataclass; words that do not fit are explained by tyro, with status 2."""

import inspect
from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], verb: str, arguments: Sequence[str], *, default: T | None = None) -> T:
    """Fill the dataclass ``kind`` from the words after ``sae VERB``; ``default`` says what is not typed.

    tyro prints its own explanation of words that do not fit and exits with status 2.
    """
    description = inspect.cleandoc(kind.__doc__ or "")
    found = tyro.cli(kind, prog=f"sae {verb}", args=list(arguments), description=description, default=default)
    assert found is not None
    return found
