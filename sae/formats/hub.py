"""SAEs on the Hugging Face hub: ``hf:org/repo/path@revision`` names one, :func:`push` uploads one with its card."""

import re
import tempfile
from pathlib import Path
from typing import Any

from activations.errors import InputError
from activations.files import read_json
from activations.loading import hub_revision, within
from sae.formats import saelens
from sae.formats.card import model_card
from sae.model import SparseAutoencoder
from sae.run import RunFolder

PREFIX = "hf:"
SECONDS = 5.0  # to wait for the hub: with the imports a command fails within ten
CONFIGS = ("cfg.json", "config.json", "hyperparams.json", saelens.SCALER)
_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]*[^@/]))?/?(?:@(?P<revision>.+))?")


def is_hub_name(name: str) -> bool:
    """Whether a name means the hub."""
    return name.startswith(PREFIX)


def fetch(name: str, weight_files: tuple[str, ...]) -> Path:
    """The local place of an SAE of the hub; its configuration and weights are downloaded once, nothing else.

    Args:
        name: ``hf:org/repo``, with the path of a folder or of a file of weights, and ``@revision`` where wanted.
        weight_files: names under which a folder's weights may lie.

    Raises:
        InputError: the name is none, there is no such repository, revision or path, or the hub cannot be reached
            (within ten seconds) and the cache does not hold it.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"{name} is no name of the hub: those are hf:org/repo/path, with @revision if it matters."
        )
    repository, path = match["repository"], match["path"] or ""
    snapshot = _download(name, repository, match["revision"], _wanted(path, weight_files))
    place = snapshot / path
    if not place.exists():
        raise InputError(
            f"{name} holds no SAE: the repository has no weights by a known name at {path or 'its top'}."
        )
    return place


def _wanted(path: str, weight_files: tuple[str, ...]) -> list[str]:
    """The files to ask for, where ``path`` is a folder and where it is a file with its configuration beside it."""
    prefix = f"{path}/" if path else ""
    parent = path.rpartition("/")[0]
    above = (parent, parent.rpartition("/")[0])
    places = dict.fromkeys([prefix, *(f"{folder}/" if folder else "" for folder in above)])
    wanted = [
        *(f"{prefix}{name}" for name in weight_files),
        *(f"{place}{name}" for place in places for name in CONFIGS),
    ]
    return [path, *wanted] if path else wanted


def _download(name: str, repository: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = within(SECONDS, lambda: hub_revision(repository, revision))
        folder = snapshot_download(
            repository, revision=commit or revision, local_files_only=commit is None, allow_patterns=files
        )
    except (HFValidationError, RevisionNotFoundError):
        raise InputError(
            f"{name} is no name of the hub, or names a revision that its repository does not have."
        ) from None
    except GatedRepoError:
        raise InputError(
            f"The Hugging Face hub asks to accept the licence of {repository} first: do so on its page and log in with"
            " 'hf auth login'."
        ) from None
    except RepositoryNotFoundError:
        raise InputError(f"The Hugging Face hub has no repository {repository}, or not for you.") from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"{name} is not in the local cache, and the Hugging Face hub cannot be reached: download it where there is"
            " a connection, and give the path of its folder."
        ) from None
    except Exception as error:  # of whichever library carries the connection
        raise InputError(f"{name} cannot be downloaded ({_reason(error)}): try again.") from None
    return Path(folder)


def push(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload an SAE in SAELens' format, with a card made from what it says of itself, as one commit.

    Args:
        folder: a run folder (its SAE and evaluation are uploaded, nothing else), or whatever
            :meth:`SparseAutoencoder.load` reads. repository: ``org/name``, made if it is not there.
        private: whether a repository made now is private.

    Returns:
        the address of its page.

    Raises:
        InputError: ``repository`` is no name for one, there is no SAE to read, nobody is logged in, or the hub cannot
            be reached or refuses.
    """
    _check_name(repository)
    run = RunFolder(Path(folder))
    sae = SparseAutoencoder.load(folder)
    evaluation: dict[str, Any] = read_json(run.evaluation) if run.evaluation.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "sae"
        sae.save(staged)
        if evaluation:
            (staged / run.evaluation.name).write_bytes(run.evaluation.read_bytes())
        (staged / "README.md").write_text(model_card(sae, repository, evaluation), encoding="utf-8")
        return _upload(staged, repository, private)


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise InputError(f"{repository!r} is no name for a repository: give org/name.") from None


def _upload(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        if within(SECONDS, api.whoami) is None:
            raise TimeoutError(f"no answer within {SECONDS:g} seconds")
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="SAE")
    except LocalTokenNotFoundError:
        raise InputError(
            "Nobody is logged in to the Hugging Face hub here: run 'hf auth login' first."
        ) from None
    except Exception as error:  # of whichever library carries the connection
        raise InputError(
            f"{repository} was not uploaded ({_reason(error)}): check the connection and your rights there, and"
            " try again."
        ) from None
    return str(address)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
