"""Every page in a real browser: each test reads something from the page and compares it with the Python API."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import pytest

from app.explorer.page_try_text import SAMPLE
from features.demonstration import own_tokens, promoted_share
from features.html_pieces import number, percent
from features.run import Run

if TYPE_CHECKING:
    from explorer_window import Window

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

Open = Callable[..., "Window"]
HOSTILE = "<b>bold</b> **stars** :red[x] $x^2$ <img src=x onerror=alert(1)>"
ROW = 35  # height of a row of a table, in pixels


def a_feature(run: Run) -> int:
    """One that fires often enough to have everything: the one with the most firings below 5% of tokens."""
    counts = np.where(run.index.density < 0.05, run.index.count, 0)
    return int(counts.argmax())


def opened_feature(window: "Window") -> int:
    """The feature that the address names."""
    return int(parse_qs(urlsplit(window.page.url).query)["feature"][0])


def click_first_row(window: "Window") -> None:
    table = window.page.get_by_test_id("stDataFrame")
    table.scroll_into_view_if_needed()
    box = table.bounding_box()
    assert box
    window.page.mouse.click(box["x"] + 150, box["y"] + ROW + ROW / 2)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("path", ["", "feature", "try-text", "steer?features=3,5", "feature?feature=9999"])
def test_pages_fit_and_hold_no_exception(window: Open, path: str, width: int) -> None:
    page = window(path, width, 844)
    assert len(page.text) > 50
    overflow = "(e => e.scrollWidth - e.clientWidth)(document.querySelector('[data-testid=stMain]'))"
    assert page.page.evaluate(overflow) == 0


def test_overview_shows_the_evaluation(window: Open, run: Run) -> None:
    page = window()
    evaluation = run.evaluation
    for name, key in (
        ("Explained variance", "explained_variance"),
        ("CE loss recovered", "ce_loss_recovered"),
    ):
        assert page.card(name) == f"{evaluation[key]:.3f}"
        low, high = evaluation["intervals"][key]
        assert f"95%: {low:.3f} to {high:.3f}" in page.text
    assert page.card("L0") == number(evaluation["l0"])
    assert page.card("Dead features") == percent(evaluation["dead_fraction"])


def test_a_click_in_the_scatter_opens_that_feature_and_back_works(window: Open, run: Run) -> None:
    page = window("?q=fires")
    plot = page.page.locator(".js-plotly-plot").first
    plot.scroll_into_view_if_needed()
    page.page.wait_for_timeout(500)
    places = plot.evaluate(
        """plot => {
            const box = plot.getBoundingClientRect(), {xaxis, yaxis} = plot._fullLayout, found = [];
            plot._fullData.forEach(trace => Array.from(trace.x).forEach((x, i) => found.push([
                trace.customdata[i],
                box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(trace.y[i])])));
            return found;
        }"""
    )
    firing = np.flatnonzero(run.index.count)
    assert sorted(int(feature) for feature, _, _ in places) == firing.tolist()
    # The point that stands most alone, so that the click can mean no other.
    xy = np.array([place[1:] for place in places])
    distances = np.linalg.norm(xy[:, None] - xy[None], axis=2) + 1e9 * np.eye(len(xy))
    loneliest = int(distances.min(axis=1).argmax())
    page.page.mouse.move(*xy[loneliest])
    page.page.wait_for_timeout(200)
    page.page.mouse.click(*xy[loneliest])
    page.arrive("**/feature?feature=*")
    expected = int(places[loneliest][0])
    assert opened_feature(page) == expected
    assert page.card("Largest activation") == number(run.feature(expected).max)
    page.page.go_back()
    page.settle()
    assert page.page.url == page.root + "?q=fires"  # one step back, and the search is still there
    assert page.page.get_by_role("searchbox").input_value() == "fires"


def test_a_frame_in_the_scatter_lists_what_it_catches(window: Open, run: Run) -> None:
    page = window()
    plot = page.page.locator(".js-plotly-plot").first
    plot.hover()  # scrolls, and shows the tools
    box = plot.bounding_box()
    assert box
    page.page.locator('.modebar-btn[data-title="Box Select"]').first.click()
    page.page.mouse.move(box["x"] + 90, box["y"] + 60)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + box["width"] - 120, box["y"] + box["height"] - 70, steps=8)
    page.page.mouse.up()
    page.settle()
    caught = plot.evaluate(
        "plot => plot._fullData.reduce((n, trace) => n + (trace.selectedpoints || []).length, 0)"
    )
    assert caught > 10
    assert f"{caught:,} of {run.index.d_sae:,} features in the frame above" in page.text


def test_search_and_a_click_in_the_table_open_a_feature(window: Open, run: Run) -> None:
    page = window()
    feature = a_feature(run)
    label = run.labels.get(feature)
    assert label is not None
    page.page.get_by_role("searchbox").fill(label.text)
    page.page.keyboard.press("Enter")
    page.settle()
    found = set(run.index.search(label.text, n=1000)["feature"])
    assert f"{len(found):,} of {run.index.d_sae:,} features" in page.text
    click_first_row(page)
    page.arrive("**/feature?feature=*")
    assert opened_feature(page) in found


def test_a_deep_link_shows_the_feature_of_the_index(window: Open, run: Run) -> None:
    feature = run.feature(a_feature(run))
    page = window(f"feature?feature={feature.index}")
    assert page.card("Firings") == f"{feature.count:,}"
    assert page.card("Density") == percent(feature.density)
    assert page.card("Mean activation") == number(feature.mean)
    assert feature.label is not None
    assert page.page.get_by_test_id("label").inner_text() == feature.label.text
    strengths = page.page.locator(".example .strength:visible")
    assert strengths.all_inner_texts() == [number(example.value) for example in feature.top_examples()]
    page.page.get_by_role("tab", name="Across the range").click()
    page.page.wait_for_timeout(300)
    bands = [number(example.value) for _, examples in feature.range_examples() for example in examples]
    assert strengths.all_inner_texts() == bands
    histogram = page.page.locator(".js-plotly-plot").evaluate("plot => Array.from(plot._fullData[0].y)")
    assert sum(histogram) == feature.count


def test_next_previous_and_neighbours(window: Open, run: Run) -> None:
    page = window("feature?feature=20")
    page.page.get_by_role("button", name="Next").click()
    page.arrive("**/feature?feature=21")
    assert "Feature 21" in page.text
    page.page.keyboard.press("ArrowLeft")
    page.arrive("**/feature?feature=20")
    neighbour, cosine = run.feature(20).neighbours[0]
    row = page.page.locator(
        "table.bars tr", has=page.page.get_by_role("link", name=str(neighbour), exact=True)
    )
    assert f"{cosine:.2f}" in row.first.inner_text()
    page.page.evaluate("window.sameDocument = true")
    row.first.get_by_role("link").click()
    page.arrive(f"**/feature?feature={neighbour}")
    assert f"Feature {neighbour}" in page.text
    assert page.page.evaluate("window.sameDocument")  # the session goes on
    page.page.go_back()
    page.settle()
    assert "Feature 20" in page.text


def test_a_label_from_the_page_is_a_persons_label(window: Open, run: Run) -> None:
    page = window("feature?feature=30")
    automatic = run.labels.automatic(30)
    try:
        page.page.get_by_role("textbox", name="Your label").fill(HOSTILE)
        page.page.keyboard.press("Enter")
        page.settle()
        found = run.labels.get(30)
        assert found is not None
        assert (found.text, found.source) == (HOSTILE, "person")
        # Shown as it was typed, here and elsewhere, and nothing of it became an element.
        assert page.page.get_by_test_id("label").inner_text() == HOSTILE
        assert page.page.locator("[data-testid=stMain] img[src=x]").count() == 0
        if automatic is not None:
            assert f"Automatic: {automatic.text}" in page.text
        assert HOSTILE in window("steer?features=30").text
    finally:
        run.labels.set(30, "")


def test_token_text_is_no_markup(window: Open, run: Run) -> None:
    text = "<b>bold</b> & <img src=x onerror=alert(1)> $x^2$ :red[y]\n"
    trace = run.trace(text)
    feature, _, _ = trace.strongest(1, run.index.max)[0]
    page = window(f"try-text?text={quote(text)}&feature={feature}")
    tokens = page.page.locator(".panel .tokens")
    assert tokens.inner_text().replace("⏎", "").strip() == text.strip()
    assert tokens.locator("b, img").count() == 0
    activations = trace.activations(feature)
    assert tokens.locator(".t[style]").count() == int((activations != 0).sum())
    assert f"fires on {int((activations != 0).sum())} of {len(trace.tokens)} tokens" in page.text


def test_a_click_on_a_token_lists_its_features(window: Open, run: Run) -> None:
    page = window("try-text?rank=activation")
    trace = run.trace(SAMPLE)
    place = next(i for i, token in enumerate(trace.tokens) if "def" in token and trace.at(i))
    steps = page.page.evaluate("history.length")
    page.page.locator(".panel .tokens a.t").nth(place).click()
    page.arrive("**token=*")
    assert page.page.evaluate("history.length") == steps  # choosing a token is no step of the history
    expected = [f"{feature} {number(activation)}" for feature, activation in trace.at(place)]
    rows = page.page.locator("table.bars tbody tr").all()
    shown = []
    for row in rows:
        feature, activation, _ = (cell.inner_text() for cell in row.locator("td").all())
        shown.append(f"{feature.split()[0]} {activation}")
    assert shown == expected


def test_steered_and_default_text_are_the_models(window: Open, run: Run) -> None:
    feature = a_feature(run)
    query = f"features={feature}&s{feature}=1.5&prompt=import&temperature=0&tokens=12"
    page = window(f"steer?{query}")
    page.page.get_by_role("button", name="Write").click()
    page.page.get_by_test_id("steered text").wait_for(timeout=60_000)
    page.settle()
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    default = run.model.generate("import", **settings)[0]
    with run.steered({feature: 1.5}):
        steered = run.model.generate("import", **settings)[0]
    for name, text in (("default", default), ("steered", steered)):
        # Chromium drops blank lines at the end, and line ends that fire carry a sign.
        shown = page.page.get_by_test_id(f"{name} text").inner_text().replace("⏎", "")
        assert shown.rstrip() == ("import" + text).rstrip()
    share = promoted_share(run.model, steered, own_tokens(run.index, feature))
    row = page.page.locator("table.bars tbody tr").inner_text()
    assert re.findall(r"[\d.]+%", row)[-1] == percent(share)


def test_steer_adds_and_removes_features_in_the_address(window: Open, run: Run) -> None:
    page = window("steer?features=3")
    page.page.get_by_role("textbox", name="Add a feature").fill("17")
    page.page.keyboard.press("Enter")
    page.settle()
    page.page.locator("a.go", has_text="+ 17 ").click()
    page.arrive("**features=3%2C17*")
    assert page.page.get_by_test_id("stSlider").count() == 2
    page.page.get_by_text("remove", exact=True).first.click()
    page.arrive("**features=17*")
    assert page.page.get_by_test_id("stSlider").count() == 1
