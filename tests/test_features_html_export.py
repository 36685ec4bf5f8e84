"""A feature as one page: it holds everything, escapes everything, needs nothing else and stays small."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_run import SILENT, WINDOW, fake_run

from features.exchange import export
from features.html_export import features_html, histogram_svg
from features.labels import Label, Score

HOSTILE = [
    "</title><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\n",
    "&amp;",
    "🙂",
    "\x00\u202e",
    " ",
]
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps their names, addresses and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for each, value in self.attributes if each == name]


def section(page: str, feature: int) -> str:
    return page.partition(f'<section id="feature-{feature}">')[2].partition("</section>")[0]


def test_a_page_holds_everything_about_a_feature(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    scores = (
        Score("tokens", 0.93, 120, precision=0.91, recall=0.95, upper=0.97, control=0.12),
        Score("detection", 0.85, 40, 0.71, 0.92, control=0.5, judge="a judge"),
    )
    run.labels.add([Label(2, "the receiver", "llm", "a model", "explainer", scores=scores, note="see 5")])
    page = Page(features_html(run, [2]))
    for wanted in (
        *("fake: 8 features of org/tiny at blocks.3.hook_resid_post, indexed on 100,000 tokens", "Feature 2"),
        *("the receiver", "A language model's label, a model, explainer, 20", "Note: see 5"),
        *("F1 0.93", "precision 0.91", "recall 0.95", "upper half 0.97", "control 0.12", "n 120"),
        *("detection 0.85 [0.71, 0.92]", "control 0.50", "n 40", "says ‹self›"),
        *("0.25%", "one token in 400", "1.5 bits", "Strongest examples", "Near misses", "90–100%", "0–10%"),
        *("doc <7>", "Tokens it fires on", "Tokens that follow", "promoted", "suppressed", "+1.00", "-1.00"),
        *("Nearest features", "Features that fire with it", "0.50", "0.25"),
    ):
        assert wanted in page.text, wanted
    titles = page.values("title")
    assert any("judged by a judge" in title for title in titles)
    assert "what it means" in titles  # of the tag
    assert sum(title.startswith("self   4 ·") for title in titles) == 0
    assert sum(title.endswith("100% of the maximum") for title in titles) == 20  # the peaks of the strongest
    assert {"svg", "details"} <= page.names


def test_a_page_says_where_in_documents_and_at_which_left_out_positions_a_feature_fires(
    tmp_path: Path,
) -> None:
    run = fake_run(tmp_path)
    page = Page(features_html(run, [2]))
    for wanted in (
        *("Documents40first at token 12.5", "Left out1,2391,234 at special tokens5 at outlier norms"),
        *("mean 0.25", "standard deviation 0.5", "skewness -1.5", "kurtosis 7"),
    ):
        assert wanted in page.text, wanted


def test_a_silent_feature_that_fires_at_special_tokens_says_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(tmp_path)
    assert "Left out" not in Page(features_html(run, [SILENT])).text
    monkeypatch.setattr(run.index, "column", lambda name: np.full(8, 9 if name == "special" else 0))
    assert "Left out99 at special tokens0 at outlier norms" in Page(features_html(run, [SILENT])).text


def test_documents_whose_names_are_not_utf_8_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(tmp_path, name=b"r\xff".decode("utf-8", "surrogateescape"))
    example = run.index.example(7, 4.0)
    named = replace(example, document=b"caf\xe9/<x>".decode("utf-8", "surrogateescape"))
    monkeypatch.setattr(run.index, "top_examples", lambda *_: [named])
    assert export(run, tmp_path / "page.html", "html", [2]) == 1
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "caf\ufffd/<x>" in text
    assert "r\ufffd: 8 features" in text


def test_a_feature_that_has_no_other_beside_it_has_no_table_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(tmp_path, d_sae=1)
    assert run.index.neighbours(0) == run.index.coactive(0) == []
    page = Page(features_html(run, [0]))
    assert "Nearest features" not in page.text
    assert "Features that fire with it" not in page.text
    assert "Strongest examples" in page.text


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    text = features_html(fake_run(tmp_path), [1, 2, SILENT])
    page = Page(text)
    assert page.names.isdisjoint({"script", "link", "img", "iframe", "object", "base", "form"})
    assert page.values("src") == []
    assert all(address.startswith("#feature-") for address in page.values("href"))
    assert not re.search(r"url\(|@import|https?:|//", text)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "color-scheme: light dark" in text


def test_every_text_is_escaped_and_comes_back(tmp_path: Path) -> None:
    run = fake_run(tmp_path, name="</title><b>", words=HOSTILE)
    run.labels.add(
        [Label(1, "<b>bold</b> & <script>", "llm", "<i>", note="<u>", scores=(Score("fuzzing", 0.5, 2),))]
    )
    text = features_html(run, [1, 2])
    page = Page(text)
    assert page.names.isdisjoint({"script", "img", "b", "u"})
    assert not any(name.startswith("on") for name, _ in page.attributes)
    for word in ("<b>bold</b> & <script>", "<u>", "doc <7>", HOSTILE[0], HOSTILE[1], "&amp;", "🙂"):
        assert word in page.text
    assert "\x00" not in text
    assert "\u202e" not in text  # would turn the rest of the line around


def test_a_feature_that_fires_everywhere_stays_below_a_megabyte(tmp_path: Path) -> None:
    run = fake_run(tmp_path, words=["internationalisation", "🙂🙂🙂", "\n" + " " * 15, "&<>\"'&<>\"'"])
    assert len(run.index.example(0, 1.0).tokens) == WINDOW
    assert len(features_html(run, [1]).encode()) < 1_000_000


def test_wherever_a_label_is_shown_so_is_its_score(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    run.labels.put_automatic(
        [Label(f, f"label {f}", "automatic", scores=(Score("tokens", f / 10, 9),)) for f in range(4)]
    )
    run.labels.set(2, "mine")
    text = features_html(run, [0, 5])
    shown = html.unescape(re.sub(r"<[^>]*>", "", text))
    for label, score in (("label 1", "F1 0.10"), ("label 3", "F1 0.30"), ("mine", "not scored")):
        places = [match.end() for match in re.finditer(label, shown)]
        assert len(places) == 4  # near and together, of two features
        assert all(shown[place:].startswith(f" · {score}") for place in places)
    assert "no label" in section(text, 5)
    run.labels.set(5, "unscored")
    assert "not scored" in section(features_html(run, [5]), 5)


def test_a_page_of_several_has_contents_and_links_to_what_is_there(tmp_path: Path) -> None:
    page = Page(features_html(fake_run(tmp_path), [5, 2]))
    assert page.values("id") == ["feature-5", "feature-2"]
    assert set(page.values("href")) == {"#feature-5", "#feature-2"}
    assert page.values("href")[:2] == ["#feature-5", "#feature-2"]


def test_a_silent_feature_says_so(tmp_path: Path) -> None:
    page = Page(features_html(fake_run(tmp_path), [SILENT]))
    assert "never fired" in page.text
    assert "promoted" in page.text
    assert "svg" not in page.names


def test_a_histogram_draws_every_bin_between_the_first_and_the_last() -> None:
    edges = np.logspace(-2, 2, 9)
    drawing = histogram_svg(edges, np.array([0, 4, 0, 1, 2, 0, 0, 0]))
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"><title>', drawing)]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 0.25, 0.5], abs=0.01)
    assert "<title>0.0316 to 0.1: 4 firings</title>" in drawing
    lefts = [float(x) for x in re.findall(r'rect x="([\d.]+)"', drawing)]
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height', drawing)]
    assert lefts == pytest.approx([0, 180, 270])  # four equal bins of 360, one of them empty
    assert widths == pytest.approx([84.6] * 3)
    assert [">0.1<" in drawing, ">1<" in drawing] == [True, True]
    assert histogram_svg(edges, np.zeros(8, dtype=int)) == ""


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert features_html(run, [1, 2]) == features_html(run, [1, 2])
