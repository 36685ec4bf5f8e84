"""Labels and features to and from files that other programs read: one module per format."""

from features.exchange.exporting import Target, export
from features.exchange.importing import import_labels

__all__ = ["Target", "export", "import_labels"]
