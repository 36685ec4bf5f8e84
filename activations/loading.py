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
from activations.processes import local_rank
from activations.tokenizer import Tokenizer

BUILTIN = Path(__file__).parent / "builtin"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
TOKENIZER_FILES = ["tokenizer*", "vocab*", "*.model", "*.tiktoken"]
HUB_DEADLINE = 6.0
"""Seconds to wait for the hub to answer, before whatever is in the local cache is taken."""

T = TypeVar("T")


def resolve_device(device: str | None) -> torch.device:
    """The device of that name; None means the CUDA device if there is one, else the MPS device, else the CPU.

    Of several CUDA devices, each process that ``torchrun`` started on this machine takes its own.

    Raises:
        InputError: this machine has no such device.
    """
    if device is None:
        if torch.cuda.is_available():
            rank = local_rank()
            return torch.device("cuda") if rank is None else torch.device("cuda", rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"The device {device!r} is not available on this machine; 'cpu' always is."
        ) from None
    return chosen


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype of that name for the weights on ``device``; None in the result means the checkpoint's own.

    Without a wish, that is so except on the CPU, where half precision is slow: there it is float32.

    Raises:
        InputError: it is not one of float32, bfloat16 and float16.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype is {dtype!r}; it must be 'float32', 'bfloat16' or 'float16'.")
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
        revision = within(HUB_DEADLINE, lambda: hub_revision(name))
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


def hub_revision(name: str, revision: str | None = None) -> str | None:
    """The commit of a hub model, by default the newest; None when the hub does not answer (the cache may have it)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().model_info(name, revision=revision, timeout=HUB_DEADLINE).sha
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:
        return None


def within(seconds: float, call: Callable[[], T]) -> T | None:
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
    """Read model and tokenizer from a Hugging Face folder: a causal language model, or a masked one such as BERT.

    Args:
        folder: holds ``config.json``, ``*.safetensors`` and a tokenizer.
        device: where the weights go.
        dtype: of the weights; None keeps the checkpoint's.

    Returns:
        the Hugging Face model (evaluation mode; SDPA attention wherever transformers has it) and tokenizer.

    Raises:
        InputError: a file is missing or cannot be read, or this is no language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

    config = _read_config(folder)
    if _is_masked_config(config):
        auto_class: Any = AutoModelForMaskedLM
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto_class = AutoModelForCausalLM
    else:
        raise InputError(
            f"{folder} holds a {config.model_type} model, which is no causal or masked language model (one that reads"
            " pictures is loaded in Python, by VisionModel)."
        )
    tokenizer = _read_tokenizer(folder)
    return _read_model(folder, auto_class, config, device, dtype), tokenizer


def load_vision_folder(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Read a model of pictures from a Hugging Face folder, with its classifier if it has one.

    Arguments as for :func:`load_folder`; no tokenizer is needed.

    Raises:
        InputError: a file is missing or cannot be read, or the model reads no pictures.
    """
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        AutoModel,
        AutoModelForImageClassification,
    )

    config = _read_config(folder)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise InputError(f"{folder} holds a {config.model_type} model, which reads no pictures.")
    has_classifier = any("ImageClassification" in name for name in config.architectures or ())
    auto_class = AutoModelForImageClassification if has_classifier else AutoModel
    return _read_model(folder, auto_class, config, device, dtype)


def _read_config(folder: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    _check_files(folder)
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{folder} holds a model of type {model_type!r}, which this version of transformers does not know: update"
            " transformers, or choose another model."
        )
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # configurations fail in many ways, each with its own exception
        raise InputError(f"The model in {folder} cannot be read: {_first_line(error)}.") from None


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # so do tokenizers
        if any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
            raise InputError(f"The tokenizer in {folder} cannot be read: {_first_line(error)}.") from None
        tokenizer = None
    # transformers makes one of special tokens alone where the files are missing
    if tokenizer is None or set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise InputError(
            f"{folder} holds no tokenizer: save tokenizer.json and tokenizer_config.json beside the weights."
        )
    return tokenizer


def _read_model(
    folder: Path, auto_class: Any, config: Any, device: torch.device, dtype: torch.dtype | None
) -> Any:
    try:
        with quiet_transformers():
            model, report = auto_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # so do weights
        raise InputError(f"The model in {folder} cannot be read: {_first_line(error)}.") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"The weights in {folder} do not belong to its config.json: {missing[0]} is missing"
            f" ({len(missing)} in all)."
        )
    if getattr(model, "hf_quantizer", None) is None:  # a quantised model stays where it was read to
        model = model.to(device)
    return model.eval()


def _is_masked_config(config: Any) -> bool:
    """Whether a configuration belongs to a model that reads both ways and is trained to fill in masked tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type, "").endswith("ForMaskedLM")
    return masked and not getattr(config, "is_decoder", False)


def is_masked_lm(hf_model: Any) -> bool:
    """Whether a Hugging Face model reads both ways (BERT) rather than from left to right."""
    return type(hf_model).__name__.endswith("ForMaskedLM")


def embedding_rows(hf_model: Any) -> int:
    """How many token ids a Hugging Face model can be given."""
    embedding = hf_model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def wrap_tokenizer(hf_tokenizer: Any, hf_model: Any, *, adds_bos: bool | None = None) -> Tokenizer:
    """The tokenizer of a model, which must fit it.

    Args:
        hf_tokenizer: as ``AutoTokenizer`` gives it.
        hf_model: the Hugging Face model.
        adds_bos: see :class:`Tokenizer`.

    Raises:
        InputError: it has tokens for which the model has no embedding. (Added special tokens are not counted: some
            models come with one for pictures that their text part does not know.)
    """
    rows = embedding_rows(hf_model)
    vocabulary = hf_tokenizer.get_vocab()
    last = max((i for i in vocabulary.values() if i not in hf_tokenizer.added_tokens_decoder), default=-1)
    if last >= rows:
        raise InputError(
            f"The tokenizer does not fit the model: its token ids go up to {last}, and the model's embedding has"
            f" {rows} rows."
        )
    eos_ids = _eos_ids(hf_model)
    if not eos_ids and hf_tokenizer.eos_token_id is None and hf_tokenizer.sep_token_id is not None:
        eos_ids = [hf_tokenizer.sep_token_id]  # a BERT's texts end with its separator
    vocab_size = hf_model.config.get_text_config().vocab_size
    return Tokenizer(hf_tokenizer, eos_ids, vocab_size=vocab_size, adds_bos=adds_bos)


def _eos_ids(hf_model: Any) -> list[int]:
    """The tokens that end a text: the generation config may name several (chat models do)."""
    eos = getattr(getattr(hf_model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = getattr(hf_model.config.get_text_config(), "eos_token_id", None)
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


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
