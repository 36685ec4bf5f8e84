"""``sae label``: names for features, without a language model, by any, or from a file; and their scores."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from app.cli.arguments import parse

if TYPE_CHECKING:
    from activations.progress import Progress
    from features.index import FeatureIndex
    from features.labels import Label, Labels, Source
    from features.llm.budget import Budget
    from features.llm.explain import Explained
    from features.llm.judge import Judge
    from features.llm.session import Session
    from features.run import Run


@dataclass(frozen=True)
class Arguments:
    """Give features names, and say how good the names are.

    Without a language model every feature gets the pattern that predicts its firings best. With --model (any
    OpenAI-compatible endpoint, hosted or local) or --local (a Hugging Face model) the features that you choose are
    labelled by it, and the labels judged on text that it has not seen, beside a shuffled control. With --feature and
    --text you name a feature yourself.
    """

    run: Positional[Path]
    """The run folder."""

    model: str | None = None
    """Name of a language model at the endpoint."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible API, such as http://localhost:8000/v1; by default OPENAI_BASE_URL, else OpenAI. The
    key is read from OPENAI_API_KEY."""
    local: str | None = None
    """A Hugging Face chat model to run here: a folder or a hub name."""

    features: tuple[int, ...] = ()
    """These features."""
    in_list: Annotated[str | None, tyro.conf.arg(name="list")] = None
    """The features of this list."""
    top: int | None = None
    """So many features, those with the largest sum of activations."""
    every: Annotated[bool, tyro.conf.arg(name="all")] = False
    """All features that ever fire."""

    feature: int | None = None
    """With --text: the feature that you name."""
    text: str | None = None
    """Your label for it; an empty one takes yours away."""
    pattern: str | None = None
    """Where your label says that the feature fires, so that it can be scored: a token, up to four tokens in a row, or
    /a regular expression/. ␣ may stand for a space, ⏎ for a line break, ⇥ for a tab."""

    from_file: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Import labels from this file or folder: CSV, JSON, Neuronpedia, delphi."""

    score: bool = True
    """Judge the new labels by detection and fuzzing."""
    score_only: bool = False
    """Judge labels that are there, make none; without a language model by their patterns."""
    which: Literal["automatic", "llm", "person", "import", "all"] | None = None
    """With --score-only: whose labels; all by default."""
    cases: int = 40
    """Cases of each task that a label is judged on, half of them positive."""

    temperature: float = 0.0
    """Of the language model; 0 takes the likeliest token."""
    seed: int = 0
    """Of the choice of cases, the control and the language model's sampling."""
    reply_tokens: int = 400
    """Most tokens of a reply; a model that thinks before it answers needs thousands."""
    concurrency: int = 8
    """Requests at once."""
    timeout: float = 60.0
    """Seconds to wait for a reply."""
    retries: int = 4
    """How often a request that failed is made again."""

    max_tokens_total: int | None = None
    """Tokens, of prompts and replies together, that this command may spend."""
    price_in: float | None = None
    """Price of a million tokens of prompts."""
    price_out: float | None = None
    """Price of a million tokens of replies."""
    max_cost: float | None = None
    """Money that this command may spend, in the currency of the prices."""
    dry_run: bool = False
    """Say what it would take, and stop."""


_OF_A_MODEL = (
    *("endpoint", "temperature", "reply_tokens", "concurrency", "timeout", "retries"),
    *("max_tokens_total", "price_in", "price_out", "max_cost", "dry_run"),
)
_CHOICES = ("features", "in_list", "top", "every")
_OF_LABELS = (*_CHOICES, "score", "cases", "seed")
_OF_ONE = ("feature", "text", "pattern")
_SOURCES: Mapping[str | None, str] = {
    "automatic": "an automatic label",
    "llm": "a label by a language model",
    "person": "a person's label",
    "import": "an imported label",
}


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "label", arguments)
    _check(given)
    if given.from_file is not None:
        _import(given)
    elif given.text is not None:
        _label_by_hand(given)
    elif not given.score_only and not _has_model(given):
        _label_without_model(given)
    elif given.dry_run:
        _estimate(given)
    elif not _has_model(given):
        _judge_by_patterns(given)
    else:
        _use_model(given)


def _has_model(given: Arguments) -> bool:
    return given.model is not None or given.local is not None


def _check(given: Arguments) -> None:
    """Words that do not go together.

    Raises:
        InputError: there are some.
    """
    from activations.errors import InputError

    changed = [field.name for field in fields(Arguments)[1:] if getattr(given, field.name) != field.default]
    choices = [name for name in _CHOICES if name in changed]

    def refuse(name: str, sentence: str) -> None:
        raise InputError(f"{_word(name)} {sentence}")

    if given.from_file is not None and len(changed) > 1:
        refuse(
            next(name for name in changed if name != "from_file"), "has no effect on --from: leave it out."
        )
    for name in ("model", "local"):
        if getattr(given, name) == "":
            refuse(name, "is empty: give the name of a language model.")
    if any(name in changed for name in _OF_ONE):
        if given.feature is None or given.text is None:
            raise InputError("A label of your own needs both: --feature and --text.")
        for name in changed:
            if name not in _OF_ONE:
                refuse(name, "has no effect on a label of your own: leave it out.")
        return
    pairs = [(name, "local") for name in ("model", "endpoint", "timeout", "retries", "concurrency")]
    pairs += [("score", "score_only"), ("score", "cases"), *pairwise(choices)]
    for one, other in pairs:
        if one in changed and other in changed:
            refuse(one, f"and {_word(other)} exclude each other: give one of them.")
    if not _has_model(given):
        for name in changed:
            if name in _OF_A_MODEL:
                refuse(name, "is about a language model: give --model or --local.")
            if name in _OF_LABELS and not given.score_only:
                refuse(
                    name, "goes with a language model or --score-only: give --model, --local or --score-only."
                )
    elif not choices:
        raise InputError("Say which features the language model gets: --features, --list, --top or --all.")
    if given.which is not None and not given.score_only:
        refuse("which", "says whose labels --score-only judges: give both.")
    if (given.price_in is None) != (given.price_out is None):
        raise InputError("A price is missing: give both --price-in and --price-out.")
    if given.top is not None and given.top < 1:
        refuse("top", f"{given.top} chooses no feature: give 1 or more.")
    if given.concurrency < 1:
        refuse("concurrency", f"{given.concurrency} makes no request: give 1 or more.")
    if "cases" in changed:
        from features.llm.cases import check_n_cases

        check_n_cases(given.cases)


def _word(name: str) -> str:
    """A field as it is typed."""
    words = {"in_list": "list", "every": "all", "from_file": "from", "score": "no-score"}
    return f"--{words.get(name, name.replace('_', '-'))}"


def _import(given: Arguments) -> None:
    from app.cli.terminal import console
    from features.exchange import import_labels
    from features.run import open_run

    assert given.from_file is not None
    run = open_run(given.run)
    n = import_labels(given.from_file, run.labels, run.sae.d_sae)
    console.print(f"{n:,} labels imported from {given.from_file}.", soft_wrap=True)


def _label_by_hand(given: Arguments) -> None:
    from app.cli.label_report import print_own
    from app.cli.terminal import console, progress
    from features.own_label import give_label, score_own_label
    from features.run import open_run

    assert given.feature is not None
    assert given.text is not None
    run = open_run(given.run)
    give_label(run, given.feature, given.text, given.pattern or "")
    if not given.text.strip():
        console.print(f"Your label of feature {given.feature} is taken away.")
        return
    score_own_label(run, given.feature, progress=progress)
    print_own(run.labels.all("person")[given.feature])


def _label_without_model(given: Arguments) -> None:
    from app.cli.label_report import print_automatic
    from app.cli.terminal import console, progress, stage
    from features.pipeline import Pipeline
    from features.run import open_run

    index = open_run(given.run).index
    pipeline = Pipeline(given.run, progress=progress)
    stage("Labelling")
    labels = pipeline.label(pipeline.sae(), index)
    print_automatic(index, labels)
    console.print(f"\nNext: sae explore {given.run}", soft_wrap=True)


def _chosen(given: Arguments, index: "FeatureIndex", labels: "Labels") -> list[int]:
    """The features that were asked for, each once.

    Raises:
        InputError: one of them does not exist, the list is empty, or no feature was chosen.
    """
    import numpy as np

    from activations.errors import InputError
    from features.llm.explain import most_active

    if given.features:
        wrong = next((feature for feature in given.features if not 0 <= feature < index.d_sae), None)
        if wrong is not None:
            raise InputError(
                f"There is no feature {wrong}: {given.run.name} has the features 0 to {index.d_sae - 1}."
            )
        return sorted(set(given.features))
    if given.in_list is not None:
        members = list(labels.list_members(given.in_list))
        if not members:
            raise InputError(f"The list {given.in_list!r} is empty: add features to it.")
        return members
    if given.top is not None:
        return most_active(index, given.top)
    return [int(feature) for feature in np.flatnonzero(index.count)]


def _to_judge(given: Arguments, index: "FeatureIndex", labels: "Labels") -> "dict[Source, list[Label]]":
    """With --score-only: the labels of the chosen features, by source."""
    from activations.errors import InputError
    from features.labels import SOURCES

    chosen = set(_chosen(given, index, labels))
    wanted = SOURCES if given.which in (None, "all") else (given.which,)
    found: dict[Source, list[Label]] = {}
    for source in wanted:
        of_source = labels.all(source)  # type: ignore[arg-type]
        found[source] = [of_source[feature] for feature in sorted(chosen & of_source.keys())]  # type: ignore[index]
    if not any(found.values()):
        if given.which in _SOURCES:
            raise InputError(
                f"None of these features has {_SOURCES[given.which]} to judge: choose others, or leave --which out."
            )
        raise InputError(
            f"None of these features has a label to judge: make some with sae label {given.run}."
        )
    return {source: some for source, some in found.items() if some}


def _budget(given: Arguments) -> "Budget":
    from features.llm.budget import Budget, Prices

    prices = None
    if given.price_in is not None and given.price_out is not None:
        prices = Prices(given.price_in, given.price_out)
    return Budget(given.max_tokens_total, prices, given.max_cost)


def _estimate(given: Arguments) -> None:
    from app.cli.label_report import counted
    from app.cli.terminal import console
    from features.llm.estimate import estimate
    from features.run import open_run

    run = open_run(given.run)
    features = _chosen(given, run.index, run.labels)
    if given.score_only:
        n_judged = sum(len(some) for some in _to_judge(given, run.index, run.labels).values())
    else:
        n_judged = len(features) if given.score else 0
    n_labels = 0 if given.score_only else len(features)
    found = estimate(run.index, features, labels=n_labels, judged=n_judged, n_cases=given.cases)
    prices = _budget(given).prices
    cost = f", cost about {prices.cost(found.prompt_tokens, found.completion_tokens):.2f}" if prices else ""
    console.print(
        f"{counted(found.features, 'feature')}: {counted(found.prompts, 'prompt')} of about"
        f" {found.prompt_tokens:,} tokens, replies of about {found.completion_tokens:,}{cost}. What is in the cache"
        " costs nothing. Nothing was asked.",
        soft_wrap=True,
    )


def _use_model(given: Arguments) -> None:
    """Label, judge, or both, with a language model."""
    from app.cli.label_report import print_labels
    from app.cli.terminal import console
    from features.llm.judge import LLMJudge
    from features.run import open_run

    run = open_run(given.run)
    features = _chosen(given, run.index, run.labels)
    judged = _to_judge(given, run.index, run.labels) if given.score_only else {}
    with _session(given, run) as session:
        shown, stopped = _with_cost(session.budget), None
        try:
            if not given.score_only:
                result = _explain(given, run, features, session, shown)
                judged, stopped = {"llm": result.labels}, result.stopped
            if given.score and stopped is None and any(judged.values()):
                stopped = _judge(given, run, judged, LLMJudge(session), shown)
            elif not given.score:
                print_labels(result.labels)
        finally:
            console.print(f"  Spent: {session.budget}.", soft_wrap=True)
        if stopped is not None:
            console.print(
                f"  Stopped: {stopped}. What was done is kept: the same command goes on from here, with a new budget.",
                soft_wrap=True,
            )


def _explain(
    given: Arguments, run: "Run", features: Sequence[int], session: "Session", progress: "Progress"
) -> "Explained":
    """Label features, and note those that got no label.

    Raises:
        InputError: none got one.
    """
    from activations.errors import InputError
    from app.cli.label_report import print_explained
    from app.cli.terminal import stage
    from features.llm.explain import Explained, explain_features
    from features.llm.failures import FAILURES, note_failures

    stage(f"Labelling with {session.model}")
    result, record = Explained(), run.folder.path / FAILURES
    try:
        explain_features(
            run.index,
            features,
            session,
            run.labels,
            concurrency=_at_once(given),
            progress=progress,
            result=result,
        )
    finally:
        note_failures(record, session.model, result)
    if not result.labels:
        reason = result.stopped or Counter(result.failed.values()).most_common(1)[0][0]
        which = f"The {len(features):,} features" if len(features) > 1 else f"Feature {features[0]}"
        raise InputError(f"{which} got no label: {reason}.")
    print_explained(result, record)
    return result


def _at_once(given: Arguments) -> int:
    return given.concurrency if given.local is None else 1


def _judge(
    given: Arguments,
    run: "Run",
    judged: "Mapping[Source, Sequence[Label]]",
    judge: "Judge | None",
    progress: "Progress",
) -> str | None:
    """Judge labels, each source's among themselves, and print what came of it; why it stopped, if it did.

    Args:
        judge: None for the labels' own patterns.
    """
    from app.cli.label_report import print_scored
    from app.cli.terminal import progress as plain_progress
    from app.cli.terminal import stage
    from features.llm.cases import Cases
    from features.llm.judge import PatternJudge
    from features.llm.scoring import score_labels
    from features.pipeline import Pipeline

    stage("Judging")
    pipeline = Pipeline(given.run, progress=plain_progress)
    sae = pipeline.sae()
    cases = Cases(
        pipeline.score_index(sae),
        run.index,
        pipeline.model,
        sae,
        features={label.feature for labels in judged.values() for label in labels},
        n_cases=given.cases,
        seed=given.seed,
        progress=plain_progress,
    )
    if judge is None:
        judge = PatternJudge(cases.index, pipeline.model.tokenizer.special_ids)
    others = [label for label in run.labels.all("automatic").values() if run.index.count[label.feature] > 0]
    for source, labels in judged.items():
        result = score_labels(
            labels,
            cases,
            judge,
            run.labels,
            others=others,
            seed=given.seed,
            concurrency=_at_once(given),
            progress=progress,
        )
        print_scored(source, labels, result, judge.name)
        if result.stopped is not None:
            return result.stopped
    return None


def _session(given: Arguments, run: "Run") -> "Session":
    from features.llm.cache import REPLIES, ReplyCache
    from features.llm.chat import Chat
    from features.llm.endpoint import Endpoint
    from features.llm.local import LocalModel
    from features.llm.session import Session

    budget = _budget(given)
    if given.local is not None:
        chat: Chat = LocalModel(given.local)
    else:
        assert given.model is not None
        chat = Endpoint(given.model, given.endpoint, timeout_seconds=given.timeout)
    return Session(
        chat,
        ReplyCache(run.folder.path / REPLIES),
        budget,
        temperature=given.temperature,
        seed=given.seed,
        max_tokens=given.reply_tokens,
        retries=given.retries,
    )


def _with_cost(budget: "Budget") -> "Progress":
    """Progress as :mod:`app.cli.terminal` shows it, with what was spent so far."""
    from app.cli.terminal import console, plain_lines, progress_bar

    @contextmanager
    def progress(description: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        if not console.is_terminal:
            with plain_lines(description, total, unit, lambda: f"; {budget}") as step:
                yield step
            return
        with progress_bar() as bar:
            task = bar.add_task(description, total=total, unit=unit)
            yield lambda done: bar.update(task, advance=done, description=f"{description} ({budget})")

    return progress


def _judge_by_patterns(given: Arguments) -> None:
    from app.cli.terminal import progress
    from features.run import open_run

    run = open_run(given.run)
    judged = _to_judge(given, run.index, run.labels)
    _judge(given, run, judged, None, progress)
