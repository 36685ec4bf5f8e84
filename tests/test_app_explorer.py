"""The explorer without a browser: text as HTML, figures, links, every page run once, and how it is started."""

import html
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from command import HEAR_CTRL_C
from streamlit.testing.v1 import AppTest

from activations.corpus import Corpus, CorpusConfig
from activations.errors import InputError
from activations.models import LanguageModel
from app import launch
from app.explorer.explorer_charts import activation_histogram, feature_scatter, plot_text
from app.explorer.explorer_links import address, link, pick
from app.explorer.explorer_state import best_labelled
from app.explorer.explorer_style import escape_markdown, track_html
from features.build import build_index
from features.html_pieces import number, percent
from features.labels import Label, Labels, Score
from features.run import Run, open_run
from features.tokens_html import chip, tokens_html, visible
from sae.architectures.base import Weights
from sae.config import SAEConfig, TrainConfig
from sae.model import SparseAutoencoder
from sae.run import RunFolder, write_run_config

ROOT = Path(__file__).parents[1]
HOOK = "blocks.3.hook_resid_post"
D_SAE, K = 64, 4
SILENT = 7
SCORE = Score("tokens", 0.5, 12, precision=0.25, recall=1.0)
HOSTILE = "<b>bold</b> **stars** :red[x] $x^2$ <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a random SAE on the bundled model: seconds to make, and every page has something to show."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "small")
    texts = tmp_path_factory.mktemp("texts")
    for n in range(60):
        (texts / f"{n}.py").write_text(
            f"import os\n\n\ndef f{n}(x):\n    return '<b>', x[{n}] + os.name\n" * 2
        )
    model = LanguageModel.load()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(D_SAE, model.d_model, generator=generator) / 16
    bias = torch.zeros(D_SAE)
    bias[SILENT] = -1e4  # so that one feature never fires
    decoder = torch.nn.functional.normalize(rows.clone(), dim=1)
    weights = Weights(rows, bias, decoder, torch.zeros(model.d_model))
    metadata = {"hook_name": HOOK, "model_hash": model.hash, "context_size": 64, "prepend_bos": False}
    config = SAEConfig(d_sae=D_SAE, k=K)
    sae = SparseAutoencoder(config, weights, metadata)
    sae.save(folder.sae)
    write_run_config(folder.path, TrainConfig(sae=config, corpus=CorpusConfig(text=(str(texts),))))
    blocks = Corpus(CorpusConfig(text=(str(texts),))).blocks(model.tokenizer, "train", 3000, 64)
    build_index(model, sae, blocks, folder.index)
    labels = Labels.open(folder.labels)
    labels.put_automatic(
        [
            Label(f, f"fires on ‹{f}›", "automatic", method="on", scores=(SCORE,))
            for f in range(D_SAE)
            if f != SILENT
        ]
    )
    labels.set(3, HOSTILE)
    return folder.path


@pytest.fixture
def page(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Runs one page on the small run with a given address."""
    monkeypatch.setattr(sys, "argv", ["explorer_main.py", str(run_folder)])

    def run(name: str, **query: str) -> AppTest:
        script = f"from app.explorer import page_{name}\npage_{name}.show()\n"
        test = AppTest.from_string(script, default_timeout=60)
        for key, value in query.items():
            test.query_params[key] = value
        test.run()
        assert not test.exception, test.exception
        return test

    return run


def shown(test: AppTest) -> str:
    """All HTML blocks of a page."""
    return "\n".join(element.proto.body for element in test.get("html"))


def text_of(markup: str) -> str:
    """What a reader sees of some HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


class Elements(HTMLParser):
    """What a browser makes of some HTML: its elements, and the text in them."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# --- tokens


@pytest.mark.parametrize("one_line", [False, True])
@pytest.mark.parametrize("activation", [0.0, 1.0])
@pytest.mark.parametrize("pick_name", ["", "token"])
def test_no_token_becomes_markup(one_line: bool, activation: float, pick_name: str) -> None:
    hostile = ["<b>", "&amp;", '"', "'", "<img src=x onerror=alert(1)>", "</span>", "-->"]
    parser = Elements()
    parser.feed(tokens_html(hostile, [activation] * len(hostile), 1.0, one_line=one_line, pick=pick_name))
    assert parser.text == "".join(hostile)
    ours = {"class", "dir", "style", "title", "href", "data-pick", "target", "tabindex"}
    for tag, attributes in parser.elements:
        assert tag in ("div", "span", "a")
        assert set(attributes) <= ours
    if activation:
        titles = [str(attributes["title"]) for _, attributes in parser.elements if "title" in attributes]
        assert titles == [f"{visible(token)}   1 · 100% of the maximum" for token in hostile]


def test_passages_keep_the_text_exactly() -> None:
    tokens = ["def", " f", "(x", "):", "\n", "    ", "return", " ü", "", "\t#"]
    assert text_of(tokens_html(tokens, [0.0] * len(tokens), 1.0)) == "".join(tokens)
    # What fires shows a sign where a colour on white space could not be seen.
    assert tokens_html(["\n"], [1.0], 1.0).endswith("⏎</span>\n</div>")  # no stub of colour on the next line
    assert text_of(tokens_html(["\n"], [1.0], 1.0)) == "⏎\n"
    assert text_of(tokens_html([""], [1.0], 1.0)) == "‥"
    assert text_of(tokens_html(["\n" + " " * 12], [1.0], 1.0, one_line=True)) == "⏎␣×12"


def test_colour_is_the_share_of_the_maximum_and_the_title_says_the_value() -> None:
    markup = tokens_html(["a", "b", "c", "d"], [0.0, 1.0, 4.0, -2.0], 4.0, framed=1)
    opacities = [float(value) for value in re.findall(r"--a:([\d.]+)", markup)]
    assert opacities == pytest.approx([0.1 + 0.9 / 4, 1.0, 0.1 + 0.9 / 2], abs=1e-3)
    assert 'title="b   1 · 25% of the maximum"' in markup
    assert markup.count('class="t p"') == 1
    assert markup.count('class="t n"') == 1
    with pytest.raises(ValueError, match="shorter"):
        tokens_html(["a", "b"], [1.0], 1.0)


def test_nothing_stays_invisible() -> None:
    assert visible(" a\n\t") == "␣a⏎⇥"
    assert visible("\x00\x1b\x7f") == "␀␛␡"
    assert visible("\u202e\u200b") == "⟨U+202E⟩⟨U+200B⟩"  # would turn or join the text around them
    assert chip("") == '<code class="chip">‥</code>'
    assert text_of(chip("<i>")) == "<i>"


def test_markdown_is_escaped() -> None:
    assert escape_markdown(":red[x] $y$ *z*\n# t") == r"\:red\[x\] \$y\$ \*z\* \# t"
    assert escape_markdown("größe 1") == "größe 1"


# --- links, figures, figures of speech


def test_links_carry_their_state_and_escape_it() -> None:
    target = address("try-text", text="a&b=<c>\n", feature=3, token=None)
    assert parse_qs(urlsplit(target).query) == {"text": ["a&b=<c>\n"], "feature": ["3"]}
    assert address("steer") == "steer"
    markup = link(target, "<b>")
    assert html.unescape(re.search(r'href="([^"]*)"', markup)[1]) == target  # type: ignore[index]
    assert text_of(markup) == "<b>"
    assert 'data-pick="feature=3&amp;token="' in pick({"feature": 3, "token": None}, "x")


def test_scatter_holds_every_feature_once_with_its_own_label() -> None:
    features = np.array([2, 5, 9, 11])
    scores = np.array([0.1, np.nan, 0.9, np.nan])
    labels = ["two", "five", "<b>nine</b>", "eleven"]
    figure = feature_scatter(features, np.full(4, 0.01), np.arange(1.0, 5.0), "largest", scores, labels)
    found = {}
    for trace in figure.data:
        for feature, text, y in zip(trace.customdata, trace.text, trace.y, strict=True):
            found[int(feature)] = (text, float(y))
    assert found == {
        2: ("two", 1.0),
        5: ("five", 2.0),
        9: ("&lt;b&gt;nine&lt;/b&gt;", 3.0),
        11: ("eleven", 4.0),
    }
    assert plot_text("a & <br>") == "a &amp; &lt;br&gt;"


def test_histogram_shows_every_firing() -> None:
    edges = np.logspace(-3, 5, 81).astype(np.float32)
    counts = np.zeros(80, dtype=np.int64)
    counts[[30, 33]] = 4, 2
    figure = activation_histogram(edges, counts)
    assert list(figure.data[0].y) == [4, 0, 0, 2]
    assert np.allclose(figure.data[0].customdata[:, 0], edges[30:34])
    assert sum(activation_histogram(edges, np.zeros(80, dtype=np.int64)).data[0].y) == 0


def test_numbers_read_well() -> None:
    assert [number(x) for x in (0.8712, 32.0, 12345.6, 0.00012)] == ["0.871", "32", "12,346", "0.00012"]
    assert [percent(x) for x in (0.5, 0.00123, 0.0)] == ["50%", "0.123%", "0%"]
    assert "left:0.00%" in track_html(-0.5, 0.5, {"PCA": 2.0})
    assert "left:100.00%" in track_html(-0.5, 0.5, {"PCA": 2.0})


# --- pages


def test_overview_lists_all_features_and_searches(page: Callable[..., AppTest], run_folder: Path) -> None:
    run = open_run(run_folder)
    test = page("overview")
    assert f"{D_SAE:,} features" in shown(test)
    assert "has not been evaluated yet" in test.info[0].value
    frame = test.dataframe[0].value
    assert sorted(frame["feature"]) == list(range(D_SAE))
    assert frame.set_index("feature")["max"][5] == pytest.approx(run.feature(5).max)
    assert frame.set_index("feature")["label"][3] == HOSTILE
    found = page("overview", q="‹12›").dataframe[0].value
    assert 12 in list(found["feature"])
    assert len(found) < D_SAE
    with_token = {f for f in range(D_SAE) if "12" in "".join(t.token for t in run.index.top_tokens(f))}
    assert set(found["feature"]) <= with_token | {12}
    assert "regular expression" in page("overview", q="/(/").error[0].value
    assert 12 in list(page("overview", q="12").dataframe[0].value["feature"])


def test_feature_page_shows_what_the_index_holds(page: Callable[..., AppTest], run_folder: Path) -> None:
    feature = open_run(run_folder).feature(5)
    test = page("feature", feature="5")
    text = text_of(shown(test))
    assert "Feature 5" in text
    assert "fires on ‹5›" in text
    for figure in (
        "F1 0.50",
        "precision 0.25",
        "recall 1.00",
        "n 12",
        f"{feature.count:,}",
        number(feature.max),
    ):
        assert figure in text
    for example in feature.top_examples(24)[:3]:
        assert number(example.value) in text
        assert example.document in text
    for token in feature.promoted[:3]:
        assert visible(token[0]) in text


def test_labels_are_shown_literally(page: Callable[..., AppTest]) -> None:
    for name, query in (("feature", {"feature": "3"}), ("steer", {"features": "3"})):
        markup = shown(page(name, **query))
        assert html.escape(HOSTILE) in markup
        assert "<img" not in markup
    assert not page("feature", feature="3").markdown


def test_a_label_of_a_language_model_is_shown_with_its_own_scores(
    page: Callable[..., AppTest], run_folder: Path
) -> None:
    labels = Labels.open(run_folder / "labels.sqlite")
    score = Score("detection", 0.85, 40, 0.71, 0.92, control=0.5, judge="a judge")
    labels.add(
        [Label(12, "twelve", "llm", "a model", "explainer", scores=(score,)), Label(13, "x", "import")]
    )
    seen = text_of(shown(page("feature", feature="12")))
    assert "A language model's label, a model, explainer" in seen
    assert "detection 0.85 [0.71, 0.92]control 0.50n 40" in seen
    assert "Automatic: fires on ‹12› F1 0.50" in seen
    assert "An imported label, 20" in text_of(shown(page("feature", feature="13")))
    assert "not scored" in text_of(shown(page("feature", feature="13")))


def test_a_label_given_on_the_page_is_saved_and_taken_away(
    page: Callable[..., AppTest], run_folder: Path
) -> None:
    labels = Labels.open(run_folder / "labels.sqlite")
    test = page("feature", feature="9")
    test.text_input(key="label of 9").set_value("nine <i>").run()
    test.text_input(key="note on 9").set_value("look again").run()
    found = labels.get(9)
    assert found is not None
    assert (found.text, found.source, found.note) == ("nine <i>", "person", "look again")
    assert "fires on ‹9›" in text_of(shown(test))  # the automatic one stays to be seen
    test.text_input(key="label of 9").set_value("").run()
    found = labels.get(9)
    assert found is not None
    assert (found.text, found.source) == ("fires on ‹9›", "automatic")
    labels.set(9, "", note="")


def test_a_pattern_given_on_the_page_is_scored_at_once(
    page: Callable[..., AppTest], run_folder: Path
) -> None:
    run = open_run(run_folder)
    labels = run.labels
    test = page("feature", feature="10")
    test.text_input(key="pattern of 10").set_value("/./").run()
    assert labels.all("person").get(10) is None  # a pattern alone is no label
    test.text_input(key="label of 10").set_value("anything").run()
    assert not test.exception
    score = labels.all("person")[10].score
    assert score is not None
    assert (score.kind, score.control) == ("tokens", SCORE.control)
    assert score.recall is not None
    assert score.recall > 0.9  # all but line ends
    assert f"F1 {score.value:.2f}" in text_of(shown(test))
    again = page("feature", feature="10")
    assert again.text_input(key="pattern of 10").value == "/./"
    test.text_input(key="pattern of 10").set_value("/(/").run()
    assert labels.all("person")[10].score == score  # no pattern, no news
    test.text_input(key="pattern of 10").set_value("").run()
    assert labels.all("person")[10].pattern == ""
    assert "not scored" in text_of(shown(test))
    test.text_input(key="pattern of 10").set_value("␣import").run()
    assert labels.all("person")[10].pattern == '{"any_of": [{"token": [" import"]}]}'
    test.text_input(key="label of 10").set_value("").run()
    assert labels.all("person").get(10) is None
    assert test.text_input(key="pattern of 10").value == ""


def test_the_overview_shows_scores_of_every_kind(page: Callable[..., AppTest], run_folder: Path) -> None:
    labels = Labels.open(run_folder / "labels.sqlite")
    labels.add(
        [
            Label(20, "twenty", "llm", scores=(Score("detection", 0.95, 40, control=0.5),)),
            Label(21, "chance", "llm", scores=(Score("fuzzing", 0.5, 40),)),
            Label(22, "untested", "llm"),
        ]
    )
    test = page("overview")
    frame = test.dataframe[0].value
    rows = frame.set_index("feature")
    assert rows.loc[20, ["score", "measure"]].tolist() == [0.95, "detection"]
    assert rows.loc[21, ["score", "measure"]].tolist() == [0.5, "fuzzing"]
    assert rows.loc[30, ["score", "measure"]].tolist() == [0.5, "F1"]
    assert rows["measure"][22] == "not scored"
    assert rows["measure"][SILENT] == ""
    order = frame["feature"].tolist()
    assert order.index(20) < order.index(30) < order.index(21) < order.index(22)
    chart = json.loads(test.get("plotly_chart")[0].proto.spec)
    hover = [text for trace in chart["data"] for text in trace["text"]]
    assert {"twenty · detection 0.95", "untested · not scored"} <= set(hover)
    assert best_labelled(open_run(run_folder)) == 20


def test_a_silent_feature_has_a_page(page: Callable[..., AppTest]) -> None:
    assert "never fired" in shown(page("feature", feature=str(SILENT)))
    assert "never fired" in shown(page("steer", features=str(SILENT)))


@pytest.mark.parametrize(
    ("name", "query", "sentence"),
    [
        ("feature", {"feature": "64"}, "There is no feature 64: small has the features 0 to 63."),
        ("feature", {"feature": "x"}, "The address says feature=x, and feature must be a whole number."),
        ("try_text", {"token": "9999"}, "There is no token 9999: this text has the tokens 0 to"),
        ("steer", {"features": "1,a"}, "The address says features=1,a, and features must be whole numbers"),
    ],
)
def test_a_bad_address_gets_a_sentence(
    page: Callable[..., AppTest], name: str, query: dict[str, str], sentence: str
) -> None:
    test = page(name, **query)
    # What is shown is Markdown that reads as the sentence.
    assert test.error[0].value.replace("\\", "").startswith(sentence)


def test_try_text_ranks_features_of_a_token(page: Callable[..., AppTest], run_folder: Path) -> None:
    run = open_run(run_folder)
    text = "x = '<b>'\n"
    trace = run.trace(text)
    markup = shown(page("try_text", text=text, token="2", rank="activation"))
    feature, activation = trace.at(2)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", markup)
    assert text_of(rows[1]).startswith(f"{feature} ")
    assert number(activation) in text_of(rows[1])
    assert f"{len(trace.at(2))} features fire here" in markup


def test_steer_writes_both_texts_as_the_python_api_does(
    page: Callable[..., AppTest], run_folder: Path
) -> None:
    run: Run = open_run(run_folder)
    test = page("steer", features="5,11", s5="2", tokens="6", prompt="import", temperature="0")
    test.button[0].click().run()
    assert not test.exception
    default = run.model.generate("import", max_new_tokens=6, temperature=0)[0]
    with run.steered({5: 2.0, 11: 1.0}):
        steered = run.model.generate("import", max_new_tokens=6, temperature=0)[0]
    assert default != steered
    for name, text in (("default", default), ("steered", steered)):
        panel = re.search(rf'data-testid="{name} text"><div[^>]*>(.*?)</div>', shown(test), re.S)
        assert panel is not None
        assert text_of(panel[1]).replace("⏎", "") == "import" + text


def test_steer_says_what_does_not_fit(page: Callable[..., AppTest]) -> None:
    test = page("steer", features="5", tokens="256")
    test.button[0].click().run()
    assert "exceed the model's context" in test.error[0].value.replace("\\", "")


# --- starting it


def test_only_a_run_with_an_index_is_explored(run_folder: Path, tmp_path: Path) -> None:
    launch.check_explorable(run_folder)
    with pytest.raises(InputError, match="is not a run: it has no"):
        launch.launch(tmp_path, browser=False)
    write_run_config(tmp_path, TrainConfig())
    with pytest.raises(InputError) as caught:
        launch.launch(tmp_path, browser=False)
    assert str(caught.value) == f"{tmp_path} has no feature index yet: make it with sae index {tmp_path}."


def test_a_taken_port_is_refused_or_skipped(run_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind((launch.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launch.next_free_port(port) > port
        with pytest.raises(InputError, match=f"Port {port} is taken"):
            launch.launch(run_folder, port=port, browser=False)
    with pytest.raises(InputError, match="There is no port 99999"):
        launch.launch(run_folder, port=99999, browser=False)


class Stranger(BaseHTTPRequestHandler):
    """Another program, which answers whatever it is asked."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *about: object) -> None:
        """Say nothing."""


def test_a_port_that_somebody_takes_first_is_left_to_them(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another explorer, say, that was started at the same time."""
    with ThreadingHTTPServer((launch.HOST, 0), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        taken = stranger.server_port
        with (
            pytest.raises(InputError, match="ended at its start, with exit status"),
            launch.served(run_folder, taken),
        ):
            pass
        found, next_free_port = iter([taken]), launch.next_free_port
        monkeypatch.setattr(
            launch, "next_free_port", lambda first: next(found, None) or next_free_port(first)
        )
        with launch.served(run_folder) as server:
            port = int(server.address.removeprefix(f"http://{launch.HOST}:"))
            assert port > taken
            with urllib.request.urlopen(server.address, timeout=10) as page:
                assert b"streamlit" in page.read().lower()
        stranger.shutdown()


@pytest.mark.parametrize("n_failures", [2, 3])
def test_a_server_that_ends_at_its_start_is_tried_again_on_other_ports(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, n_failures: int
) -> None:
    """Whoever took the port may have left it again, so what is wrong cannot be seen by looking at it."""
    ports, command = [], launch.command

    def failing(folder: Path, port: int) -> list[str]:
        ports.append(port)
        return (
            [sys.executable, "-c", "raise SystemExit(1)"]
            if len(ports) <= n_failures
            else command(folder, port)
        )

    monkeypatch.setattr(launch, "command", failing)
    if n_failures < 3:
        with launch.served(run_folder) as server:
            assert server.address == f"http://{launch.HOST}:{ports[-1]}"
    else:
        with (
            pytest.raises(InputError, match="ended at its start, with exit status 1"),
            launch.served(run_folder),
        ):
            pass
    assert len(ports) == len(set(ports)) == 3


def test_no_module_of_the_explorer_hides_another() -> None:
    """Streamlit puts this folder first on the path."""
    names = {path.stem for path in (ROOT / "app" / "explorer").glob("*.py")} - {"__init__"}
    assert not names & {"app", "sae", "features", "activations", *sys.stdlib_module_names}
    assert all(name.startswith(("explorer_", "page_", "tokens_")) for name in names)


@pytest.mark.parametrize("stop", ["Ctrl-C", "terminate"])
def test_sae_explore_serves_and_ends_cleanly(run_folder: Path, tmp_path: Path, stop: str) -> None:
    """In a folder with decoys of our packages, as the command is typed; with no browser."""
    for decoy in ("app.py", "sae.py", "streamlit.py"):
        (tmp_path / decoy).write_text("raise SystemExit('decoy imported')\n")
    for decoy in ("features", "activations"):
        (tmp_path / decoy).mkdir()
        (tmp_path / decoy / "__init__.py").write_text("raise SystemExit('decoy imported')\n")
    words = [sys.executable, "-P", "-m", "app.cli", "explore", str(run_folder), "--no-browser"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=HEAR_CTRL_C,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)
        connection.request("GET", "/_stcore/health")
        assert connection.getresponse().status == 200
        if stop == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # a terminal tells the whole group
        else:
            process.terminate()
        assert process.wait(20) == 0
        assert "Explorer closed." in process.stdout.read()
        with pytest.raises(ProcessLookupError):  # nothing of it is left, Streamlit neither
            os.killpg(process.pid, 0)
    finally:
        process.kill()
    assert not (tmp_path / ".streamlit").exists()
