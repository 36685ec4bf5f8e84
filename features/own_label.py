"""A person's label, with the pattern that makes it a claim, and its score.

A pattern is written as what it is about: a token (``self``, or ``␣self`` with its space), a few tokens in a row
(``self.x``), or a regular expression between slashes (``/https?:/``). Labels without one stay as they are: free text
says nothing that could be checked without a judge.
"""

from typing import TYPE_CHECKING

from activations.blocks import TokenBlocks
from activations.errors import InputError
from activations.files import MANIFEST
from activations.progress import Progress, silent
from features.aspects import Aspect
from features.labels import Label, Score
from features.patterns import Pattern

if TYPE_CHECKING:
    from activations.tokenizer import Tokenizer
    from features.run import Run

_SIGNS = {"␣": " ", "⏎": "\n", "⇥": "\t"}
"""What stands for white space wherever tokens are shown, and may stand for it here."""
_NGRAM: tuple[Aspect, ...] = ("before3", "before2", "before", "token")


def read_pattern(written: str, tokenizer: "Tokenizer") -> Pattern:
    """The pattern that a person wrote: ``/regex/``, a token, or up to four tokens in a row; or its JSON.

    White space counts; what is one token of the vocabulary is taken for that one, else it is tokenised.

    Raises:
        InputError: it is empty, no regular expression, or more than four tokens.
    """
    if not written:
        raise InputError("The pattern is empty: give a token, up to four tokens in a row, or /a regex/.")
    if len(written) > 2 and written[0] == written[-1] == "/":
        return Pattern.of_regex(written[1:-1])
    if written.startswith(('{"any_of"', '{"regex"')):
        return Pattern.from_json(written)
    for sign, character in _SIGNS.items():
        written = written.replace(sign, character)
    vocabulary = tokenizer.vocabulary()
    if written in vocabulary:
        return Pattern.of_tokens([written])
    tokens = [vocabulary[token_id] for token_id in tokenizer.encode(written)]
    if len(tokens) > len(_NGRAM):
        raise InputError(
            f"The pattern {written!r} is {len(tokens)} tokens long, and at most {len(_NGRAM)} in a row can be matched:"
            " write it as /a regex/."
        )
    return Pattern.of_ngrams([tokens])


def write_pattern(pattern: str) -> str:
    """The pattern of a label, which is JSON, as :func:`read_pattern` reads it; empty for none."""
    try:
        found = Pattern.from_json(pattern)
    except InputError:
        return pattern
    if found.regex:
        return f"/{found.regex}/"
    values = dict(found.any_of[0].values)
    ngram = [values[aspect] for aspect in _NGRAM if aspect in values]
    if len(found.any_of) > 1 or len(ngram) < len(values) or any(len(tokens) > 1 for tokens in ngram):
        return pattern
    written = "".join(tokens[0] for tokens in ngram)
    for sign, character in _SIGNS.items():
        written = written.replace(character, sign)
    return written if written and values.keys() == set(_NGRAM[-len(ngram) :]) else pattern


def give_label(run: "Run", feature: int, text: str, pattern: str = "") -> None:
    """Make this the person's label of a feature; an empty text takes it away.

    Args:
        pattern: as :func:`read_pattern` reads it; empty for a label that no pattern says.

    Raises:
        InputError: there is no such feature, the pattern is none, or there is a pattern without a text.
    """
    run.feature(feature)  # refuses one that does not exist
    if pattern and not text.strip():
        raise InputError("A pattern belongs to a label: give the label as well.")
    found = read_pattern(pattern, run.model.tokenizer).to_json() if pattern else ""
    run.labels.set(feature, text, pattern=found)


def score_own_label(run: "Run", feature: int, *, progress: Progress = silent) -> Score | None:
    """Score the person's label of a feature by its pattern on the score split, and keep the score with it.

    Returns:
        the score, the one it has if it was scored before; None if there is no label or pattern, or the feature does
        not fire on the score split.
    """
    from features.score import score_pattern

    label = run.labels.all("person").get(feature)
    if label is None or not label.pattern:
        return None
    known = label.score_of("tokens")
    if known is not None:
        return known
    automatic = run.labels.automatic(feature)
    score = score_pattern(
        run.model,
        run.sae,
        _score_blocks(run),
        feature,
        Pattern.from_json(label.pattern),
        median=run.index.quantile(feature, 0.5),
        control=automatic.control if automatic else None,
        progress=progress,
    )
    if not score.n:
        return None
    assert label.id is not None
    run.labels.add_score(label.id, score)
    return score


def not_scored_because(label: Label) -> str:
    """Why :func:`score_own_label` had no score for a label: a phrase."""
    if not label.pattern:
        return "it has no pattern"
    return "the feature does not fire on the score split"


def _score_blocks(run: "Run") -> TokenBlocks:
    """The token blocks that automatic labels are scored on; made if there are none yet."""
    from features.pipeline import Pipeline

    folder = run.folder.tokens / "score"
    if (folder / MANIFEST).is_file():
        return TokenBlocks.load(folder)
    pipeline = Pipeline(run.folder.path, model=run.model)
    return pipeline.tokens("score", pipeline.sizes.score_tokens)
