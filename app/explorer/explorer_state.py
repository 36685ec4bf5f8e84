"""What all pages share: the run, opened once for all sessions, and the state that a link carries."""

import random
import sys
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from activations.errors import InputError
from activations.files import MANIFEST
from app.explorer.explorer_style import escape_markdown
from features.label_html import named_html
from features.labels import Label
from features.run import Feature, Run, open_run
from sae.run import RunFolder

if TYPE_CHECKING:
    from features.tables import FeatureTable

LONGEST_TEXT_IN_LINK = 2000  # characters; browsers and servers cut longer addresses


@st.cache_resource(show_spinner="Opening the run …", max_entries=2)
def opened(path: str, made: int) -> Run:
    """The run at ``path``: one object for all sessions, which are threads of one process; another one for an index that
    was ``made`` anew."""
    return open_run(path)


def the_run() -> Run:
    """The run that the explorer was started on: the argument after ``--``.

    Raises:
        InputError: there is no such argument, or the folder is no run.
    """
    if len(sys.argv) < 2:
        raise InputError("The explorer was started without a run: start it with sae explore RUN.")
    manifest = RunFolder(Path(sys.argv[1])).index / MANIFEST
    return opened(sys.argv[1], manifest.stat().st_mtime_ns if manifest.is_file() else 0)


def load_model(run: Run) -> None:
    """Load model and SAE, which takes seconds the first time, and say so."""
    with st.spinner("Loading the model …"):
        _ = run.model, run.sae


def complain(error: InputError | str) -> None:
    """Show what is wrong with an input, literally."""
    st.error(escape_markdown(str(error)), icon=":material/error:")


def parameter(name: str) -> str | None:
    """A value of the address."""
    value = st.query_params.get(name)
    return None if value is None else str(value)


def whole_number(name: str) -> int | None:
    """A whole number of the address; None if it is not there.

    Raises:
        InputError: it is something else.
    """
    value = parameter(name)
    if value is None:
        return None
    if not value.lstrip("-").isdigit():
        raise InputError(f"The address says {name}={value}, and {name} must be a whole number.")
    return int(value)


def asked_feature(run: Run) -> Feature:
    """The feature that the address names; without one, the last that this session looked at, or a telling one.

    Raises:
        InputError: there is no such feature.
    """
    number = whole_number("feature")
    if number is None:
        number = st.session_state.get("last feature")
    if number is None:
        number = best_labelled(run)
    feature = run.feature(number)
    st.session_state["last feature"] = number
    return feature


def best_labelled(run: Run) -> int:
    """The feature whose label predicts it best: a good one to begin with. 0 if nothing is labelled."""
    labels = run.labels.all().values()
    return min(labels, key=worth).feature if labels else 0


def random_feature(run: Run) -> int:
    """Some feature that fires in the index; any if none does."""
    firing = run.index.count.nonzero()[0]
    return int(random.choice(firing)) if len(firing) else random.randrange(run.index.d_sae)


def worth(label: Label | None) -> tuple[float, int]:
    """Sorts features by the score of their label, then by the number of cases it rests on, best first.

    Scores of two kinds are compared by what they are above chance: F1 begins at 0, balanced accuracy at 0.5.
    """
    score = None if label is None else label.score
    if score is None:
        return (1.0, 0)
    return (-score.value if score.kind == "tokens" else 1 - 2 * score.value, -score.n)


def name_of(run: Run, feature: int) -> str:
    """A feature's label with its score, or that it has none."""
    label = run.labels.get(feature)
    return label.summary if label and label.text else words_of(label)


def words_of(label: Label | None) -> str:
    """What a label says, or that there is none."""
    return label.text if label and label.text else "no label"


def listed(run: Run, feature: int, number: str) -> str:
    """A feature in a list, as HTML: its number as given, and its label with its score."""
    label = run.labels.get(feature)
    return f'<span class="named" title="{escape(name_of(run, feature))}">{number} {named_html(label)}</span>'


def read_as(found: "FeatureTable") -> str:
    """How a search read words that stand nowhere as they were typed; empty if all do."""
    return " ".join(
        f"“{word}” was read as {', '.join(words)}." for word, words in found.attrs.get("read_as", {}).items()
    )
