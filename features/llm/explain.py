"""Labels for features by a language model, from what the index of the train split knows of them.

The evidence is four lists: tokens on which the feature fires, tokens that follow, tokens that it promotes, and texts
from every tenth of its firings by strength. Inputs and outputs together describe a feature better than either alone
(Gur-Arieh et al. 2025, 2501.08319); firings of every strength keep the label from fitting the strongest only
(Paulo et al. 2024, 2410.13928).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from activations.files import hash_json
from activations.progress import Progress, silent
from features.index import Example, FeatureIndex
from features.labels import Label, Labels
from features.llm import prompts
from features.llm.budget import BudgetReached
from features.llm.session import NoAnswer, Session
from features.llm.threads import in_threads

METHOD = "four lists"
WIDTH = 32
"""Tokens of a text."""
TOP_TEXTS = 5
"""Of the strongest firings, besides one from every tenth."""
LISTED_TOKENS = 10


@dataclass
class Explained:
    """What came of explaining features.

    Attributes:
        labels: those that have a label from this model now, as the store has them.
        failed: feature → why it got none.
        stopped: why the work ended before all features were asked about; None if it did not.
    """

    labels: list[Label] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    stopped: str | None = None


def evidence(index: FeatureIndex, feature: int) -> prompts.Evidence:
    """What the explainer is shown of a feature; nothing random is in it.

    Raises:
        InputError: there is no such feature.
    """
    return prompts.Evidence(
        tokens=tuple((t.token, round(t.share, 2)) for t in index.top_tokens(feature)[:LISTED_TOKENS]),
        after=tuple((t.token, round(t.share, 2)) for t in index.next_tokens(feature)[:LISTED_TOKENS]),
        promoted=tuple(text for text, _, _ in index.promoted(feature)[:LISTED_TOKENS]),
        texts=tuple(prompts.marked(e.tokens, e.activations != 0) for e in shown_examples(index, feature)),
    )


def shown_examples(index: FeatureIndex, feature: int) -> list[Example]:
    """The firings that the explainer is shown: the strongest, and one from each tenth by strength, each once."""
    found = index.top_examples(feature, WIDTH)[:TOP_TEXTS]
    found += [examples[0] for _, examples in index.range_examples(feature, WIDTH) if examples]
    by_position = {example.position: example for example in found}
    return sorted(by_position.values(), key=lambda example: -example.value)


def most_active(index: FeatureIndex, n: int) -> list[int]:
    """The n features with the largest sum of activations, those that write most into the model; largest first."""
    total = index.count * index.mean.astype(np.float64)
    order = np.argsort(-total, kind="stable")[:n]
    return [int(feature) for feature in order if index.count[feature] > 0]


def explain_features(
    index: FeatureIndex,
    features: Sequence[int],
    session: Session,
    labels: Labels,
    *,
    concurrency: int = 8,
    progress: Progress = silent,
    result: Explained | None = None,
) -> Explained:
    """Ask a model for a label for each of some features; every label is stored as soon as it is there.

    A feature that this model was asked about before, with the same words, keeps the label that it got. A feature for
    which there is no usable answer is noted in :attr:`Explained.failed`, and the others go on; when the budget is
    reached, requests on their way are waited for, and :attr:`Explained.stopped` says so.

    Args:
        index: of the train split.
        concurrency: requests at once.
        result: filled as the work goes on, for a caller who wants to know what was done when it ends by an exception.

    Raises:
        InputError: no request can succeed, or there is no such feature; labels made before are kept.
    """
    result = Explained() if result is None else result

    def ask(feature: int) -> Label:
        found = evidence(index, feature)
        if not found.texts:
            raise NoAnswer("it never fires in the index")
        messages = prompts.explain(found)
        label = Label(
            feature,
            "",
            "llm",
            author=session.model,
            method=METHOD,
            prompt_hash=session.request(messages).key,
            examples_hash=hash_json(asdict(found)),
        )
        known = next((each for each in labels.history(feature) if each.source == "llm"), None)
        if known and (known.author, known.prompt_hash) == (label.author, label.prompt_hash):
            return known
        text = session.ask(messages, prompts.read_label)
        if text.lower() == prompts.UNCLEAR:
            raise NoAnswer("the model finds nothing in common")
        return _stored(labels, label, text)

    def remaining() -> Iterator[int]:
        for feature in features:
            if result.stopped:
                return
            yield feature

    with progress("explain", total=len(features), unit="features") as step:
        for feature, outcome in in_threads(ask, remaining(), max(1, concurrency)):
            if isinstance(outcome, Label):
                result.labels.append(outcome)
            elif isinstance(outcome, NoAnswer):
                result.failed[feature] = str(outcome)
            elif isinstance(outcome, BudgetReached):
                result.stopped = str(outcome)
                continue
            else:
                raise outcome
            step(1)
    result.labels.sort(key=lambda label: label.feature)
    return result


def _stored(labels: Labels, label: Label, text: str) -> Label:
    made = replace(label, text=text)
    return replace(made, id=labels.add([made])[0])
