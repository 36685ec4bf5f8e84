"""The script that Streamlit runs: ``streamlit run explorer_main.py -- RUN_FOLDER``. ``app.launch`` starts it."""

import sys
from pathlib import Path

# Streamlit puts this folder on the path, not the one that holds the package `app`, which is there when it is installed.
_FOLDER = Path(__file__).resolve().parent
_ROOT = str(_FOLDER.parents[1])
if _ROOT not in sys.path:
    sys.path.append(_ROOT)

import streamlit as st  # noqa: E402

from activations.errors import InputError  # noqa: E402
from app.explorer import page_feature, page_overview, page_steer, page_try_text  # noqa: E402
from app.explorer.explorer_links import follow_links  # noqa: E402
from app.explorer.explorer_state import complain, the_run  # noqa: E402
from app.explorer.explorer_style import STYLE_SHEET  # noqa: E402


def main() -> None:
    """One run of the script: the page that the address names."""
    # A named Material icon would be fetched from the network.
    st.set_page_config(
        page_title=f"SAEscope · {Path(sys.argv[1]).name}", page_icon=_FOLDER / "icon.svg", layout="wide"
    )
    st.logo(_FOLDER / "logo.svg", size="large")
    page = st.navigation(
        [
            st.Page(
                page_overview.show,
                title="Overview",
                icon=":material/scatter_plot:",
                url_path="overview",
                default=True,
            ),
            st.Page(
                page_feature.show, title="Feature", icon=":material/center_focus_strong:", url_path="feature"
            ),
            st.Page(page_try_text.show, title="Try text", icon=":material/text_fields:", url_path="try-text"),
            st.Page(page_steer.show, title="Steer", icon=":material/tune:", url_path="steer"),
        ],
        position="top",
    )
    st.html(STYLE_SHEET)
    follow_links()
    try:
        the_run()
        page.run()
    except InputError as error:
        complain(error)


main()
