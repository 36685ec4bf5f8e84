"""The explorer: Streamlit pages over one run folder. Nothing is computed here that ``features`` does not compute."""
