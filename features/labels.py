"""What do we call a feature: labels with their history, scores, notes, stars and lists, in one SQLite file.

It is the only file of a run that people edit. A label is never overwritten: a new one of the same source takes
its place, and the old one stays in the history. Of several sources the one that people trust most counts:
a person's, then a language model's, then an imported one, then the automatic one.
"""

import json
import math
import sqlite3
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from numbers import Real
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from activations.errors import InputError
from features.label_file import LabelFile, next_ids

if TYPE_CHECKING:
    import pandas as pd

Source = Literal["automatic", "llm", "person", "import"]
ScoreKind = Literal["tokens", "detection", "fuzzing"]
SOURCES: tuple[Source, ...] = ("person", "llm", "import", "automatic")
"""The one that counts first."""
SCORE_KINDS: tuple[ScoreKind, ...] = get_args(ScoreKind)
"""The one to show first."""
SCORE_NAMES: dict[ScoreKind, str] = {"tokens": "F1", "detection": "detection", "fuzzing": "fuzzing"}
TABLE_COLUMNS = (
    *("feature", "text", "source", "author", "method"),
    *("f1", "upper", "control", "n", "detection", "fuzzing", "note", "starred"),
)
"""Columns of :meth:`Labels.table`."""

_LARGEST_FEATURE = 2**31 - 1
_LABEL_TEXTS = ("text", "author", "method", "pattern", "made", "prompt_hash", "examples_hash", "note")
_SCORE_FIGURES = ("low", "high", "precision", "recall", "upper", "control")


@dataclass(frozen=True)
class Score:
    """How well a label predicts when its feature fires, on documents that it was not made from.

    Two scores are equal if they say the same, whenever they were made.

    Attributes:
        kind: ``"tokens"``: the label's pattern predicts every position of the text; ``"detection"``: is the
            label in this text; ``"fuzzing"``: are the marked tokens those that the label is about.
        value: tokens: F1 over all firings; detection and fuzzing: balanced accuracy.
        n: tokens: the firings that it rests on; detection and fuzzing: the cases judged; 0 if not known.
        low, high: 95% interval of the value: Wilson's (1927), of both rates of a balanced accuracy, averaged.
        precision, recall: what F1 is made of.
        upper: tokens: F1 for the upper half of firings by activation.
        control: the same figure as ``value`` for the shuffled control.
        judge: the name of the model that judged; ``"pattern"`` if the label's own pattern did.
        made: when, in UTC (ISO 8601); the store fills it in.
    """

    kind: ScoreKind
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    precision: float | None = None
    recall: float | None = None
    upper: float | None = None
    control: float | None = None
    judge: str = "pattern"
    made: str = field(default="", compare=False)


@dataclass(frozen=True)
class Label:
    """What a feature is called, who says so, and how well the name predicts its firing.

    Two labels are equal if they say the same, whenever and wherever they were stored.

    Attributes:
        feature: index of the feature.
        text: the label; empty for a feature that has only a note.
        source: what kind of author gave it.
        author: a person's name, a model's, a library's.
        method: which kind of automatic label it is (:mod:`features.explain`), or which explainer made it.
        pattern: JSON of a pattern (:mod:`features.patterns`) that says the same; empty if there is none.
        scores: the newest of each kind.
        made: when, in UTC (ISO 8601); the store fills it in. Empty where it is not known.
        prompt_hash, examples_hash: of what a language model was asked; of the examples it was made from.
        note: the newest remark about the feature, empty if there is none.
        id: number in the store; None outside of it.
    """

    feature: int
    text: str
    source: Source = "person"
    author: str = ""
    method: str = ""
    pattern: str = ""
    scores: tuple[Score, ...] = ()
    made: str = field(default="", compare=False)
    prompt_hash: str = ""
    examples_hash: str = ""
    note: str = ""
    id: int | None = field(default=None, compare=False)

    def score_of(self, kind: ScoreKind) -> Score | None:
        """The score of that kind."""
        return next((score for score in self.scores if score.kind == kind), None)

    @property
    def score(self) -> Score | None:
        """The score to show: by tokens, else by detection, else by fuzzing; None if it is not scored."""
        return next((score for kind in SCORE_KINDS if (score := self.score_of(kind))), None)

    @property
    def summary(self) -> str:
        """The text and its score on one line: ``fires on ‹self› · F1 0.93``."""
        return f"{self.text} · {self.figure}"

    @property
    def figure(self) -> str:
        """The score to show: ``F1 0.93``, or that it is not scored."""
        return f"{SCORE_NAMES[self.score.kind]} {self.score.value:.2f}" if self.score else "not scored"

    @property
    def f1(self) -> float | None:
        """F1 of its pattern over all firings on held-out documents; None if that was not measured."""
        return self._tokens("value")

    @property
    def precision(self) -> float | None:
        """Of the positions that its pattern names, the share on which the feature fires."""
        return self._tokens("precision")

    @property
    def recall(self) -> float | None:
        """Of the feature's firings, the share that its pattern names."""
        return self._tokens("recall")

    @property
    def upper(self) -> float | None:
        """F1 for the upper half of firings by activation."""
        return self._tokens("upper")

    @property
    def control(self) -> float | None:
        """F1 of the best pattern for as many firings at random positions."""
        return self._tokens("control")

    @property
    def n(self) -> int | None:
        """The held-out firings that F1 rests on."""
        score = self.score_of("tokens")
        return None if score is None else score.n

    def _tokens(self, name: str) -> float | None:
        score = self.score_of("tokens")
        return None if score is None else getattr(score, name)


@dataclass(frozen=True)
class Note:
    """A remark about a feature as it once was; an empty text took the one before away."""

    text: str
    author: str
    made: str


_SCORE_COLUMNS = ", ".join(each.name for each in fields(Score))
_LABEL_COLUMNS = "id, feature, source, text, author, method, pattern, made, prompt_hash, examples_hash"


class Labels:
    """The labels of one run.

    An instance may be shared by threads, and several processes may write to one file. Every call is one
    transaction: it happens as a whole or not at all.
    """

    def __init__(self, path: Path, sae_hash: str | None = None) -> None:
        self.path = path
        self._file = LabelFile(path, sae_hash)

    @classmethod
    def open(cls, path: str | Path, *, sae_hash: str | None = None) -> "Labels":
        """The labels at ``path``; a file that does not exist yet counts as empty.

        Args:
            sae_hash: of which SAE they must be. The first write notes it, and from then on labels of another SAE are
                refused, at every call; None reads the labels of any.

        Raises:
            InputError: the file is damaged, is not a file of labels, was written by a newer version, or holds labels
                of another SAE.
        """
        labels = cls(Path(path), sae_hash)
        with labels._file.reading():
            pass
        return labels

    @property
    def sae_hash(self) -> str | None:
        """Of which SAE the labels are; None if that is not known, because no run has written to the file."""
        if self._file.sae_hash is not None:
            return self._file.sae_hash
        with self._file.reading() as connection:
            return self._file.check_sae(connection, None) if connection else None

    def move_to(self, path: str | Path) -> None:
        """Give the file another name, in one step.

        Raises:
            InputError: there is a file of that name, another process has the labels open, or they cannot be moved.
        """
        self._file.move_to(Path(path))

    def get(self, feature: int) -> Label | None:
        """The label of a feature that counts, with the feature's note; None if it has neither."""
        return self._that_count("WHERE feature = ?", (int(feature),)).get(int(feature))

    def automatic(self, feature: int) -> Label | None:
        """The automatic label of a feature, also where another one stands before it; without the note."""
        condition = "WHERE feature = ? AND source = 'automatic'"
        with self._file.reading() as connection:
            found = _current(connection, condition, (int(feature),)) if connection else []
        return found[0] if found else None

    def history(self, feature: int) -> list[Label]:
        """Every label that a feature ever had, of whatever source, newest first; without notes."""
        with self._file.reading() as connection:
            if connection is None:
                return []
            condition = "WHERE feature = ? AND text <> '' ORDER BY id DESC"
            return _labels(connection, condition, (int(feature),))

    def notes(self, feature: int) -> list[Note]:
        """Every note that a feature ever had, newest first."""
        query = "SELECT text, author, made FROM notes WHERE feature = ? ORDER BY id DESC"
        with self._file.reading() as connection:
            rows = connection.execute(query, (int(feature),)).fetchall() if connection else []
        return [Note(*row) for row in rows]

    def all(self, source: Source | None = None) -> dict[int, Label]:
        """By feature, the labels that count, with notes; or the newest of one source, without them."""
        if source is None:
            return self._that_count("", ())
        with self._file.reading() as connection:
            found = _current(connection, "WHERE source = ?", (source,)) if connection else []
        return {label.feature: label for label in found}

    def table(self) -> "pd.DataFrame":
        """One row per feature that has a label, a note or a star, in the order of features.

        Returns:
            a pandas table of :data:`TABLE_COLUMNS`: the label that counts (as ``text``), where it comes from,
            its scores (nan where not measured), the feature's note and whether it is starred.
        """
        from features.label_table import label_table

        with self._file.reading() as connection:
            return label_table(connection)

    def set(
        self, feature: int, text: str, *, author: str = "", note: str | None = None, pattern: str = ""
    ) -> int | None:
        """Give a feature a person's label; an empty one takes it away, and the next source's shows again.

        Args:
            author: the person's name.
            note: replaces the feature's note, an empty one removes it; None leaves it as it is.
            pattern: JSON of a pattern that says the same.

        Returns:
            the label's id; None if it has been taken away.
        """
        label = _checked_label(Label(feature, text, "person", author, pattern=pattern, note=note or ""))
        feature, text = label.feature, label.text
        with self._file.writing() as connection:
            if note is not None:
                _put_note(connection, feature, note, author)
            found = _current(connection, "WHERE feature = ? AND source = 'person'", (feature,))
            if not text and not found:
                return None
            if found and replace(found[0], scores=()) == replace(label, note=""):
                return found[0].id  # saved again as it was: no news for the history
            (label_id,) = _append(connection, [label])
        return label_id if text else None

    def set_note(self, feature: int, text: str, *, author: str = "") -> None:
        """Write a note about a feature; an empty one removes it."""
        label = _checked_label(Label(feature, "", author=author, note=text))
        with self._file.writing() as connection:
            _put_note(connection, label.feature, label.note, author)

    def add(
        self,
        labels: Iterable[Label],
        *,
        starred: Iterable[int] = (),
        lists: Mapping[str, Mapping[int, str]] | None = None,
    ) -> list[int]:
        """Append labels of any source, each with its scores and, if it has one, its note.

        Args:
            labels: one without a text is about its note alone. starred: features to star as well.
            lists: by name, features to put into lists, each with its note there, as :meth:`add_to_list` does.

        Returns:
            the id of each; of its note if it has no text.

        Raises:
            InputError: a feature's number is below 0, a label has neither text nor note, or holds something that is
                no text or no figure.
        """
        labels, features = [_checked_label(label) for label in labels], [_checked(each) for each in starred]
        for label in labels:
            if not label.text and not label.note:
                raise InputError(f"The new label of feature {label.feature} is empty: give it a text.")
        listed = {
            _list_name(name): {
                _checked(each): _checked_text(note, "note of a list") for each, note in members.items()
            }
            for name, members in (lists or {}).items()
        }
        if not labels and not features and not listed:
            return []
        with self._file.writing() as connection:
            ids = _append(connection, [label for label in labels if label.text])
            added = iter(ids)
            result = []
            for label in labels:
                noted = label.note and _put_note(connection, label.feature, label.note, label.author)
                result.append(next(added) if label.text else int(noted))
            _star(connection, features, True)
            for name, members in listed.items():
                self._put_in_list(connection, name, members)
        return result

    def put_automatic(self, labels: Iterable[Label], inputs: Mapping[str, Any] | None = None) -> None:
        """Make these the automatic labels: a feature that is not among them has none any more.

        Other sources' labels and the notes stay, and so do the old automatic labels in the history.

        Args:
            inputs: hashes and settings that the labels were derived from; see :attr:`inputs`.

        Raises:
            InputError: a feature has two of them, one of them is not automatic or has no text, or they are of another
                SAE than the labels that are here.
        """
        labels = [_checked_label(label) for label in labels]
        derived = dict(inputs or {})
        features: dict[int, Label] = {}
        for label in labels:
            if label.source != "automatic" or not label.text:
                raise InputError(f"The label of feature {label.feature} is not an automatic one with a text.")
            if label.feature in features:
                raise InputError(f"Feature {label.feature} has two automatic labels: give it one.")
            features[label.feature] = label
        with self._file.writing() as connection:
            newest = "SELECT MAX(id) FROM labels WHERE source = 'automatic' GROUP BY feature"
            before = connection.execute(
                f"SELECT feature FROM labels WHERE id IN ({newest}) AND text <> '' ORDER BY feature"
            )
            gone = [Label(feature, "", "automatic") for (feature,) in before if feature not in features]
            _append(connection, [*gone, *labels])
            held = self._file.check_sae(connection, derived.get("sae_hash"))
            derived |= {} if held is None else {"sae_hash": held}
            connection.execute("UPDATE state SET inputs = ?", (json.dumps(derived),))

    @property
    def inputs(self) -> dict[str, Any] | None:
        """What the automatic labels were derived from, where there are none only the hash of the SAE; None if not even
        that is known.
        """
        with self._file.reading() as connection:
            row = connection.execute("SELECT inputs FROM state").fetchone() if connection else None
        return json.loads(row[0]) if row and row[0] is not None else None

    def add_score(self, label_id: int, score: Score) -> None:
        """Append a score to a label; the newest of its kind counts.

        Raises:
            InputError: there is no label of that id, or a figure of the score is none.
        """
        _check_score(score)
        with self._file.writing() as connection:
            if not connection.execute("SELECT 1 FROM labels WHERE id = ?", (int(label_id),)).fetchone():
                raise InputError(f"{self.path} holds no label of the id {label_id}.")
            _insert_scores(connection, [(int(label_id), score)])

    def star(self, feature: int, on: bool = True) -> None:
        """Mark a feature as one to come back to, or take the mark away."""
        with self._file.writing() as connection:
            _star(connection, [_checked(feature)], on)

    def starred(self) -> list[int]:
        """The starred features, in their order."""
        with self._file.reading() as connection:
            rows = connection.execute("SELECT feature FROM stars ORDER BY feature") if connection else []
            return [feature for (feature,) in rows]

    def lists(self) -> dict[str, int]:
        """The number of features in each list, by its name, in alphabetical order."""
        query = """SELECT name, COUNT(feature) FROM lists LEFT JOIN members ON list = lists.id
            GROUP BY lists.id ORDER BY name"""
        with self._file.reading() as connection:
            return dict(connection.execute(query)) if connection else {}

    def list_members(self, name: str) -> dict[int, str]:
        """The features of a list in the order in which they came, each with its note in the list.

        Raises:
            InputError: there is no such list.
        """
        with self._file.reading() as connection:
            if connection is None:
                raise InputError(f"There is no list {name!r}: {self.path} has none.")
            number = self._list(connection, name)
            query = "SELECT feature, note FROM members WHERE list = ? ORDER BY rowid"
            return dict(connection.execute(query, (number,)))

    def add_to_list(self, name: str, features: Iterable[int], note: str = "") -> None:
        """Put features at the end of a list, which is made if it is new.

        Args:
            note: why these are in it; a feature that is there already keeps its place, and its note if this is empty.

        Raises:
            InputError: the name is empty.
        """
        name, note = _list_name(name), _checked_text(note, "note of a list")
        members = {_checked(feature): note for feature in features}
        with self._file.writing() as connection:
            self._put_in_list(connection, name, members)

    def remove_from_list(self, name: str, features: Iterable[int]) -> None:
        """Take features out of a list; those that are not in it change nothing.

        Raises:
            InputError: there is no such list.
        """
        with self._file.writing() as connection:
            number = self._list(connection, name)
            rows = [(number, int(feature)) for feature in features]
            connection.executemany("DELETE FROM members WHERE list = ? AND feature = ?", rows)
            next_ids(connection)

    def rename_list(self, name: str, new: str) -> None:
        """Give a list another name.

        Raises:
            InputError: there is no such list, there is one of the new name, or that is empty.
        """
        new = _list_name(new)
        with self._file.writing() as connection:
            number = self._list(connection, name)
            taken = "SELECT 1 FROM lists WHERE name = ? AND id <> ?"
            if connection.execute(taken, (new, number)).fetchone():
                raise InputError(f"There is a list {new!r} already: give another name.")
            connection.execute("UPDATE lists SET name = ? WHERE id = ?", (new, number))
            next_ids(connection)

    def delete_list(self, name: str) -> None:
        """Delete a list; its features and their labels stay.

        Raises:
            InputError: there is no such list.
        """
        with self._file.writing() as connection:
            number = self._list(connection, name)
            connection.execute("DELETE FROM members WHERE list = ?", (number,))
            connection.execute("DELETE FROM lists WHERE id = ?", (number,))
            next_ids(connection)

    def change(self) -> int:
        """A number that grows with every write; 0 if there has been none."""
        with self._file.reading() as connection:
            row = connection.execute("SELECT counter FROM state").fetchone() if connection else None
        return int(row[0]) if row else 0

    def mark(self, change: int) -> str:
        """What the write of that number in this file's past was marked with, at random; "" if there was none.

        Two files, or a file and an older copy of it that was put back, are alike up to a change if their marks of it
        are; then :meth:`changed_since` tells what is new.
        """
        query = "SELECT hex(mark) FROM writes WHERE counter = ?"
        with self._file.reading() as connection:
            row = connection.execute(query, (change,)).fetchone() if connection else None
        return str(row[0]) if row else ""

    def changed_since(self, change: int) -> "Set[int]":
        """The features whose label, its scores or whose note changed after :meth:`change` said ``change``."""
        query = """SELECT feature FROM labels WHERE id > ?1 UNION SELECT feature FROM notes WHERE id > ?1 UNION
            SELECT feature FROM labels WHERE id IN (SELECT label FROM scores WHERE id > ?1)"""
        with self._file.reading() as connection:
            rows = connection.execute(query, (change,)) if connection else ()
            return {feature for (feature,) in rows}

    def _that_count(self, condition: str, arguments: tuple[Any, ...]) -> dict[int, Label]:
        """By feature, the labels that count, with notes."""
        with self._file.reading() as connection:
            if connection is None:
                return {}
            best: dict[int, Label] = {}
            for label in _current(connection, condition, arguments):
                other = best.get(label.feature)
                if other is None or SOURCES.index(label.source) < SOURCES.index(other.source):
                    best[label.feature] = label
            newest = f"SELECT MAX(id) FROM notes {condition} GROUP BY feature"
            query = f"SELECT feature, text FROM notes WHERE id IN ({newest}) AND text <> ''"
            for feature, note in connection.execute(query, arguments):
                best[feature] = replace(best.get(feature, Label(feature, "")), note=note)
        return dict(sorted(best.items()))

    def _put_in_list(self, connection: sqlite3.Connection, name: str, members: Mapping[int, str]) -> None:
        connection.execute("INSERT OR IGNORE INTO lists (name) VALUES (?)", (name,))
        number = self._list(connection, name)
        connection.executemany(
            """INSERT INTO members VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET note = ?3 WHERE ?3 <> ''""",
            [(number, feature, note.strip()) for feature, note in members.items()],
        )
        next_ids(connection)

    def _list(self, connection: sqlite3.Connection, name: str) -> int:
        row = connection.execute("SELECT id FROM lists WHERE name = ?", (name.strip(),)).fetchone()
        if row is None:
            names = [repr(other) for (other,) in connection.execute("SELECT name FROM lists ORDER BY name")]
            there = f"the lists are {', '.join(names)}" if names else f"{self.path} has none"
            raise InputError(f"There is no list {name!r}: {there}.")
        return int(row[0])


def _checked(feature: int) -> int:
    """The number of a feature as Python's own, which is all that SQLite takes."""
    number = index(feature) if hasattr(feature, "__index__") else -1
    if not 0 <= number <= _LARGEST_FEATURE:
        raise InputError(f"There is no feature {feature}: features are numbered from 0.")
    return number


def _checked_label(label: Label) -> Label:
    """The label with its text and note stripped.

    Raises:
        InputError: something in it cannot be stored. Nothing has been written yet then.
    """
    feature = _checked(label.feature)
    if label.source not in SOURCES:
        raise InputError(
            f"The source of a label is {label.source!r}, and must be one of {', '.join(SOURCES)}."
        )
    for name in _LABEL_TEXTS:
        _checked_text(getattr(label, name), name)
    for score in label.scores:
        _check_score(score)
    text, note = label.text.strip(), label.note.strip()
    same = type(label.feature) is int and text == label.text and note == label.note
    return label if same else replace(label, feature=feature, text=text, note=note)


def _checked_text(value: str, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"The {name} is {value!r}, and must be a text.")
    return value


def _check_score(score: Score) -> None:
    if score.kind not in SCORE_KINDS:
        raise InputError(
            f"The kind of a score is {score.kind!r}, and must be one of {', '.join(SCORE_KINDS)}."
        )
    if not isinstance(score.value, Real) or math.isnan(score.value):
        raise InputError(f"The value of a score is {score.value!r}, and must be a number.")
    for name in ("value", *_SCORE_FIGURES):
        value = getattr(score, name)  # nan is stored as None: it was not measured
        if value is not None and (not isinstance(value, Real) or math.isinf(value)):
            raise InputError(f"The {name} of a score is {value!r}, and must be a number.")
    is_whole = isinstance(score.n, Real) and 0 <= score.n < 2**63 and score.n == int(score.n)
    if not is_whole:
        raise InputError(f"The n of a score is {score.n!r}, and must be a whole number from 0 on.")
    _checked_text(score.judge, "judge")
    _checked_text(score.made, "made")


def _list_name(name: str) -> str:
    if not _checked_text(name, "name of a list").strip():
        raise InputError("A list needs a name that is not empty.")
    return name.strip()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _current(connection: sqlite3.Connection, condition: str, arguments: tuple[Any, ...]) -> list[Label]:
    """The newest label of every feature and source, unless it has been taken away; in the order of features."""
    newest = f"SELECT MAX(id) FROM labels {condition} GROUP BY feature, source"
    return _labels(connection, f"WHERE id IN ({newest}) AND text <> '' ORDER BY feature, id", arguments)


def _labels(connection: sqlite3.Connection, condition: str, arguments: tuple[Any, ...]) -> list[Label]:
    """The labels that meet a condition, with the newest scores of each kind."""
    scores: dict[int, list[Score]] = {}
    newest = f"""SELECT MAX(id) FROM scores WHERE label IN (SELECT id FROM labels {condition})
        GROUP BY label, kind"""
    query = f"SELECT label, {_SCORE_COLUMNS} FROM scores WHERE id IN ({newest}) ORDER BY id"
    for label, *figures in connection.execute(query, arguments):
        scores.setdefault(label, []).append(Score(*figures))
    query = f"SELECT {_LABEL_COLUMNS} FROM labels {condition}"
    labels = []
    for id_, feature, source, text, author, method, pattern, made, prompt, examples in connection.execute(
        query, arguments
    ):
        found = tuple(scores.get(id_, ()))
        labels.append(
            Label(feature, text, source, author, method, pattern, found, made, prompt, examples, id=id_)
        )
    return labels


def _append(connection: sqlite3.Connection, labels: Sequence[Label]) -> list[int]:
    """Write labels that have been checked, and their scores; returns the ids of the labels."""
    if not labels:
        return []
    first, now = next_ids(connection, len(labels)), _now()
    connection.executemany(
        f"INSERT INTO labels ({_LABEL_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (
                *(first + place, label.feature, label.source, label.text, label.author),
                *(label.method, label.pattern, label.made or now, label.prompt_hash, label.examples_hash),
            )
            for place, label in enumerate(labels)
        ),
    )
    _insert_scores(
        connection, [(first + place, score) for place, label in enumerate(labels) for score in label.scores]
    )
    return list(range(first, first + len(labels)))


def _insert_scores(connection: sqlite3.Connection, scores: Sequence[tuple[int, Score]]) -> None:
    """Write scores of labels, given as (id of the label, score)."""
    if not scores:
        return
    first, now = next_ids(connection, len(scores)), _now()
    connection.executemany(
        f"INSERT INTO scores (id, label, {_SCORE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        ((first + place, label, *_plain(score, now)) for place, (label, score) in enumerate(scores)),
    )


def _plain(score: Score, now: str) -> tuple[Any, ...]:
    """The figures as Python's own numbers, which are all that SQLite takes."""
    figures = (getattr(score, name) for name in _SCORE_FIGURES)
    numbers = (None if figure is None else float(figure) for figure in figures)
    return (score.kind, float(score.value), int(score.n), *numbers, score.judge, score.made or now)


def _put_note(connection: sqlite3.Connection, feature: int, text: str, author: str) -> int:
    """Write a note unless it says what the newest one says; returns its id."""
    query = "SELECT id, text FROM notes WHERE feature = ? ORDER BY id DESC LIMIT 1"
    row = connection.execute(query, (feature,)).fetchone()
    if text.strip() == (row[1] if row else ""):
        return row[0] if row else 0
    note = next_ids(connection)
    connection.execute(
        "INSERT INTO notes VALUES (?, ?, ?, ?, ?)", (note, feature, text.strip(), author, _now())
    )
    return note


def _star(connection: sqlite3.Connection, features: Sequence[int], on: bool) -> None:
    if not features:
        return
    query = "INSERT OR IGNORE INTO stars VALUES (?)" if on else "DELETE FROM stars WHERE feature = ?"
    connection.executemany(query, [(feature,) for feature in features])
    next_ids(connection)
