"""Many SAEs from one pass over the activations, each in a run folder of its own.

A sweep's folder::

    sweep.toml        what is trained (sae/sweep.py)
    NAME/             one complete run for each configuration
    activations/      the store that several passes read, while it is needed
    sweep.json        what every run was, and its figures on the test split
    pareto.html       L0 against CE loss recovered and explained variance

Runs that read the same batches are trained side by side on one stream. Where there are several such groups (another
hook, another order), the model runs once over the text, into a store that holds all their hooks, and one group after
the other reads it; a single group is trained as the model reads. Each SAE has the bits that it would have alone on the
same activations: with several groups these are the store's, in bfloat16, so an SAE is that of ``sae train --store`` on
it and not that of a ``sae train`` that reads a running model.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from activations.errors import InputError
from activations.files import FORMAT_VERSION, write_json
from activations.models import LanguageModel
from activations.progress import Progress, silent
from activations.store import ActivationStore
from activations.writer import write_store
from features.pipeline import Pipeline, Sizes
from sae.evaluate import Evaluation, evaluate_many
from sae.log import Diverged
from sae.model import SparseAutoencoder
from sae.pareto import Measured, write_pareto
from sae.sweep import SWEEP_FILE, SweepConfig, stream_of
from sae.train import Run, Watch, train_side_by_side

ACTIVATIONS, RESULTS, PARETO = "activations", "sweep.json", "pareto.html"
Group = list[str]


class Sweep:
    """The runs of one sweep's folder.

    Args:
        folder: made if it is not there.
        config: what to train; None reads the folder's ``sweep.toml``.
        keep_activations: write the activations to the folder's store even for a single group, and leave them there.
        sizes: tokens for the evaluation; scaled to the training tokens by default.
        model: a loaded model to use in the place of the configuration's.

    Raises:
        InputError: the folder holds something that is no sweep, or a sweep with runs that this one has not; or a
            configuration cannot work.
    """

    def __init__(
        self,
        folder: Path | str,
        config: SweepConfig | None = None,
        *,
        keep_activations: bool = False,
        sizes: Sizes | None = None,
        model: LanguageModel | None = None,
        progress: Progress = silent,
    ) -> None:
        self.folder = Path(folder)
        self.config = SweepConfig.read(self.folder / SWEEP_FILE) if config is None else config
        runs = self.config.expand()
        if self.folder.is_file() or (
            self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / SWEEP_FILE).is_file()
        ):
            raise InputError(f"{self.folder} holds something that is no sweep: give an empty or new folder.")
        self._refuse_losing({name for name, _ in runs})
        self.keep_activations = keep_activations
        self.progress = progress
        streams: dict[Any, Group] = {}
        for name, run in runs:
            streams.setdefault(stream_of(run), []).append(name)
        self.groups = list(streams.values())
        stored = keep_activations or len(self.groups) > 1
        self.runs = {
            name: Pipeline(
                self.folder / name,
                run,
                sizes=sizes,
                store_activations=stored,
                model=model,
                progress=progress,
            )
            for name, run in runs
        }
        self._first = next(iter(self.runs.values()))

    def _refuse_losing(self, names: Collection[str]) -> None:
        """A sweep may grow; one that lacks runs of the folder's own would overwrite its settings and results."""
        path = self.folder / SWEEP_FILE
        if not path.is_file():
            return
        lost = [name for name, _ in SweepConfig.read(path).expand() if name not in names]
        if lost:
            raise InputError(
                f"{self.folder} holds another sweep, and this one lacks its runs {', '.join(lost)}: give another"
                f" folder, or what {SWEEP_FILE} says and more."
            )

    @property
    def model(self) -> LanguageModel:
        """The language model of all runs."""
        return self._first.model

    @property
    def notes(self) -> list[str]:
        """What is to be said about the text."""
        return self._first.corpus.notes

    @property
    def tokens_read(self) -> int:
        """Training tokens of each run, counted once for every pass; the most that a run reads."""
        return max(run.config.tokens_read() for run in self.runs.values())

    def parameters(self, name: str) -> int:
        """Number of weights that a run trains, but for the small ones that some architectures have besides."""
        run = self.runs[name]
        widths = [self.model.width(hook) for hook in run.config.hook_names]
        return run.config.sae.d_sae * (widths[0] + widths[-1] + 1) + widths[-1]

    def check(self) -> None:
        """Load the model and check every run against it; write nothing.

        Raises:
            InputError: as for :meth:`features.pipeline.Pipeline.check`.
        """
        for run in self.runs.values():
            if run is not self._first:
                run.share(self._first)
            run.check()

    def start(self) -> None:
        """Check every run, read the text, and write ``sweep.toml`` and the runs' ``run.toml`` and token blocks.

        Raises:
            InputError: as for :meth:`features.pipeline.Pipeline.start`.
        """
        self.check()
        self._first.start()
        with suppress(InputError):  # some texts have no such split
            self._first.tokens("score", self._first.sizes.score_tokens)
        for run in self.runs.values():
            if run is not self._first:
                run.start(beside=self._first)
        self.config.write(self.folder / SWEEP_FILE)

    def train(
        self, announce: Callable[[Group], None] = lambda names: None, watch: Watch | None = None
    ) -> None:
        """Train what is not trained yet, group after group.

        Args:
            announce: hears the names of each group. watch: hears the lines of every run's ``metrics.jsonl``.

        An interrupted sweep goes on where it stopped, and ends in the same bits.

        Raises:
            Diverged: runs left the numbers that they could come back from; all others were trained first.
        """
        diverged: list[Diverged] = []
        unfinished = [group for group in self.groups if not all(self.runs[name].is_trained for name in group)]
        for names in unfinished:
            announce(names)
            try:
                self._train(names, watch)
            except Diverged as error:
                diverged.append(error)
        if self._store_folder.exists() and not self.keep_activations:
            ActivationStore.open(self._store_folder).delete()
        if diverged:
            raise Diverged.of_all(diverged)

    def _train(self, names: Sequence[str], watch: Watch | None) -> None:
        group = [self.runs[name] for name in names]
        first = group[0]
        if first.store is not None:
            source = first.stored_source(first.store)
        elif first.store_activations:
            source = first.stored_source(self._store.at(first.config.hook_name))
        else:
            source = first.live_source()
        runs = [
            Run(run.config, run.run.path, run.metadata(source.exclusions), run.training_inputs)
            for run in group
        ]
        train_side_by_side(
            runs,
            source.batches,
            source.scaling,
            held_out=first.held_out(source),
            replace_other=True,  # start refused it
            progress=self.progress,
            watch=watch,
        )

    @property
    def _store_folder(self) -> Path:
        return self.folder / ACTIVATIONS

    @cached_property
    def _store(self) -> ActivationStore:
        """The activations at every hook of the sweep, from one pass of the model over the text."""
        hooks = dict.fromkeys(hook for run in self.runs.values() for hook in run.config.hook_names)
        return write_store(
            self.model,
            self._first.train_blocks,
            list(hooks),
            self._store_folder,
            rule=self._first.config.rule,
            replace_other=True,
            progress=self.progress,
        )

    def saes(self) -> dict[str, SparseAutoencoder]:
        """The SAEs by the name of their run, as far as they are trained."""
        return {name: run.sae() for name, run in self.runs.items() if run.is_trained}

    def evaluate(self) -> dict[str, Evaluation]:
        """Measure every trained SAE on the test split into its run's ``evaluation.json``, those of one hook together.

        Also writes ``sweep.json`` and ``pareto.html``. Controls are left out: ``sae evaluate`` on a run adds them.
        """
        saes = self.saes()
        found = {name: self.runs[name].measured(sae) for name, sae in saes.items()}
        hooks: dict[Any, Group] = {}
        for name in saes:
            hooks.setdefault(self.runs[name].config.hook_names, []).append(name)
        for names in hooks.values():
            missing = {name: saes[name] for name in names if found[name] is None}
            if missing:
                first = self.runs[names[0]]
                measured = evaluate_many(
                    self.model,
                    missing,
                    first.test_blocks,
                    reference=first.reference(saes[names[0]]),
                    progress=self.progress,
                )
                for name, evaluation in measured.items():
                    self.runs[name].keep_evaluation(evaluation)
                found |= measured
        evaluations = {name: evaluation for name, evaluation in found.items() if evaluation is not None}
        self._report(evaluations)
        return evaluations

    def _report(self, evaluations: Mapping[str, Evaluation]) -> None:
        """Write the table and the plot."""
        runs = {
            name: {"config": asdict(self.runs[name].config), "evaluation": evaluation.to_json()}
            for name, evaluation in evaluations.items()
        }
        write_json(self.folder / RESULTS, {"format_version": FORMAT_VERSION, "runs": runs})
        measured = [
            Measured.of(name, self.runs[name].config, evaluation) for name, evaluation in evaluations.items()
        ]
        write_pareto(self.folder / PARETO, measured, title=self.folder.resolve().name)
