"""A small run made by the real pipeline, the explorer serving it, and headless Chromium looking at it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from app import launch
from features.pipeline import run_pipeline
from features.run import Run, open_run
from sae.config import SAEConfig, TrainConfig

if TYPE_CHECKING:
    from explorer_window import Window
    from playwright.sync_api import Browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    run_pipeline(folder, TrainConfig(tokens=20_000, sae=SAEConfig(d_sae=512, k=16)))
    return folder


@pytest.fixture(scope="session")
def run(run_folder: Path) -> Run:
    """The same run, opened with the Python API."""
    return open_run(run_folder)


@pytest.fixture(scope="session")
def root(run_folder: Path) -> Iterator[str]:
    """Address of an explorer that serves the run."""
    with launch.served(run_folder) as server:
        yield f"{server.address}/"


@pytest.fixture(scope="session")
def chromium() -> "Iterator[Browser]":
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"The browser tests need one of {', '.join(BROWSERS)}: apt-get install chromium.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def window(chromium: "Browser", root: str) -> "Iterator[Callable[..., Window]]":
    """Opens tabs; at the end of the test each must be free of exceptions."""
    from explorer_window import Window

    opened: list[Window] = []

    def make(path: str = "", width: int = 1280, height: int = 900) -> Window:
        page = chromium.new_context(viewport={"width": width, "height": height}).new_page()
        opened.append(Window(page, root))
        return opened[-1].open(path)

    yield make
    for one in opened:
        one.check()
        one.page.context.close()
