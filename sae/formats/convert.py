"""From any format that is read to one that is written."""

from pathlib import Path

from activations.errors import InputError
from sae.formats.detect import load
from sae.formats.dictionary_learning import write_dictionary_learning
from sae.formats.saelens import write_saelens
from sae.formats.sparsify import write_sparsify
from sae.model import SparseAutoencoder

WRITERS = {
    "saelens": write_saelens,
    "dictionary_learning": write_dictionary_learning,
    "sparsify": write_sparsify,
}


def convert(source: str | Path, target: str | Path, to: str = "saelens") -> SparseAutoencoder:
    """Read an SAE and write it to a new folder in another format, or in the same.

    Args:
        source: what :func:`sae.formats.detect.load` takes. target: a folder that is not there yet. to: a key of
            ``WRITERS``.

    Returns:
        the SAE that was read.

    Raises:
        InputError: it cannot be read, the format cannot hold it, or ``target`` is there already.
    """
    if to not in WRITERS:
        raise InputError(f"{to!r} is no format that is written: choose {', '.join(WRITERS)}.")
    folder = Path(target)
    if folder.exists():
        raise InputError(f"{folder} is there already: give the name of a new folder.")
    sae = load(source)
    WRITERS[to](sae, folder)
    return sae
