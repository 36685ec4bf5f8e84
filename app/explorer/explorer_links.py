"""Going from page to page inside one session, with one step of the browser's history for one step of the reader.

Streamlit's own ``switch_page`` and ``page_link`` with a query leave a stray history entry that shows the old page
with the new page's query. Links here are plain HTML (they open in a new tab, and work without any script); a small
component catches clicks on them, pushes the address, and lets Streamlit follow it as it follows Back and Forward.
"""

from collections.abc import Mapping
from html import escape
from urllib.parse import urlencode

import streamlit as st

_ROUTER_JS = """
function follow(address) {
  const target = new URL(address, document.baseURI);
  if (target.href === window.location.href) return;
  window.history.pushState({}, "", target.href);
  window.dispatchEvent(new PopStateEvent("popstate"));
}

// A choice on the page itself: changes parameters of the address, and is no step of the history.
function pick(choices) {
  const target = new URL(window.location.href);
  for (const [name, value] of new URLSearchParams(choices)) {
    if (value === "") target.searchParams.delete(name);
    else target.searchParams.set(name, value);
  }
  window.history.replaceState({}, "", target.href);
  window.dispatchEvent(new PopStateEvent("popstate"));
}

function onClick(event) {
  const link = event.target.closest && event.target.closest("a.go");
  const wantsNewTab = event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey;
  if (!link || wantsNewTab) return;
  event.preventDefault();
  event.stopPropagation();
  if (link.dataset.pick !== undefined) pick(link.dataset.pick);
  else follow(link.href);
}

export default function (component) {
  if (!window.saescopeRouter) {
    window.saescopeRouter = { last: null };
    document.addEventListener("click", onClick, true);
  }
  const order = component.data;
  if (order && order.address && order.number !== window.saescopeRouter.last) {
    window.saescopeRouter.last = order.number;
    follow(order.address);
  }
}
"""

_router = st.components.v2.component("saescope_router", js=_ROUTER_JS)


def address(page: str, **query: object) -> str:
    """Relative address of a page (``"feature"``, ``"try-text"``, ``"steer"``) with a query; None values left out."""
    given = {name: str(value) for name, value in query.items() if value is not None}
    return f"{page}?{urlencode(given)}" if given else page


def feature_address(feature: int) -> str:
    """Address of a feature's page."""
    return address("feature", feature=feature)


def link(to: str, text: str, *, title: str = "", classes: str = "") -> str:
    """An HTML link that stays in this session; ``text`` is escaped here."""
    attributes = f'class="go {escape(classes)}" href="{escape(to)}" target="_self" title="{escape(title)}"'
    return f"<a {attributes}>{escape(text)}</a>"


def pick(choices: Mapping[str, object], html: str, *, title: str = "", classes: str = "") -> str:
    """An HTML link that changes parameters of this page's address and keeps the others.

    Args:
        choices: parameter → value; None takes the parameter away.
        html: what the link shows, which its maker has escaped.
    """
    query = urlencode({name: "" if value is None else str(value) for name, value in choices.items()})
    return (
        f'<a class="go {escape(classes)}" href="?{escape(query)}" data-pick="{escape(query)}" target="_self"'
        f' title="{escape(title)}">{html}</a>'
    )


def follow_links() -> None:
    """Make the links of this page stay in the session; once per page."""
    _router(data={}, key="links", height="content")


def go(to: str) -> None:
    """Leave for ``to`` as if a link had been clicked: for clicks that reach Python, in charts and tables."""
    number = st.session_state["steps"] = st.session_state.get("steps", 0) + 1
    _router(data={"address": to, "number": number}, key="leave", height="content")
