"""In what two sets of settings differ, in words; refusing to continue what was begun with others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from activations.errors import InputError
from activations.files import MANIFEST, read_json

_SHOWN = 60  # characters of a value
_MISSING = object()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Every setting of ``wanted`` that is another in ``found``, as "name: a there, b here", names joined by dots.

    Settings of ``config`` go by their own name where no other has it.
    """
    before, now = _flat(found), _flat(json.loads(json.dumps(dict(wanted))))
    known = now | before
    names = [name for name in known if before.get(name, _MISSING) != now.get(name, _MISSING)]
    short = {name: name.removeprefix("config.") for name in names}
    return [
        f"{name if short[name] in known else short[name]}: {_shown(before, name)} there, {_shown(now, name)} here"
        for name in names
    ]


def refuse_other(folder: Path, manifests: list[Path], wanted: Mapping[str, Any]) -> None:
    """Refuse to train into a folder whose training was begun or finished with other settings.

    Args:
        folder: for the message. manifests: folders of stages whose manifests are compared; those without a
            readable one are passed over.
        wanted: the settings to compare; others in the manifests are not looked at.

    Raises:
        InputError: lists every setting that differs.
    """
    for stage in manifests:
        try:
            inputs = read_json(stage / MANIFEST).get("inputs", {})
        except InputError:
            continue  # a crash left it
        found = differences({name: inputs[name] for name in wanted if name in inputs}, wanted)
        if found:
            raise InputError(
                f"{folder} holds a training with other settings ({'; '.join(found)}): give those to continue it, give"
                " another folder, or delete this one."
            )


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shown(table: Mapping[str, Any], name: str) -> str:
    if name not in table:
        return "nothing"
    text = json.dumps(table[name])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
