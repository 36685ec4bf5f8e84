"""One tab of a browser on the explorer, as the tests use it."""

from urllib.parse import urlsplit

from playwright.sync_api import ConsoleMessage, Page, Request

from app.launch import HOST

# Streamlit looks for its server under the page's own path first.
HARMLESS = ("status of 404", "GL Driver Message")
READY = (
    '[data-testid="stApp"][data-test-script-state="notRunning"][data-test-connection-state="CONNECTED"]'
    ':has([data-testid="stMain"] .stHtml)'
)


class Window:
    """One tab on the explorer."""

    def __init__(self, page: Page, root: str) -> None:
        self.page, self.root = page, root
        self.complaints: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._watch)

    def open(self, path: str = "") -> "Window":
        """Go to an address, as on a fresh session."""
        self.page.goto(self.root + path)
        return self.settle()

    def settle(self) -> "Window":
        """Wait until the script has run, whatever was asked of it just before."""
        self.page.wait_for_timeout(150)
        self.page.wait_for_selector(READY, timeout=60_000)
        self.page.wait_for_timeout(150)
        self.page.wait_for_selector(READY, timeout=60_000)
        return self

    def arrive(self, address: str) -> "Window":
        """Wait for an address (a pattern), then for its page."""
        self.page.wait_for_url(address, timeout=30_000)
        return self.settle()

    @property
    def text(self) -> str:
        """Everything that can be read on the page."""
        return self.page.get_by_test_id("stMain").inner_text()

    def card(self, name: str) -> str:
        """The value on the card of this name."""
        return (
            self.page.locator(".card", has=self.page.get_by_text(name, exact=True))
            .locator(".value")
            .inner_text()
        )

    def check(self) -> None:
        """No exception on the page, none in the console, nothing asked of the network."""
        shown = [box.inner_text() for box in self.page.query_selector_all('[data-testid="stException"]')]
        assert not shown + self.complaints

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(words in message.text for words in HARMLESS):
            self.complaints.append(message.text)

    def _watch(self, request: Request) -> None:
        if urlsplit(request.url).hostname not in (HOST, None):
            self.complaints.append(f"asked the network for {request.url}")
