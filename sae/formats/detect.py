"""Reading an SAE of any format: which one it is shows in the names of its tensors, not in those of its files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activations.errors import InputError
from sae.formats import dictionary_learning, gemma_scope, hub, llama_scope, openai, saelens, sparsify
from sae.formats.reading import SUFFIXES, read_content
from sae.model import SparseAutoencoder
from sae.run import RunFolder

Reader = Callable[[Path, dict[str, Any]], SparseAutoencoder]


@dataclass(frozen=True)
class Format:
    """A format that is read.

    name: as the project that writes it is called. suffixes: of its files. signatures: names of tensors, one set of
    which a file holds. read: makes the SAE of the file and its content.
    """

    name: str
    suffixes: tuple[str, ...]
    signatures: tuple[frozenset[str], ...]
    read: Reader

    def is_of(self, file: Path, content: Mapping[str, Any]) -> bool:
        """Whether a file with this content is of this format."""
        return file.suffix in self.suffixes and any(names <= set(content) for names in self.signatures)


def _names(*names: str) -> tuple[frozenset[str], ...]:
    """One signature per argument, its names separated by blanks."""
    return tuple(frozenset(signature.split()) for signature in names)


def _read_saelens(file: Path, content: dict[str, Any]) -> SparseAutoencoder:
    return saelens.read_saelens(file.parent, content)


_PICKLES, _SAFETENSORS = (".pt", ".pth"), (".safetensors",)
FORMATS = (
    Format("saelens", _SAFETENSORS, _names("W_enc W_dec"), _read_saelens),
    Format(
        dictionary_learning.FORMAT,
        _PICKLES,
        _names("encoder.weight encoder.bias decoder.weight", "encoder.weight gate_bias", "W_enc W_dec", "ae"),
        dictionary_learning.read_dictionary_learning,
    ),
    Format(sparsify.FORMAT, _SAFETENSORS, _names("encoder.weight W_dec b_dec"), sparsify.read_sparsify),
    Format(openai.FORMAT, _PICKLES, _names("pre_bias latent_bias encoder.weight"), openai.read_openai),
    Format(gemma_scope.FIRST, (".npz",), _names("w_enc w_dec threshold"), gemma_scope.read_gemma_scope),
    Format(gemma_scope.SECOND, _SAFETENSORS, _names("w_enc w_dec threshold"), gemma_scope.read_gemma_scope_2),
    Format(
        llama_scope.FORMAT,
        _SAFETENSORS,
        _names("encoder.weight encoder.bias decoder.weight", "W_E b_E W_D"),
        llama_scope.read_llama_scope,
    ),
)
WEIGHT_FILES = (
    saelens.TENSORS,
    sparsify.TENSORS,
    dictionary_learning.TENSORS,
    "params.npz",
    "params.safetensors",
    "checkpoints/final.safetensors",
)
"""Where weights usually lie in a folder; a single file of weights by another name is found as well."""


def load(name: str | Path) -> SparseAutoencoder:
    """Read an SAE from a folder (a run, too), a file of weights, or the Hugging Face hub.

    Args:
        name: a path, or ``hf:org/repo``, ``hf:org/repo/path`` or either of them with ``@revision``.

    Raises:
        InputError: there is nothing of the kind, the hub cannot be reached, or the SAE cannot be read: a file is
            missing, damaged or unsafe, its format is unknown, or it computes what we do not have.
    """
    path = hub.fetch(str(name), WEIGHT_FILES) if hub.is_hub_name(str(name)) else Path(name)
    file = weight_file(path)
    if file is None:
        return saelens.read_saelens(path)  # whose sentences say what is missing
    content = read_content(file)
    return format_of(file, content).read(file, content)


def holds_sae(name: str | Path) -> bool:
    """Whether there is something that :func:`load` would try: a name of the hub, or weights on disk.

    Raises:
        InputError: the folder holds several files of weights.
    """
    return hub.is_hub_name(str(name)) or weight_file(Path(name)) is not None


def weight_file(path: Path) -> Path | None:
    """The file that holds the weights of the SAE at ``path``: a run, a folder or that file; None where there is none.

    Raises:
        InputError: the folder holds several.
    """
    if path.is_file():
        return path
    in_run = RunFolder(path).sae / saelens.TENSORS
    if in_run.is_file():
        return in_run
    found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if not found and path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in found)
        raise InputError(f"{path} holds several files of weights: give the path of one of them ({names}).")
    return found[0] if found else None


def format_of(file: Path, content: Mapping[str, Any]) -> Format:
    """The format of a file by what it holds.

    Raises:
        InputError: it is none that we know.
    """
    for known in FORMATS:
        if known.is_of(file, content):
            return known
    names = ", ".join(sorted(content)[:8]) + (", …" if len(content) > 8 else "")
    formats = ", ".join(known.name for known in FORMATS)
    raise InputError(
        f"{file} holds {names or 'nothing'}: that is no SAE of a format that is read ({formats})."
    )
