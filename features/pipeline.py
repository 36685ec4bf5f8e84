"""The whole road, stage by stage: tokens → activations → SAE → evaluation → index → labels.

Every stage writes into one run folder and says in a manifest what it was made from. A stage whose manifest
matches its inputs is not done again, so an interrupted run continues, and a changed setting redoes what depends
on it and nothing else.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from activations.blocks import TokenBlocks
from activations.corpus import Corpus, Split
from activations.errors import InputError
from activations.files import FORMAT_VERSION, MANIFEST, is_finished, read_json, write_json
from activations.models import LanguageModel
from activations.progress import Progress, silent
from activations.statistics import measure_statistics
from activations.store import ActivationStore, write_store
from activations.stream import ActivationStream
from features.build import build_index
from features.explain import label_features, label_inputs
from features.index import FeatureIndex
from features.labels import Labels
from sae.config import TrainConfig
from sae.controls import REFERENCE_ROWS, reference_activations
from sae.evaluate import Evaluation, evaluate
from sae.model import SparseAutoencoder
from sae.run import RunFolder, read_run_config, write_run_config
from sae.train import train

LONGEST_CONTEXT = 1024  # tokens per training sequence, unless asked for


@dataclass(frozen=True)
class Sizes:
    """How many tokens the stages after training read."""

    index_tokens: int = 500_000
    """Tokens of the train split that the feature index covers."""
    score_tokens: int = 100_000
    """Tokens of the score split that labels are judged on."""
    test_tokens: int = 100_000
    """Tokens of the test split that metrics are measured on."""

    @classmethod
    def for_training(cls, tokens: int) -> "Sizes":
        """The default sizes, scaled down for runs shorter than two million tokens."""
        share = min(tokens / 2_000_000, 1.0)
        return cls(*(max(int(size * share), 1_000) for size in (500_000, 100_000, 100_000)))


class Pipeline:
    """The stages of one run folder.

    Args:
        folder: the run folder; made if it is not there.
        config: what to train; None reads the folder's ``run.toml``.
        sizes: tokens for index, scoring and evaluation; scaled to the training tokens by default.
        store_activations: capture the activations to disk before training (two bytes a number), so that several
            trainings and the index read them; without it, training computes them as it goes.
        model: a loaded model to use in the place of ``config.model``; the run remembers its name, and
            :func:`features.run.open_run` takes it again.

    Raises:
        InputError: the folder holds something that is no run, or the settings cannot work.
    """

    def __init__(
        self,
        folder: str | Path,
        config: TrainConfig | None = None,
        *,
        sizes: Sizes | None = None,
        store_activations: bool = False,
        model: LanguageModel | None = None,
        progress: Progress = silent,
    ) -> None:
        self.run = RunFolder(Path(folder))
        self._on_disk = config is None
        if config is None:
            config = read_run_config(self.run.path)
        if model is not None:
            config = replace(config, model=model.name)
        config.check()
        self.config = config
        self.sizes = sizes or Sizes.for_training(config.tokens)
        self.store_activations = store_activations
        self.progress = progress
        self._given_model = model
        if self.run.path.exists() and not self.run.path.is_dir():
            raise InputError(f"{self.run.path} is a file, and a run needs a folder of that name.")
        if self.run.path.is_dir() and any(self.run.path.iterdir()) and not self.run.config.is_file():
            raise InputError(
                f"{self.run.path} holds files that are not a run's: give an empty or new folder."
            )

    @cached_property
    def model(self) -> LanguageModel:
        """The language model."""
        return self._given_model or LanguageModel.load(self.config.model)

    @cached_property
    def corpus(self) -> Corpus:
        """The text."""
        return Corpus(self.config.corpus)

    @property
    def context_length(self) -> int:
        """Tokens per sequence."""
        if self.config.context_length is not None:
            return self.config.context_length
        return min(self.model.context_length, LONGEST_CONTEXT)

    def start(self) -> None:
        """Check the settings, read the corpus, and write ``run.toml`` and the token blocks.

        Whatever can be wrong is found before the first byte is written.

        Raises:
            InputError: an unknown model, hook, layer or file, a corpus that is empty or has too few documents to
                measure anything on, settings that cannot work.
        """
        self.config.sae.check()
        self.model.width(self.config.hook_name)  # refuses a hook that is not there
        if self.context_length > self.model.context_length:
            raise InputError(
                f"context_length is {self.context_length}, and {self.config.model} reads at most"
                f" {self.model.context_length} tokens."
            )
        needed: tuple[tuple[Split, int], ...] = (
            ("test", self.sizes.test_tokens),
            ("train", self.config.tokens),
        )
        made = {
            split: self.corpus.blocks(self.model.tokenizer, split, n_tokens, self.context_length)
            for split, n_tokens in needed
            if not TokenBlocks.is_finished(self.run.tokens / split, self._token_inputs(n_tokens))
        }
        write_run_config(self.run.path, self.config)
        for split, n_tokens in needed:
            if split in made:
                made[split].save(self.run.tokens / split, self._token_inputs(n_tokens))

    def tokens(self, split: Split, n_tokens: int) -> TokenBlocks:
        """Token blocks of a split, from the run folder or made and kept there.

        In a run opened from disk they are those it was made with, whatever has become of the text since.
        """
        folder = self.run.tokens / split
        if self._on_disk and self._fit(folder, n_tokens):
            return TokenBlocks.load(folder)
        inputs = self._token_inputs(n_tokens)
        if TokenBlocks.is_finished(folder, inputs):
            return TokenBlocks.load(folder)
        blocks = self.corpus.blocks(self.model.tokenizer, split, n_tokens, self.context_length)
        blocks.save(folder, inputs)
        return blocks

    def _fit(self, folder: Path, n_tokens: int) -> bool:
        """Whether a folder holds token blocks of this tokenizer, number and length, from whatever text."""
        if not (folder / MANIFEST).is_file():
            return False
        found = read_json(folder / MANIFEST).get("inputs", {})
        wanted = {"tokenizer": self.model.tokenizer.hash, "tokens": n_tokens, "context": self.context_length}
        return bool(wanted.items() <= found.items())

    def _token_inputs(self, n_tokens: int) -> dict[str, Any]:
        return {
            "corpus": self.corpus.hash,
            "tokenizer": self.model.tokenizer.hash,
            "tokens": n_tokens,
            "context": self.context_length,
        }

    @cached_property
    def train_blocks(self) -> TokenBlocks:
        """The training tokens."""
        return self.tokens("train", self.config.tokens)

    def capture(self) -> ActivationStore:
        """Write the activations of the training tokens to disk, or open them."""
        return write_store(
            self.model, self.train_blocks, self.config.hook_name, self.run.activations, progress=self.progress
        )

    def train(self) -> SparseAutoencoder:
        """Train the SAE, or load it."""
        config, model, blocks = self.config, self.model, self.train_blocks
        inputs = {
            "config": _as_inputs(config),
            "model": model.hash,
            "dtype": str(model.dtype),
            "device": model.device.type,
            "tokens": blocks.hash,
            "activations": "stored" if self.store_activations else "live",
        }
        if is_finished(self.run.sae, "sae", inputs):
            return self.sae()
        batch = config.resolved_batch_tokens()
        n_batches = config.n_steps()
        stream: ActivationStream
        if self.store_activations:
            store = self.capture()
            mean, scale, exclusion = store.mean, store.scale, store.exclusion
            stream = ActivationStream.from_store(
                store, batch_size=batch, n_batches=n_batches, seed=config.seed, device=model.device
            )
        else:
            statistics = measure_statistics(model, blocks, config.hook_name, progress=self.progress)
            mean, scale, exclusion = statistics.mean, statistics.scale, statistics.exclusion
            stream = ActivationStream.live(
                model,
                blocks,
                config.hook_name,
                exclusion,
                batch_size=batch,
                n_batches=n_batches,
                seed=config.seed,
            )
        metadata = {
            "model_name": config.model,
            "model_hash": model.hash,
            "hook_name": config.hook_name,
            "context_size": self.context_length,
            "prepend_bos": blocks.bos,
            "packing": blocks.packing,
            "exclude_special_tokens": True,
            "max_norm": None if exclusion.max_norm == float("inf") else exclusion.max_norm,
            "dataset_path": config.corpus.name,
            "corpus_hash": self.corpus.hash,
        }
        return train(
            config,
            stream,
            mean.to(model.device),
            scale,
            self.run.path,
            metadata=metadata,
            inputs=inputs,
            progress=self.progress,
        )

    def sae(self) -> SparseAutoencoder:
        """The trained SAE, from the run folder, on the model's device."""
        return SparseAutoencoder.load(self.run.sae).to(self.model.device)

    def evaluate(self, sae: SparseAutoencoder) -> Evaluation:
        """Measure the SAE on the test split into ``evaluation.json``, or read what was measured."""
        blocks = self.tokens("test", self.sizes.test_tokens)
        path = self.run.evaluation
        if path.is_file():
            content = read_json(path)
            inputs = {"model": self.model.hash, "sae": sae.hash, "tokens": blocks.hash}
            if (
                content.pop("format_version", None) == FORMAT_VERSION
                and inputs.items() <= content["inputs"].items()
            ):
                return Evaluation.from_json(content)
        reference = reference_activations(self.model, sae, self.train_blocks.first_tokens(REFERENCE_ROWS))
        evaluation = evaluate(self.model, sae, blocks, reference=reference, progress=self.progress)
        write_json(path, {"format_version": FORMAT_VERSION, **evaluation.to_json()})
        return evaluation

    def index(self, sae: SparseAutoencoder) -> FeatureIndex:
        """Build the feature index over the first training tokens, or open it."""
        return build_index(
            self.model,
            sae,
            self.train_blocks.first_tokens(self.sizes.index_tokens),
            self.run.index,
            activations=self._stored(),
            progress=self.progress,
        )

    def _stored(self) -> ActivationStore | None:
        """The activations on disk, if they are there, whole, and of these tokens."""
        if not (self.run.activations / MANIFEST).is_file():
            return None
        store = ActivationStore.open(self.run.activations)
        fits = store.blocks.hash == self.train_blocks.hash and store.hook_name == self.config.hook_name
        return store if fits and store.inputs["model"] == self.model.hash else None

    def label(self, sae: SparseAutoencoder, index: FeatureIndex) -> Labels:
        """Give every feature a first label, scored on the score split; people's labels stay.

        Labels of another SAE that this folder held are kept beside, as ``labels-<its hash>.sqlite``.
        """
        blocks = self.tokens("score", self.sizes.score_tokens)
        self._retire_labels(sae)
        labels = Labels.open(self.run.labels)
        if labels.inputs != label_inputs(sae, index, blocks):
            label_features(index, self.model, sae, blocks, labels, progress=self.progress)
        return labels

    def _retire_labels(self, sae: SparseAutoencoder) -> None:
        """Feature numbers mean nothing to another SAE: put its labels aside."""
        described = Labels.open(self.run.labels).inputs
        if described is not None and described["sae_hash"] != sae.hash:
            for path in self.run.path.glob("labels.sqlite*"):
                path.rename(
                    path.with_name(path.name.replace("labels", f"labels-{described['sae_hash'][:8]}", 1))
                )

    def drop_activations(self) -> None:
        """Delete the stored activations: only another training would need them."""
        if self.run.activations.exists():
            shutil.rmtree(self.run.activations)


def _as_inputs(config: TrainConfig) -> dict[str, Any]:
    """What training depends on: the configuration with its defaults worked out."""
    worked_out = replace(
        config, batch_tokens=config.resolved_batch_tokens(), learning_rate=config.resolved_learning_rate()
    )
    return asdict(worked_out)


def run_pipeline(
    folder: str | Path,
    config: TrainConfig | None = None,
    *,
    sizes: Sizes | None = None,
    store_activations: bool = False,
    model: LanguageModel | None = None,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda stage: None,
) -> Pipeline:
    """Train, evaluate, index and label into ``folder``; ``announce`` hears the name of each stage.

    Arguments and errors as for :class:`Pipeline`.
    """
    pipeline = Pipeline(
        folder, config, sizes=sizes, store_activations=store_activations, model=model, progress=progress
    )
    pipeline.start()
    announce("train")
    sae = pipeline.train()
    announce("evaluate")
    pipeline.evaluate(sae)
    announce("index")
    index = pipeline.index(sae)
    announce("label")
    pipeline.label(sae, index)
    return pipeline
