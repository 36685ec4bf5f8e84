"""The whole road, stage by stage: tokens → activations → SAE → evaluation → index → labels.

Every stage writes into one run folder and says in a manifest what it was made from. A stage whose manifest
matches its inputs is not done again, so an interrupted run continues, and a changed setting redoes what depends
on it and nothing else.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from activations.blocks import TokenBlocks
from activations.config import ExclusionRule
from activations.corpus import Corpus, Split
from activations.errors import InputError
from activations.exclusion import Exclusion
from activations.files import FORMAT_VERSION, MANIFEST, is_finished, link_folder, read_json, write_json
from activations.job import decided, load_model, resolved_context_length
from activations.models import LanguageModel
from activations.progress import Progress, silent
from activations.statistics import Statistics, measure_statistics
from activations.store import SHUFFLED, ActivationStore, HookActivations, tokens_folder
from activations.store_stream import StoreStream, n_kept
from activations.stream import ActivationStream
from activations.verify import captured_with
from activations.writer import write_store
from features.build import build_index
from features.explain import label_features, label_inputs
from features.index import FeatureIndex
from features.labels import Labels
from features.weights import WeightIndex, build_weights
from sae.config import TrainConfig
from sae.controls import REFERENCE_ROWS, reference_activations
from sae.evaluate import Evaluation, evaluate
from sae.mesh import ALONE, Mesh
from sae.model import SparseAutoencoder, check_order
from sae.run import RunFolder, read_run_config, write_run_config
from sae.scaling import Scaling
from sae.train import Run, Watch, refuse_trained_otherwise, train

HELD_OUT_ROWS = 8192  # activations that training is measured on while it goes


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


@dataclass(frozen=True)
class Source:
    """What training reads: the batches, the units to train in, and which positions they leave out, by hook."""

    batches: ActivationStream | StoreStream
    scaling: Scaling
    exclusions: dict[str, Exclusion]


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
        replace_other: train anew in a folder that holds a training with other settings, instead of refusing it.
        mesh: the processes that train together, each with such a pipeline; process 0 writes, and does all other stages.

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
        replace_other: bool = False,
        mesh: Mesh = ALONE,
        progress: Progress = silent,
    ) -> None:
        self.run = RunFolder(Path(folder))
        self._on_disk = config is None
        if config is None:
            config = read_run_config(self.run.path)
        if model is not None:
            config = replace(config, model=model.name)
        config.check()
        self.store: HookActivations | None = None
        if config.store is not None and (not self._on_disk or Path(config.store).is_dir()):
            store = ActivationStore.open(config.store)
            config = _as_captured(config, store, self._on_disk)
            self.store = store.at(config.hook_name)
            also = _also(config, store)
            n_rows = n_kept(self.store, *also) if also else self.store.n_kept
            config = replace(config, tokens=config.tokens or n_rows)
        config = replace(config, tokens=config.resolved_tokens())
        self.config = config
        self.sizes = sizes or Sizes.for_training(config.resolved_tokens())
        self.store_activations = store_activations
        self.replace_other = replace_other
        self.mesh = mesh
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
        return self._given_model or load_model(self.config)

    @cached_property
    def corpus(self) -> Corpus:
        """The text."""
        return Corpus(self.config.corpus)

    @property
    def context_length(self) -> int:
        """Tokens per sequence."""
        return resolved_context_length(self.model, self.config.context_length)

    def check(self) -> None:
        """Check the settings against the model and the store, and write nothing.

        Raises:
            InputError: an unknown model, hook or layer, another model than the store's, settings that cannot work.
        """
        self.config.resolved_sae().check()
        for hook_name in self.config.hook_names:
            self.model.width(hook_name)  # refuses a hook that is not there
        if self.config.hook_out is not None:
            check_order(self.model, self.config.hook_name, self.config.hook_out)
        if self.store is not None and self.model.hash != self.store.store.manifest["inputs"]["model"]:
            raise InputError(
                f"The weights of {self.config.model} are not those that {self.config.store} was captured with."
            )

    def start(self, beside: "Pipeline | None" = None) -> None:
        """Check the settings, read the corpus, and write ``run.toml`` and the token blocks.

        Whatever can be wrong is found before the first byte is written.

        Args:
            beside: a run on the same text that was started; its token blocks are linked, not made again.

        Raises:
            InputError: as for :meth:`check`; a corpus that is empty or has too few documents to measure anything on.
        """
        if self.mesh.rank > 0:
            self.mesh.wait()  # until process 0 has written everything
            self.check()
            return
        self.check()
        needed: list[tuple[Split, int]] = [("test", self.sizes.test_tokens)]
        if self.store is None:
            needed.append(("train", self.config.resolved_tokens()))
        if beside is not None and (beside.run.tokens / "score").is_dir():
            needed.append(("score", self.sizes.score_tokens))
        missing = [
            (split, n_tokens)
            for split, n_tokens in needed
            if not TokenBlocks.is_finished(self.run.tokens / split, self._token_inputs(n_tokens))
        ]
        made: dict[Split, TokenBlocks] = {}
        if beside is None:
            made = {split: self._made(split, n_tokens) for split, n_tokens in missing}
        else:
            self.train_blocks = beside.train_blocks
        if not self.replace_other:
            tokens = made.get("train") or self.train_blocks
            refuse_trained_otherwise(self.run.path, {**self._settings, "tokens": tokens.hash})
        write_run_config(self.run.path, self.config)
        for split, n_tokens in missing:
            if beside is None:
                made[split].save(self.run.tokens / split, self._token_inputs(n_tokens))
            else:
                link_folder(beside.run.tokens / split, self.run.tokens / split)
        self.mesh.wait()

    def share(self, other: "Pipeline") -> None:
        """Take the model and the text from another run on the same ones, so that both are loaded once."""
        self.model, self.corpus = other.model, other.corpus

    def _made(self, split: Split, n_tokens: int) -> TokenBlocks:
        """Token blocks of a split: those beside the stored activations, or cut from the text."""
        if self.store is not None:
            tokens = self.store.store.manifest["tokens"]
            if split in tokens:
                held = TokenBlocks.load(tokens_folder(self.store.folder, split, tokens[split]))
                if held.n_tokens >= n_tokens:
                    return held  # all of it: a part would hold fewer documents
        return self.corpus.blocks(self.model.tokenizer, split, n_tokens, self.context_length)

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
        blocks = self._made(split, n_tokens)
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
            "corpus": self._text_hash,
            "tokenizer": self.model.tokenizer.hash,
            "tokens": n_tokens,
            "context": self.context_length,
        }

    @property
    def _text_hash(self) -> str:
        """Of the corpus; of the tokens in the store where training reads one, whose text may be gone."""
        return self.corpus.hash if self.store is None else self.store.blocks.hash

    @property
    def _about_text(self) -> dict[str, Any]:
        """Sources, columns, splits and revisions, as far as they are known."""
        if self.store is None:
            return self.corpus.describe()
        about: dict[str, Any] = self.store.store.manifest["captures"][0].get("corpus", {})
        return about

    @cached_property
    def train_blocks(self) -> TokenBlocks:
        """The training tokens."""
        if self.store is not None:
            return self.store.blocks
        return self.tokens("train", self.config.resolved_tokens())

    def capture(self) -> HookActivations:
        """The stored activations of the training tokens, captured first if they are not there."""
        if self.store is not None:
            return self.store
        store = write_store(
            self.model,
            self.train_blocks,
            list(self.config.hook_names),
            self.run.activations,
            rule=self.config.rule,
            replace_other=True,
            progress=self.progress,
        )
        return store.at(self.config.hook_name)

    def train(self, watch: Watch | None = None) -> SparseAutoencoder:
        """Train the SAE, or load it; ``watch`` hears the lines of ``metrics.jsonl``."""
        if self.is_trained:
            shutil.rmtree(
                self.run.checkpoints, ignore_errors=True
            )  # a kill in the last moment may have left some
            return self.sae()
        source = self.live_source() if self._live else self.stored_source(self.capture())
        run = Run(self.config, self.run.path, self.metadata(source.exclusions), self.training_inputs)
        return train(
            run,
            source.batches,
            source.scaling,
            held_out=self.held_out(source) if self.mesh.rank == 0 else None,
            replace_other=self.replace_other,
            mesh=self.mesh,
            progress=self.progress,
            watch=watch,
        )

    def held_out(self, source: Source) -> Tensor | None:
        """Activations that training does not see, to measure on while it goes: of the score split, on the CPU.

        Returns:
            ``[n, width]`` as the batches of ``source`` are laid out; None where the text has no such split.
        """
        try:
            blocks = self.tokens("score", self.sizes.score_tokens)
        except InputError:
            return None
        exclusions = dict(source.exclusions)
        stream = ActivationStream.live(
            self.model,
            blocks,
            self.config.hook_name,
            exclusions.pop(self.config.hook_name),
            also=exclusions,
            batch_size=min(HELD_OUT_ROWS, blocks.n_tokens),
            n_batches=1,
        )
        return next(stream).cpu()

    @property
    def is_trained(self) -> bool:
        """Whether the folder holds the SAE that training would end in."""
        return is_finished(self.run.sae, "sae", self.training_inputs)

    @cached_property
    def training_inputs(self) -> dict[str, Any]:
        """Hashes and settings that the trained SAE depends on."""
        return {**self._settings, "tokens": self.train_blocks.hash}

    @property
    def _settings(self) -> dict[str, Any]:
        """What the trained SAE depends on besides the text."""
        model = self.model
        return {
            "config": _as_inputs(self.config),
            "model": model.hash,
            "dtype": str(model.dtype),
            "device": model.device.type,
            "activations": self._activations_read,
        }

    @property
    def _activations_read(self) -> str:
        """How training comes by its activations."""
        if self.store is None:
            return "live" if self._live else "stored"
        return " ".join(held.identity for held in (self.store, *_also(self.config, self.store.store)))

    def metadata(self, exclusions: Mapping[str, Exclusion]) -> dict[str, Any]:
        """Where the SAE belongs and what it was trained on, for its cfg.json.

        Args:
            exclusions: which positions training left out at each hook.
        """
        config, blocks = self.config, self.train_blocks
        bounds = {
            hook_name: None if exclusion.max_norm == float("inf") else exclusion.max_norm
            for hook_name, exclusion in exclusions.items()
        }
        written = {}
        if config.hook_out is not None:
            written = {"hook_name_out": config.hook_out, "max_norm_out": bounds[config.hook_out]}
        return {
            "model_name": config.model,
            "model_hash": self.model.hash,
            "hook_name": config.hook_name,
            "context_size": self.context_length,
            "prepend_bos": blocks.bos,
            "packing": blocks.packing,
            "exclude_special_tokens": config.rule.exclude_special,
            "max_norm": bounds[config.hook_name],
            **written,
            "dataset_path": " ".join(config.corpus.text),
            "corpus": self._about_text,
            "corpus_hash": self._text_hash,
            "model_from_pretrained_kwargs": {"center_writing_weights": self.model.center_writing_weights},
        }

    @property
    def _live(self) -> bool:
        """Whether training computes activations as it goes."""
        return self.store is None and not self.store_activations

    def live_source(self) -> Source:
        """Activations computed as training goes."""
        config, model, blocks = self.config, self.model, self.train_blocks
        statistics = {
            hook_name: measure_statistics(model, blocks, hook_name, config.rule, progress=self.progress)
            for hook_name in self.config.hook_names
        }
        exclusions = {hook_name: found.exclusion for hook_name, found in statistics.items()}
        batches = ActivationStream.live(
            model,
            blocks,
            config.hook_name,
            exclusions.pop(config.hook_name),
            also=exclusions,
            batch_size=config.resolved_batch_tokens(),
            n_batches=config.n_steps(),
            seed=config.order_seed,
            buffer_rows=config.buffer_tokens,
            part=self.mesh.rank,
            n_parts=self.mesh.size,
        )
        return self._source(batches, statistics)

    def stored_source(self, held: HookActivations) -> Source:
        """Activations read from a store; ``held`` are those at ``hook_name``."""
        config = self.config
        also = _also(config, held.store)
        statistics = {each.hook_name: each.statistics for each in (held, *also)}
        settings: dict[str, Any] = {
            "batch_size": config.resolved_batch_tokens(),
            "n_batches": config.n_steps(),
            "seed": config.order_seed,
            "device": self.model.device,
            "part": self.mesh.rank,
            "n_parts": self.mesh.size,
        }
        if config.order == "exact":
            return self._source(StoreStream.exact(held, also=also, **settings), statistics)
        copy, *copies = (
            held.folder / SHUFFLED / f"{hook_name}-{config.order_seed}" for hook_name in statistics
        )
        pairs = list(zip(also, copies, strict=True))
        if self.mesh.rank > 0:
            self.mesh.wait()  # until process 0 has made the copies
        batches = StoreStream.external(held, copy, also=pairs, progress=self.progress, **settings)
        if self.mesh.rank == 0:
            self.mesh.wait()
        return self._source(batches, statistics)

    def _source(
        self, batches: ActivationStream | StoreStream, statistics: Mapping[str, Statistics]
    ) -> Source:
        read, written = statistics[self.config.hook_name], statistics.get(self.config.hook_out or "")
        device = self.model.device
        scaling = Scaling(read.mean.to(device), read.scale)
        if written is not None:
            scaling = replace(scaling, mean_out=written.mean.to(device), scale_out=written.scale)
        return Source(
            batches, scaling, {hook_name: found.exclusion for hook_name, found in statistics.items()}
        )

    def sae(self) -> SparseAutoencoder:
        """The trained SAE, from the run folder, on the model's device."""
        return SparseAutoencoder.load(self.run.sae).to(self.model.device)

    def evaluate(self, sae: SparseAutoencoder) -> Evaluation:
        """Measure the SAE on the test split into ``evaluation.json``, or read what was measured."""
        measured = self.measured(sae)
        if measured is None:
            measured = evaluate(
                self.model, sae, self.test_blocks, reference=self.reference(sae), progress=self.progress
            )
            self.keep_evaluation(measured)
        return measured

    @cached_property
    def test_blocks(self) -> TokenBlocks:
        """The tokens that metrics are measured on."""
        return self.tokens("test", self.sizes.test_tokens)

    def reference(self, sae: SparseAutoencoder) -> Tensor:
        """Activations of training text, which ablation and controls of an evaluation are made from."""
        return reference_activations(self.model, sae, self.train_blocks.first_tokens(REFERENCE_ROWS))

    def measured(self, sae: SparseAutoencoder) -> Evaluation | None:
        """What ``evaluation.json`` says, if it is about this SAE on these tokens."""
        path = self.run.evaluation
        if not path.is_file():
            return None
        content = read_json(path)
        is_ours = content.pop("format_version", None) == FORMAT_VERSION
        inputs = {"model": self.model.hash, "sae": sae.hash, "tokens": self.test_blocks.hash}
        return (
            Evaluation.from_json(content) if is_ours and inputs.items() <= content["inputs"].items() else None
        )

    def keep_evaluation(self, evaluation: Evaluation) -> None:
        """Write ``evaluation.json``."""
        write_json(self.run.evaluation, {"format_version": FORMAT_VERSION, **evaluation.to_json()})

    def index(self, sae: SparseAutoencoder) -> FeatureIndex:
        """Build the feature index over the first training tokens, or open it."""
        return build_index(
            self.model,
            sae,
            self.train_blocks.first_tokens(self.sizes.index_tokens),
            self.run.index,
            activations=self._stored(),
            weights_folder=self.run.weights,
            progress=self.progress,
        )

    def score_index(self, sae: SparseAutoencoder) -> FeatureIndex:
        """Build the feature index over the score split, which judges of labels take their cases from, or open it."""
        blocks = self.tokens("score", self.sizes.score_tokens)
        return build_index(
            self.model,
            sae,
            blocks,
            self.run.score_index,
            weights_folder=self.run.weights,
            progress=self.progress,
        )

    def weights(self, sae: SparseAutoencoder) -> WeightIndex:
        """Work out what the weights alone tell, or open it; needs no text."""
        return build_weights(self.model, sae, self.run.weights, progress=self.progress)

    def _stored(self) -> HookActivations | None:
        """The activations on disk, if they are there, whole, and of these tokens."""
        if self.store is not None:
            return self.store
        if not (self.run.activations / MANIFEST).is_file():
            return None
        store = ActivationStore.open(self.run.activations)
        fits = store.blocks.hash == self.train_blocks.hash and self.config.hook_name in store.hook_names
        same_model = store.manifest["inputs"]["model"] == self.model.hash
        return store.at(self.config.hook_name) if fits and same_model else None

    def label(self, sae: SparseAutoencoder, index: FeatureIndex) -> Labels:
        """Give every feature a first label, scored on the score split; people's labels stay.

        Labels of another SAE that this folder held are kept beside, as ``labels-<its hash>.sqlite``, and come back with
        their SAE.
        """
        blocks = self.tokens("score", self.sizes.score_tokens)
        self._retire_labels(sae)
        labels = Labels.open(self.run.labels, sae_hash=sae.hash)
        if labels.inputs != label_inputs(sae, index, blocks):
            label_features(
                index,
                self.model,
                sae,
                blocks,
                labels,
                activations=self._stored(),
                progress=self.progress,
            )
        return labels

    def _retire_labels(self, sae: SparseAutoencoder) -> None:
        """Feature numbers mean nothing to another SAE: put its labels aside, and bring back those of this one."""

        def aside(sae_hash: str, number: int) -> Path:
            return self.run.path / f"labels-{sae_hash[:8]}{f'-{number}' if number > 1 else ''}.sqlite"

        labels = Labels.open(self.run.labels)
        if labels.sae_hash is not None and labels.sae_hash != sae.hash:
            names = (aside(labels.sae_hash, number) for number in count(1))
            labels.move_to(next(path for path in names if not path.exists()))
        if not self.run.labels.exists():
            kept = takewhile(Path.exists, (aside(sae.hash, number) for number in count(1)))
            ours = [each for each in map(Labels.open, kept) if each.sae_hash == sae.hash]
            if ours:
                ours[-1].move_to(self.run.labels)

    def drop_activations(self) -> None:
        """Delete the activations in the run folder: only another training would need them."""
        if self.run.activations.exists():
            shutil.rmtree(self.run.activations)


def _also(config: TrainConfig, store: ActivationStore) -> list[HookActivations]:
    """The activations that a transcoder predicts; none for an SAE.

    Raises:
        InputError: the store does not hold them.
    """
    return [] if config.hook_out is None else [store.at(config.hook_out)]


def _as_captured(config: TrainConfig, store: ActivationStore, as_before: bool) -> TrainConfig:
    """The configuration with everything that the store decides, which it may not contradict.

    Args:
        as_before: the configuration is that of a run: the store must still be the one that it was trained from.

    Raises:
        InputError: it says something else than the store.
    """
    default = TrainConfig()
    values: dict[str, Any] = {
        "context_length": store.blocks.context_length,
        "rule": ExclusionRule(**store.manifest["rule"]),
    }
    if (
        "config" in store.manifest["captures"][0]
    ):  # else it was written from Python, and model and text are given
        captured = captured_with(store.folder)
        names = ("model", "corpus", "dtype", "center_writing_weights")
        values |= {name: getattr(captured, name) for name in names}
    if config.hook_name == default.hook_name and len(store.hook_names) == 1:
        values["hook_name"] = store.hook_names[0]
    if as_before and any(getattr(config, name) != value for name, value in values.items()):
        raise InputError(
            f"{store.folder} holds other activations now than those that this run was trained on: move it away, or"
            " train another run."
        )
    return decided(config, default, values, store.folder)


def _as_inputs(config: TrainConfig) -> dict[str, Any]:
    """What training depends on: the configuration with its defaults worked out."""
    worked_out = replace(
        config.resolved(),
        store=None,  # known by what it holds, wherever it lies
        order="exact",  # the other order gives the same batches
    )
    return asdict(worked_out)


def run_pipeline(
    folder: str | Path,
    config: TrainConfig | None = None,
    *,
    sizes: Sizes | None = None,
    store_activations: bool = False,
    model: LanguageModel | None = None,
    replace_other: bool = False,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda stage: None,
) -> Pipeline:
    """Train, evaluate, index and label into ``folder``; ``announce`` hears the name of each stage.

    Arguments and errors as for :class:`Pipeline`.
    """
    pipeline = Pipeline(
        folder,
        config,
        sizes=sizes,
        store_activations=store_activations,
        model=model,
        replace_other=replace_other,
        progress=progress,
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
