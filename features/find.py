"""The short trainings of :mod:`sae.find` on the activations of a model.

They write into one folder: ``text/`` with the tokens and, while it is needed, the activations that all trials read,
and a folder for each trial. The same call goes on where it was interrupted.
"""

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from activations.errors import InputError
from activations.files import FORMAT_VERSION, write_json
from activations.models import LanguageModel
from activations.progress import Progress, silent
from activations.store import HookActivations
from features.pipeline import Pipeline
from sae.config import TrainConfig
from sae.find import LONG, REMAINING, SHORT, Found, find_sparsity_weight
from sae.train import Run, train

LEAST_STEPS = 100  # of a trial
TAIL = 0.1  # of a trial, at its end, over which its L0 is measured


class L0Search:
    """Looks for the sparsity weight whose training ends with a wanted L0.

    Args:
        folder: for the trials; made if it is not there.
        config: the whole training. Its ``sparsity_weight`` is where the search begins.
        model: a loaded model to use in the place of ``config.model``.

    Raises:
        InputError: an architecture whose L0 is not found in this way, or settings that cannot work.
    """

    def __init__(
        self,
        folder: Path | str,
        config: TrainConfig,
        target_l0: float,
        *,
        model: LanguageModel | None = None,
        progress: Progress = silent,
    ) -> None:
        sae = config.sae
        if sae.architecture == "jumprelu":
            raise InputError(
                "Short trainings of a jumprelu SAE say little about its L0 after a long one: give"
                f" --target-l0 {target_l0:g}, which reaches and holds it in one training."
            )
        if sae.architecture not in REMAINING:
            raise InputError(
                f"The L0 of {sae.architecture} is its k: give --k {target_l0:g}, there is nothing to find."
            )
        if sae.target_l0 is not None:
            raise InputError("target_l0 moves the sparsity weight by itself: leave it out, or do not search.")
        if not 0 < target_l0 < sae.d_sae:
            raise InputError(
                f"The L0 to find is {target_l0:g}, and must be above 0 and below d_sae, {sae.d_sae}."
            )
        config.check()
        self.folder, self.target_l0, self.progress = Path(folder), target_l0, progress
        whole = Pipeline(self.folder / "text", config, model=model).config
        self.config = replace(whole, tokens=whole.resolved_tokens())
        steps = self._part(SHORT).n_steps()
        if steps < LEAST_STEPS:
            raise InputError(
                f"A training of {self.config.tokens_read():,} tokens is too short to try {SHORT:g} of it, which has"
                f" {steps} steps and needs {LEAST_STEPS}: give more tokens, or fewer --batch-tokens."
            )
        self.text = Pipeline(
            self.folder / "text",
            self._part(LONG),
            store_activations=True,
            model=model,
            progress=progress,
        )

    def find(self) -> Found:
        """Train until the weight is found; ``find.json`` keeps the outcome.

        Raises:
            InputError: as for :func:`sae.find.find_sparsity_weight` and :meth:`Pipeline.start`.
        """
        self.text.start()
        start = self.config.sae.resolved_sparsity_weight()
        remaining = REMAINING[self.config.sae.architecture]
        found = find_sparsity_weight(self._measure, self.target_l0, start, remaining)
        trials = [vars(trial) for trial in found.trials]
        outcome = {"target_l0": self.target_l0, **vars(found), "trials": trials}
        write_json(self.folder / "find.json", {"format_version": FORMAT_VERSION, **outcome})
        self.text.drop_activations()
        return found

    def _part(self, part: float) -> TrainConfig:
        """The same training on fewer tokens, its schedules as much shorter."""
        return replace(self.config, tokens=max(int(self.config.resolved_tokens() * part), 1))

    @cached_property
    def _held(self) -> HookActivations:
        return self.text.capture()

    def _measure(self, weight: float, part: float) -> float:
        """Train with this weight on a part of the tokens; mean L0 over the end of it."""
        config = self._part(part)
        config = replace(config, sae=replace(config.sae, sparsity_weight=weight))
        folder = self.folder / f"lambda{weight:.6g}-{config.resolved_tokens()}"
        inputs = {"model": self.text.model.hash, "tokens": self.text.train_blocks.hash}
        run = Run(config, folder, {"hook_name": config.hook_name}, inputs)
        if not run.finished:
            trial = Pipeline(folder, config, model=self.text.model, progress=self.progress)
            source = trial.stored_source(self._held)
            train(run, source.batches, source.scaling, progress=self.progress)
        lines = [
            json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        end = [line["l0"] for line in lines if line["tokens"] > (1 - TAIL) * config.tokens_read()]
        return float(sum(end) / len(end))
