"""``python -m app.cli``: the command without its script."""

from app.cli import main

main()
