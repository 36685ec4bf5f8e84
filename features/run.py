"""A run in the hand: everything in a run folder behind one object, each part loaded on first use."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

from activations.errors import InputError
from activations.files import MANIFEST, read_json
from features.labels import Label, Labels
from sae.config import TrainConfig
from sae.run import RunFolder, read_run_config

if TYPE_CHECKING:
    import numpy as np

    from activations.edits import Edit
    from activations.models import LanguageModel
    from features.coactive import Coactive
    from features.index import Example, FeatureIndex, TokenStatistic
    from features.steering import Method, Unit
    from features.tags import Tag
    from features.trace import Trace
    from features.weights import WeightIndex
    from sae.model import SparseAutoencoder

T = TypeVar("T")
_NORM_BLOCKS = 16  # blocks on which the mean norm at the hook is measured


def open_run(path: str | Path, *, model: "LanguageModel | None" = None, device: str | None = None) -> "Run":
    """Open a run folder. Nothing heavy happens until a part is asked for; labels and index need no torch.

    Args:
        path: a run folder; or an SAE alone, of any format (:meth:`SparseAutoencoder.load`) and from the hub as well
            (``hf:org/repo/path``), which is loaded at once: such a run has model, SAE, traces and steering in the unit
            "activation", and neither metrics nor index.
        model: a loaded model, for a run that was made with one; by default the run's model is loaded by its name.
        device: where model and SAE go; None takes the CUDA device if there is one, else the CPU.

    Raises:
        InputError: the folder is no run and holds no SAE, or its ``run.toml`` is broken or newer than this version.
    """
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        from sae.formats.detect import holds_sae
        from sae.model import SparseAutoencoder

        if holds_sae(path):
            sae = SparseAutoencoder.load(path)
            return Run(folder, _config_of(sae), model, device, sae)
    return Run(folder, read_run_config(folder.path), model, device)


def _config_of(sae: "SparseAutoencoder") -> TrainConfig:
    """What an SAE from elsewhere says of how it was made."""
    said = sae.metadata
    return TrainConfig(
        model=str(said.get("model_name") or ""),
        hook_name=str(said.get("hook_name") or ""),
        hook_out=said.get("hook_name_out"),
        sae=sae.config,
    )


class Run:
    """A trained SAE with its model, index, labels and metrics.

    Made by :func:`open_run`; threads may share it.

    Attributes:
        folder: where its files lie.
        config: how it was made.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        model: "LanguageModel | None" = None,
        device: str | None = None,
        sae: "SparseAutoencoder | None" = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self._given_model, self._given_sae = model, sae
        self._device = device if model is None else str(model.device)
        self._parts: dict[str, Any] = {}
        self._lock = RLock()

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.path.resolve().name

    @property
    def model(self) -> "LanguageModel":
        """The language model.

        Raises:
            InputError: it cannot be loaded, or its weights are not those that the SAE was trained on.
        """
        return self._once("model", self._load_model)

    @property
    def sae(self) -> "SparseAutoencoder":
        """The sparse autoencoder, on the run's device.

        Raises:
            InputError: it is missing or damaged.
        """
        return self._once("sae", self._load_sae)

    @property
    def index(self) -> "FeatureIndex":
        """The feature index over the train split.

        Raises:
            InputError: it is missing or damaged, or belongs to another SAE.
        """
        return self._once("index", lambda: self._open_index(self.folder.index))

    @property
    def score_index(self) -> "FeatureIndex":
        """The feature index over the score split: cases that no explainer has seen.

        Raises:
            InputError: it is missing or damaged, or belongs to another SAE.
        """
        if not (self.folder.score_index / MANIFEST).is_file():
            raise InputError(
                f"{self.folder.path} has no index over the score split yet: sae label {self.folder.path} --score-only"
                " makes it."
            )
        return self._once("score_index", lambda: self._open_index(self.folder.score_index))

    @property
    def weights(self) -> "WeightIndex":
        """What the weights alone tell of the features; worked out the first time, which needs model and SAE.

        Raises:
            InputError: it cannot be worked out or written.
        """
        return self._once("weights", self._open_weights)

    @property
    def labels(self) -> Labels:
        """The labels.

        Raises:
            InputError: the file is damaged.
        """
        return self._once("labels", self._open_labels)

    @property
    def evaluation(self) -> dict[str, Any]:
        """The content of ``evaluation.json``.

        Raises:
            InputError: it is missing or damaged.
        """
        return self._once("evaluation", self._read_evaluation)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, oldest first; empty if there are none yet."""
        if not self.folder.metrics.is_file():
            return []
        lines = self.folder.metrics.read_text(encoding="utf-8").splitlines()
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise InputError(f"{self.folder.metrics} is not valid JSON lines ({error}).") from None

    @property
    def residual_norm(self) -> float:
        """Mean norm of the activation vectors where features write: strength 1 in the unit "residual".

        Measured once, on the first blocks of the index, excluded positions left out.
        """
        return self._once("residual_norm", self._measure_norm)

    def feature(self, index: int) -> "Feature":
        """One feature; what the index knows of it is read now.

        Raises:
            InputError: there is no feature of that number.
        """
        if not 0 <= index < self.index.d_sae:
            raise InputError(
                f"There is no feature {index}: {self.name} has the features 0 to {self.index.d_sae - 1}."
            )
        self.index.fetch(index)
        return Feature(self, index)

    def edit(
        self, strengths: Mapping[int, float], *, method: "Method" = "clamp", unit: "Unit" = "max"
    ) -> "Edit":
        """The edit that steers these features; see :func:`features.steering.edit_features`."""
        from features.steering import edit_features

        maxima = None
        if unit == "max":
            known = [feature for feature in strengths if 0 <= feature < self.index.d_sae]
            maxima = {feature: float(self.index.max[feature]) for feature in known}
        return edit_features(
            self.sae,
            strengths,
            method=method,
            unit=unit,
            maxima=maxima,
            residual_norm=self.residual_norm if unit == "residual" else None,
        )

    def steered(
        self, strengths: Mapping[int, float], *, method: "Method" = "clamp", unit: "Unit" = "max"
    ) -> AbstractContextManager[None]:
        """Hold features at given strengths while the model runs inside the block, in this thread only::

            with run.steered({17: 2.0}):
                run.model.generate("def ")

        Args:
            strengths: feature → strength; with ``method="clamp"`` and ``unit="max"``, 2.0 sets the feature's
                activation to twice its maximum in the index.

        Raises:
            InputError: as for :func:`features.steering.edit_features`; at the end of the block, the hook
                never fired although the model ran.
        """
        return self.model.edited(self.edit(strengths, method=method, unit=unit))

    def trace(self, text: str) -> "Trace":
        """Which features fire where in a text.

        A text longer than the SAE's context is read in consecutive windows, which do not see each other.
        Special tokens and outlier norms, which training left out, have no firing features.

        Raises:
            InputError: the text is empty.
        """
        from features.trace import trace_text

        return trace_text(self.model, self.sae, text)

    def _once(self, part: str, load: Callable[[], T]) -> T:
        with self._lock:
            if part not in self._parts:
                self._parts[part] = load()
            found: T = self._parts[part]
            return found

    def _load_model(self) -> "LanguageModel":
        from activations.job import load_model

        if self._given_model is None and not self.config.model:
            raise InputError(
                f"{self.folder.path} does not say of which model it is: open it with that model."
            )
        model = self._given_model or load_model(self.config, device=self._device)
        if self._given_sae is not None:
            from sae.model import check_belongs

            check_belongs(model, self._given_sae)
            return model
        expected = self._sae_metadata().get("model_hash")
        if expected is not None and model.hash != expected:
            raise InputError(
                f"The weights of {self.config.model} are not those that the SAE in {self.folder.path} was"
                " trained on: open the run with the model it was made with."
            )
        return model

    def _load_sae(self) -> "SparseAutoencoder":
        from activations.loading import resolve_device
        from sae.model import SparseAutoencoder

        sae = self._given_sae or SparseAutoencoder.load(self.folder.sae)
        return sae.to(resolve_device(self._device))

    def _open_labels(self) -> Labels:
        sae = self._given_sae
        return Labels.open(self.folder.labels, sae_hash=self._sae_hash() if sae is None else sae.hash)

    def _read_evaluation(self) -> dict[str, Any]:
        evaluation = dict(read_json(self.folder.evaluation))
        if self._sae_hash() not in (None, evaluation.get("inputs", {}).get("sae")):
            raise InputError(
                f"{self.folder.evaluation} measures another SAE: run sae evaluate {self.folder.path}."
            )
        return evaluation

    def _sae_hash(self) -> str | None:
        """The hash that the trainer noted in a manifest, so that torch is not needed to compare."""
        manifest = self.folder.sae / MANIFEST
        return read_json(manifest).get("sae_hash") if manifest.is_file() else None

    def _open_index(self, folder: Path) -> "FeatureIndex":
        from features.index import FeatureIndex

        return FeatureIndex.open(folder, sae_hash=self._sae_hash()).of_run(self)

    def _open_weights(self) -> "WeightIndex":
        from features.weights import WeightIndex, build_weights

        if (self.folder.weights / MANIFEST).is_file():
            found = WeightIndex.open(self.folder.weights)
            if self._sae_hash() in (None, found.manifest["inputs"]["sae_hash"]):
                return found
        return build_weights(self.model, self.sae, self.folder.weights)

    def _sae_metadata(self) -> dict[str, Any]:
        from sae.formats.saelens import CONFIG

        return dict(read_json(self.folder.sae / CONFIG).get("metadata") or {})

    def _measure_norm(self) -> float:
        from features.trace import mean_norm

        return mean_norm(self.model, self.sae, self.index.blocks.first(_NORM_BLOCKS))


class Feature:
    """One feature of a run: its label, its statistics, and the tables of the index.

    Attributes:
        run: the run it belongs to.
        index: its number.
    """

    def __init__(self, run: Run, index: int) -> None:
        self.run = run
        self.index = index

    def __repr__(self) -> str:
        label = self.label
        return f"Feature {self.index}: {label.text if label else 'no label'}"

    @property
    def label(self) -> Label | None:
        """Its label as it stands now, a person's before an automatic one."""
        return self.run.labels.get(self.index)

    @property
    def count(self) -> int:
        """On how many positions of the index it fired."""
        return int(self.run.index.count[self.index])

    @property
    def density(self) -> float:
        """On which share of the positions of the index it fired."""
        return self.count / self.run.index.n_tokens

    @property
    def mean(self) -> float:
        """Mean activation over its firings."""
        return float(self.run.index.mean[self.index])

    @property
    def max(self) -> float:
        """Largest activation in the index, which strengths are measured by."""
        return float(self.run.index.max[self.index])

    @cached_property
    def histogram(self) -> "np.ndarray":
        """Number of firings per bin of ``run.index.histogram_edges``."""
        return self.run.index.histogram(self.index)

    def top_examples(self, width: int = 64) -> "list[Example]":
        """Where it fires most, at most one place per document, strongest first, ``width`` tokens each."""
        return self.run.index.top_examples(self.index, width)

    def range_examples(self, width: int = 64) -> "list[tuple[str, list[Example]]]":
        """Examples for each quantile band of its activations, strongest band first."""
        return self.run.index.range_examples(self.index, width)

    @cached_property
    def top_tokens(self) -> "list[TokenStatistic]":
        """The tokens on which it fires."""
        return self.run.index.top_tokens(self.index)

    @cached_property
    def promoted(self) -> list[tuple[str, int, float]]:
        """(text, id, logit) of the tokens that its direction makes most likely next, by the logit lens."""
        return self.run.index.promoted(self.index)

    @cached_property
    def suppressed(self) -> list[tuple[str, int, float]]:
        """(text, id, logit) of the tokens that its direction makes least likely next, by the logit lens."""
        return self.run.index.suppressed(self.index)

    @cached_property
    def next_tokens(self) -> "list[TokenStatistic]":
        """The tokens that follow its firings."""
        return self.run.index.next_tokens(self.index)

    @cached_property
    def coactive(self) -> "list[Coactive]":
        """The features that fire where it does."""
        return self.run.index.coactive(self.index)

    @cached_property
    def tags(self) -> "list[Tag]":
        """What rules say of it."""
        return self.run.index.tags(self.index)

    def near_misses(self, width: int = 64) -> "list[Example]":
        """Where it is silent at a token of its own."""
        return self.run.index.near_misses(self.index, width)

    @cached_property
    def neighbours(self) -> list[tuple[int, float]]:
        """(feature, cosine) of the features whose decoder directions are nearest."""
        return self.run.index.neighbours(self.index)
