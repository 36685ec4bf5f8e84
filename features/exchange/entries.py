"""What one line of a file of labels says, and checking that it says it rightly.

Every check takes ``where``: the file and line, with which its sentence begins.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from activations.errors import InputError
from features.labels import Label


@dataclass(frozen=True)
class Entry:
    """One label of a file.

    Attributes:
        where: the file and the line, for sentences about it.
        label: what it says; without a text it is about its note alone.
        starred: whether the feature is to be starred.
    """

    where: str
    label: Label
    starred: bool = False


def feature_number(value: Any, where: str, d_sae: int) -> int:
    """A feature of an SAE with ``d_sae`` of them, given as a whole number or its digits.

    Raises:
        InputError: it is something else, or there is no such feature.
    """
    is_digits = isinstance(value, str) and value.strip().isdecimal() and len(value.strip()) < 20
    if not is_digits and (not isinstance(value, int) or isinstance(value, bool)):
        raise InputError(f"{where}: the feature is {_shown(value)}, and must be a whole number.")
    number = int(value)
    if not 0 <= number < d_sae:
        raise InputError(f"{where}: there is no feature {number}: the SAE has the features 0 to {d_sae - 1}.")
    return number


def text(value: Any, name: str, where: str) -> str:
    """A text; None counts as an empty one.

    Raises:
        InputError: it is something else, or holds half of a character.
    """
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {name} is {_shown(value)}, and must be a text.")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {name} holds half of a character, and must be valid Unicode.") from None
    return value or ""


def share(value: Any, name: str, where: str) -> float | None:
    """A number from 0 to 1, also as its digits; None and an empty text are none.

    Raises:
        InputError: it is something else.
    """
    if value is None or value == "":
        return None
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise InputError(f"{where}: {name} is {_shown(value)}, and must be a number from 0 to 1.")
    return number


def count(value: Any, name: str, where: str) -> int:
    """A whole number from 0 on, also as its digits; None and an empty text are 0.

    Raises:
        InputError: it is something else.
    """
    if value is None or value == "":
        return 0
    number = _number(value)
    if number is None or number < 0 or number != int(number) or number >= 2**63:
        raise InputError(f"{where}: {name} is {_shown(value)}, and must be a whole number from 0 on.")
    return int(number)


def one_of(value: str, choices: Iterable[str], name: str, where: str) -> str:
    """One of some words.

    Raises:
        InputError: it is another.
    """
    known = list(choices)
    if value not in known:
        raise InputError(f"{where}: {name} is {_shown(value)}, and must be one of {', '.join(known)}.")
    return value


def parsed(line: str | bytes, where: str) -> Any:
    """The value of some JSON.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{where}: this is not valid JSON ({error}).") from None


def keys_of(value: Any, needed: Iterable[str], where: str) -> dict[str, Any]:
    """A JSON object that has these keys.

    Raises:
        InputError: it is something else, or one is missing.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: this is {_shown(value)}, and must be an object.")
    for key in needed:
        if key not in value:
            raise InputError(f"{where}: the key {key!r} is missing.")
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    """A value in a sentence, cut where it is long."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    words = json.dumps(value, ensure_ascii=True) if not isinstance(value, str) else repr(value)
    return words if len(words) <= 40 else words[:39] + "…"
