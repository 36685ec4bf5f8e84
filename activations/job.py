"""From a configuration to a store: the model, the token blocks of every split, the activations."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

from activations.blocks import TokenBlocks
from activations.config import CaptureConfig, ModelDtype
from activations.corpus import Corpus, Split
from activations.errors import InputError
from activations.files import room_for
from activations.models import LanguageModel
from activations.plan import Plan
from activations.processes import ALONE, Processes
from activations.progress import Progress, silent
from activations.store import ActivationStore
from activations.verify import captured_with
from activations.writer import append_store, capture_of, write_store

LONGEST_CONTEXT = 1024  # tokens per sequence, unless asked for
HELD_OUT_TOKENS = 100_000  # of the test and of the score split, for captures of two million tokens and more
FULL_TOKENS = 2_000_000
VERSIONED = ("saescope", "torch", "transformers")


class ModelSettings(Protocol):
    """What :class:`CaptureConfig` and :class:`sae.config.TrainConfig` both say about the model."""

    @property
    def model(self) -> str: ...
    @property
    def device(self) -> str | None: ...
    @property
    def dtype(self) -> ModelDtype | None: ...
    @property
    def center_writing_weights(self) -> bool: ...


def load_model(settings: ModelSettings, *, device: str | None = None) -> LanguageModel:
    """The model that a configuration names; ``device`` goes before the configuration's.

    Raises:
        InputError: see :meth:`LanguageModel.load`.
    """
    return LanguageModel.load(
        settings.model,
        device=device or settings.device,
        dtype=settings.dtype,
        center_writing_weights=settings.center_writing_weights,
    )


def resolved_context_length(model: LanguageModel, asked: int | None) -> int:
    """Tokens per sequence: what was asked for, or what the model was made for, at most 1,024.

    Raises:
        InputError: the model reads fewer tokens.
    """
    if asked is None:
        return min(model.context_length, LONGEST_CONTEXT)
    if asked > model.context_length:
        raise InputError(
            f"context_length is {asked}, and {model.name} reads at most {model.context_length} tokens."
        )
    return asked


C = TypeVar("C")


def decided(config: C, default: C, values: dict[str, Any], folder: Path) -> C:
    """``config`` with the values that the store in ``folder`` decides.

    Raises:
        InputError: the configuration says something else (other than its default) about one of them.
    """
    for name, value in values.items():
        given = getattr(config, name)
        if given not in (value, getattr(default, name)):
            raise InputError(
                f"{name} is {given!r}, and {folder} was captured with {value!r}: leave {name} out, or capture again."
            )
    return replace(config, **values)  # type: ignore[type-var]


def appending(config: CaptureConfig, folder: Path) -> CaptureConfig:
    """``config`` for more text in a store, which decides about everything but the text.

    Raises:
        InputError: as for :func:`decided` and :func:`activations.verify.captured_with`.
    """
    captured = captured_with(folder)
    names = ("model", "hook_names", "context_length", "stored_as", "rule", "dtype", "center_writing_weights")
    values = {name: getattr(captured, name) for name in names}
    return decided(config, CaptureConfig(), values, folder)


@dataclass(frozen=True)
class CaptureJob:
    """A capture that is about to begin: everything is checked, and nothing is written yet.

    blocks: of the train split. held_out: of the other splits, as far as the text has enough of them.
    shortage: why a split is not there, one sentence each.
    """

    config: CaptureConfig
    model: LanguageModel
    corpus: Corpus
    blocks: TokenBlocks
    held_out: dict[str, TokenBlocks]
    shortage: list[str]

    @classmethod
    def prepare(cls, config: CaptureConfig, *, model: LanguageModel | None = None) -> "CaptureJob":
        """Load the model, read the text and cut it into token blocks.

        Args:
            model: a loaded model in the place of the one that ``config`` names.

        Raises:
            InputError: settings that cannot work, an unknown model or hook, text that cannot be read.
        """
        config.check()
        model = model or load_model(config)
        for name in config.hook_names:
            model.width(name)  # refuses a hook that is not there
        corpus = Corpus(config.corpus)
        context = resolved_context_length(model, config.context_length)
        # What was left to the machine is written down as it came out.
        dtype = str(model.dtype).removeprefix("torch.")
        config = replace(config, model=model.name, context_length=context)
        if dtype in get_args(ModelDtype):
            config = replace(config, dtype=dtype)  # type: ignore[arg-type]

        def blocks(split: Split, n_tokens: int) -> TokenBlocks:
            return corpus.blocks(model.tokenizer, split, n_tokens, context)

        train = blocks("train", config.tokens)
        held_out: dict[str, TokenBlocks] = {}
        shortage = []
        n_tokens = max(int(HELD_OUT_TOKENS * min(config.tokens / FULL_TOKENS, 1)), 1000)
        splits: tuple[Split, ...] = ("test", "score")
        for split in splits:
            try:
                held_out[split] = blocks(split, n_tokens)
            except InputError as error:
                shortage.append(str(error))
        return cls(config, model, corpus, train, held_out, shortage)

    @property
    def bytes_needed(self) -> int:
        """What the store will take on disk."""
        tokens = {"train": self.blocks, **self.held_out}
        config = self.config
        captures = [capture_of(self.blocks, {})]
        plan = Plan.of(self.model, tokens, config.hook_names, config.stored_as, config.rule, captures)
        return plan.bytes(tokens)

    def bytes_free(self, folder: Path) -> int:
        """What the disk has room for."""
        return room_for(folder, freed=folder.glob("shard-*"))

    @property
    def about(self) -> dict[str, Any]:
        """What the store's manifest remembers of where its activations came from."""
        return {
            "config": asdict(self.config),
            "corpus": self.corpus.describe(),
            "corpus_hash": self.corpus.hash,
            "context_length": self.blocks.context_length,
            "versions": {name: version(name) for name in VERSIONED},
        }

    def write(
        self,
        folder: Path,
        *,
        append: bool = False,
        processes: Processes = ALONE,
        progress: Progress = silent,
    ) -> ActivationStore:
        """Capture into ``folder``; with ``append``, behind what a store there holds.

        Raises:
            InputError: see :func:`activations.writer.write_store` and :func:`activations.writer.append_store`.
        """
        if append:
            return append_store(
                self.model, self.blocks, folder, about=self.about, processes=processes, progress=progress
            )
        return write_store(
            self.model,
            self.blocks,
            self.config.hook_names,
            folder,
            stored_as=self.config.stored_as,
            rule=self.config.rule,
            about=self.about,
            others=self.held_out,
            processes=processes,
            progress=progress,
        )


def text_again(model: LanguageModel) -> Callable[[dict[str, Any]], dict[str, TokenBlocks]]:
    """For :func:`activations.verify.repair_store`: makes the token blocks of a capture again from its text."""

    def blocks(about: dict[str, Any]) -> dict[str, TokenBlocks]:
        if "config" not in about:
            raise InputError(
                "The tokens are damaged, and the store does not say which text they were made from."
            )
        job = CaptureJob.prepare(CaptureConfig.from_json(about["config"]), model=model)
        return {"train": job.blocks, **job.held_out}

    return blocks
