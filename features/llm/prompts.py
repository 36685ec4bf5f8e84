"""Every word that is said to a language model, and how its answers are read.

Texts are shown one a line, with line breaks as ⏎ and tabs as ⇥, and the tokens in question between « and ».
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from features.llm.chat import Message, system_and_user
from features.llm.session import Unusable

MOST_CHARACTERS = 200
"""Of a label."""
UNCLEAR = "unclear"
"""What a model answers that finds nothing in common."""

_MARKS = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥", "«": "‹", "»": "›"})
_UNPRINTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u2028\u2029\x85\ufffd]")

_EXPLAIN = """\
You name the units ("features") that a sparse autoencoder found inside a language model. A feature is silent on most \
text and fires on certain tokens. From what is known about one feature you say, in a short phrase, what it stands for.

You are given
- the tokens on which it fires most, with the share of its firings;
- the tokens that come right after a firing;
- the tokens that it makes more likely to come next;
- texts, from its strongest firings to its weakest, with the tokens on which it fires between « and ». ⏎ is a line \
break, ⇥ a tab.

Any of these may show what the feature is about: a token, the words around it, a topic, or what comes next. \
Judge by what the texts have in common, the weak firings too, and be as specific as the evidence allows, no more. \
If it is about what comes next, begin the phrase with "before". Do not explain, hedge or talk about features, tokens \
or the marks.

Answer with one line and nothing else:
LABEL: <at most twelve words>
If the texts have nothing in common:
LABEL: unclear"""

_DETECT = """\
A unit inside a language model is said to fire on something. You decide, for each of some texts, whether it fires \
anywhere in the text if the description is right. ⏎ is a line break, ⇥ a tab. The texts are cut out of longer ones.

Answer with one line and nothing else, one word (yes or no) for each text in their order:
ANSWERS: <yes or no>, <yes or no>, …"""

_FUZZ = """\
A unit inside a language model is said to fire on something. In each of some texts, tokens are marked with « and ». \
You decide whether the marked tokens are the ones on which it fires if the description is right; in some texts wrong \
tokens were marked. ⏎ is a line break, ⇥ a tab. The texts are cut out of longer ones.

Answer with one line and nothing else, one word (yes or no) for each text in their order:
ANSWERS: <yes or no>, <yes or no>, …"""


@dataclass(frozen=True)
class Evidence:
    """What an explainer is shown of one feature.

    Attributes:
        tokens: (token, share of its firings that are at it).
        after: (token, share of its firings that it follows).
        promoted: tokens whose logit it raises.
        texts: one line each, with marks.
    """

    tokens: tuple[tuple[str, float], ...]
    after: tuple[tuple[str, float], ...]
    promoted: tuple[str, ...]
    texts: tuple[str, ...]


def marked(tokens: Sequence[str], marks: np.ndarray) -> str:
    """One line of text, with runs of tokens for which ``marks`` (bool) holds between « and »."""
    parts = []
    inside = False
    for token, mark in zip(tokens, marks.tolist(), strict=True):
        if mark != inside and token:  # a character over several tokens stands at its first
            parts.append("«" if mark else "»")
            inside = mark
        parts.append(_line(token))
    return "".join(parts) + ("»" if inside else "")


def plain(tokens: Sequence[str]) -> str:
    """One line of text without marks."""
    return _line("".join(tokens))


def explain(evidence: Evidence) -> Sequence[Message]:
    """The question for a label."""
    parts = [
        "Tokens on which it fires most:\n"
        + _listed([f"{_line(t)!r} {share:.0%}" for t, share in evidence.tokens]),
        "Tokens right after:\n" + _listed([f"{_line(t)!r} {share:.0%}" for t, share in evidence.after]),
        "Tokens that it makes more likely:\n" + _listed([repr(_line(t)) for t in evidence.promoted]),
        "Texts:\n" + "\n".join(f"{number}. {text}" for number, text in enumerate(evidence.texts, 1)),
    ]
    return system_and_user(_EXPLAIN, "\n\n".join(parts))


def detect(label: str, texts: Sequence[str]) -> Sequence[Message]:
    """Does it fire in these texts?"""
    return _judge(_DETECT, label, texts)


def fuzz(label: str, texts: Sequence[str]) -> Sequence[Message]:
    """Are the marked tokens those on which it fires?"""
    return _judge(_FUZZ, label, texts)


def read_label(reply: str) -> str:
    """The phrase in the line ``LABEL: …``.

    Raises:
        Unusable: there is no such line, or several that differ, or the phrase is empty or too long, or holds what no
            file can (half of a surrogate pair).
    """
    text = _only(reply, "LABEL").strip("\"'“”<> ").rstrip(".")
    if not text:
        raise Unusable("Nothing stands after LABEL:.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Unusable("The label holds half of a surrogate pair, which is no character.")
    if len(text) > MOST_CHARACTERS:
        raise Unusable(f"The label has {len(text)} characters, and at most {MOST_CHARACTERS} are allowed.")
    return text


def read_answers(reply: str, n: int) -> list[bool]:
    """The n answers in the line ``ANSWERS: …``.

    Raises:
        Unusable: there is no such line, or several that differ, or other words than yes and no, or not n of them.
    """
    words = _only(reply, "ANSWERS").strip("[]<>. ").lower()
    found = [word.strip("\"'.*") for word in re.split(r"[,;\s]+", words) if word]
    wrong = next((word for word in found if word not in ("yes", "no")), None)
    if wrong is not None:
        raise Unusable(f"{wrong!r} is neither yes nor no.")
    if len(found) != n:
        raise Unusable(f"The line must hold {n} answers, and it holds {len(found)}.")
    return [word == "yes" for word in found]


def _only(reply: str, name: str) -> str:
    """What stands on the line that begins with ``NAME:``, whatever asterisks are around it."""
    found = set(
        re.findall(rf"^[ *_`#>]*{name}[*_]*:[*_ \t]*(.*?)[ *_`]*$", reply, re.MULTILINE | re.IGNORECASE)
    )
    if len(found) != 1:
        raise Unusable(
            f"There must be one line that begins with {name}:, and there {'are several' if found else 'is none'}."
        )
    return str(found.pop())


def _judge(system: str, label: str, texts: Sequence[str]) -> Sequence[Message]:
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return system_and_user(system, f"It is said to fire on this: {label}\n\n{len(texts)} texts:\n{listed}")


def _line(text: str) -> str:
    return _UNPRINTED.sub("�", text.translate(_MARKS))


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items) if items else "(not known)"
