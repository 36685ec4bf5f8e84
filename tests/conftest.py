"""Options and settings that all tests share."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the tests keep in the cache goes with them."""
    os.environ["SAESCOPE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch computes on two threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--browser", action="store_true", help="run the tests that drive headless Chromium")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in ("slow", "gpu"):
        if marker not in config.option.markexpr:
            marked = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if item not in marked]
    for item in items:
        if item.get_closest_marker("browser") and not config.getoption("--browser"):
            item.add_marker(pytest.mark.skip(reason="drives headless Chromium: run with --browser"))


def pytest_configure(config: pytest.Config) -> None:
    # Tests work on tiny tensors, where threads only wait for each other.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
