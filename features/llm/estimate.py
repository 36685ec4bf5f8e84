"""What labelling would take, before anything is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from features.index import FeatureIndex
from features.llm import prompts
from features.llm.chat import Message
from features.llm.explain import WIDTH, evidence
from features.llm.judge import CASES_PER_PROMPT

BYTES_PER_TOKEN = 3.5
"""Of English and code, with the tokenizers of today."""
LABEL_TOKENS, ANSWERS_TOKENS = 16, 4 + 2 * CASES_PER_PROMPT
"""Of replies in the form that is asked for; a model that thinks before it answers takes many more."""
_LABEL_CHARACTERS = 50
_SAMPLE = 24  # features whose prompts are written to see how long they are


@dataclass(frozen=True)
class Estimate:
    """How many prompts, and about how many tokens they and their replies have."""

    features: int
    prompts: int
    prompt_tokens: int
    completion_tokens: int


def estimate(
    index: FeatureIndex, features: Sequence[int], *, labels: int, judged: int, n_cases: int
) -> Estimate:
    """What it takes to label and judge, if nothing of it is in the cache.

    Args:
        index: of the train split; the judge's texts are taken to be as long as the explainer's.
        features: what it is about.
        labels: how many of them are to be labelled.
        judged: how many labels are to be judged, each in two tasks and beside its control.
        n_cases: of one task.
    """
    sample = features[:: max(1, len(features) // _SAMPLE)]
    questions = [_tokens(prompts.explain(evidence(index, feature))) for feature in sample]
    judgements = [_judgement_tokens(index, feature) for feature in sample]
    n_judgements = judged * 2 * 2 * -(-n_cases // CASES_PER_PROMPT)
    return Estimate(
        features=len(features),
        prompts=labels + n_judgements,
        prompt_tokens=round(labels * fmean(questions or [0]) + n_judgements * fmean(judgements or [0])),
        completion_tokens=labels * LABEL_TOKENS + n_judgements * ANSWERS_TOKENS,
    )


def _judgement_tokens(index: FeatureIndex, feature: int) -> float:
    """Of a prompt of either task, on average."""
    examples = index.top_examples(feature, WIDTH)[:CASES_PER_PROMPT]
    label, missing = "x" * _LABEL_CHARACTERS, CASES_PER_PROMPT - len(examples)
    plain = [prompts.plain(example.tokens) for example in examples]
    marked = [prompts.marked(example.tokens, example.activations != 0) for example in examples]
    detect, fuzz = (
        ask(label, texts + texts[-1:] * missing)
        for ask, texts in ((prompts.detect, plain), (prompts.fuzz, marked))
    )
    return (_tokens(detect) + _tokens(fuzz)) / 2


def _tokens(messages: Sequence[Message]) -> float:
    return sum(len(message.content.encode()) for message in messages) / BYTES_PER_TOKEN
