"""A source as a person writes it: ``data/*.parquet?column=body``, ``hf:org/name?config=en&split=train``."""

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from activations.errors import InputError

Content = Literal["text", "tokens", "messages"]
"""What a column holds: text, token ids, or the messages of a chat."""

HUB = "hf:"
COLUMNS: dict[str, Content] = {"column": "text", "tokens": "tokens", "messages": "messages"}
OPTIONS = (*COLUMNS, "config", "split", "revision")

_QUERY = re.compile(r"\?(\w+=[^?]*)$")  # a "?" of a glob is followed by no "="


@dataclass(frozen=True)
class SourceSpec:
    """One source of a corpus.

    given: as it was written; location: the same without its options.
    content, column: what is read and from which column.
    config, split, revision: of a Hugging Face dataset; None is the dataset's own choice.
    """

    given: str
    location: str
    content: Content
    column: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


def parse_source(given: str, default_column: str) -> SourceSpec:
    """Read a source with its options.

    Raises:
        InputError: an option that does not exist, that is given twice or without a value, or two columns.
    """
    query = _QUERY.search(given)
    location = given[: query.start()] if query else given
    options: dict[str, str] = {}
    for part in query[1].split("&") if query else ():
        name, _, value = part.partition("=")
        if name not in OPTIONS:
            raise InputError(
                f"Source {given} has an option {name!r}: the options of a source are {', '.join(OPTIONS)}."
            )
        if not value or name in options:
            raise InputError(f"Source {given} must give its option {name!r} once, with a value.")
        options[name] = unquote(value)
    columns: list[tuple[Content, str]] = [
        (content, options.pop(name)) for name, content in COLUMNS.items() if name in options
    ]
    if len(columns) > 1:
        raise InputError(f"Source {given} names more than one column: give one of {', '.join(COLUMNS)}.")
    content, column = columns[0] if columns else ("text", default_column)
    return SourceSpec(given, location, content, column, **options)
