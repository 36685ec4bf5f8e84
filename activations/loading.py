"""Finding and reading a model's files: the bundled model, a local folder, the Hugging Face hub.

Nothing here runs code that comes with a model: weights are safetensors, everything else is JSON.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch

from activations.errors import InputError
from activations.files import read_json

BUILTIN = Path(__file__).parent / "builtin"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
HUB_DEADLINE = 6.0
"""Seconds to wait for the hub to answer, before whatever is in the local cache is taken."""

T = TypeVar("T")


def resolve_device(device: str | None) -> torch.device:
    """The device of that name; None means the CUDA device if there is one, else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"The device {device!r} is not available on this machine; 'cpu' always is."
        ) from None
    return chosen


def locate(name: str) -> Path:
    """The local folder of a model: ``"builtin"``, a folder, or a hub name, which is downloaded once.

    Raises:
        InputError: there is no such model, or the hub cannot be reached.
    """
    if name == "builtin":
        return BUILTIN
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(
            f"{name} is a file, not a model: give the folder that holds config.json, safetensors weights and"
            " a tokenizer."
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    give_folder = "give the path of a folder that holds config.json, safetensors weights and a tokenizer"
    try:
        revision = _within(HUB_DEADLINE, lambda: _hub_revision(name))
        folder = snapshot_download(
            name,
            revision=revision,
            local_files_only=revision is None,
            allow_patterns=HUB_FILES,
            ignore_patterns=["*/*"],  # sub-folders hold the same weights in other formats
        )
    except HFValidationError:
        raise InputError(
            f"There is no folder {name}, and it is no hub name either: give 'builtin', the path of a model"
            " folder or a name such as openai-community/gpt2."
        ) from None
    except GatedRepoError:
        raise InputError(
            f"The Hugging Face hub asks to accept the licence of {name} first: do so on its page and log in"
            f" with 'hf auth login', or {give_folder}."
        ) from None
    except RepositoryNotFoundError:
        raise InputError(f"{name} is neither a folder nor a model on the Hugging Face hub.") from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"{name} is no folder, and the Hugging Face hub cannot be reached to look for a model of that"
            f" name: {give_folder}."
        ) from None
    return Path(folder)


def _hub_revision(name: str) -> str | None:
    """The newest commit of a hub model; None when the hub does not answer (the cache may still have it)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return HfApi().model_info(name, timeout=HUB_DEADLINE).sha
    except RepositoryNotFoundError:
        raise
    except Exception:
        return None


def _within(seconds: float, call: Callable[[], T]) -> T | None:
    """The result of ``call``, or None after ``seconds``: name resolution knows no time limit of its own."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except FutureTimeout:
        return None


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Read model and tokenizer from a Hugging Face folder.

    Args:
        folder: holds ``config.json``, ``*.safetensors`` and a tokenizer.
        device: where the weights go.
        dtype: of the weights; None keeps the checkpoint's.

    Returns:
        the Hugging Face model (evaluation mode, SDPA attention) and tokenizer.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_files(folder)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizer files fail in many ways, each with its own exception
        raise InputError(f"The tokenizer in {folder} cannot be read: {_first_line(error)}.") from None
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except Exception as error:  # so do configurations and weights
        raise InputError(f"The model in {folder} cannot be read: {_first_line(error)}.") from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"The weights in {folder} do not belong to its config.json: {missing[0]} is missing"
            f" ({len(missing)} in all)."
        )
    return model.to(device).eval(), tokenizer


def _check_files(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a model: it has no config.json beside safetensors weights and a tokenizer."
        )
    read_json(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(
            f"{folder} holds no weights: a model needs *.safetensors files (no other format is read)."
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            raise InputError(f"{file} is damaged or not a safetensors file: fetch it again.") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside the block."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
