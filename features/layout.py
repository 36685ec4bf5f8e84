"""What lies in the folder of a feature index; read without torch and without the model.

Every array is a flat ``.npy`` file that is memory-mapped, so that opening costs milliseconds however many
features there are. An unused place has position or id -1. Positions are block · context_length + place in the
block. A ``top_`` array is ``[d_sae, TOP_EXAMPLES]``, a ``range_`` array ``[d_sae, N_BANDS, PER_BAND]``.

======================================  ==============================================================
count                                   int64 [d_sae]: positions at which the feature fires
mean, std, max                          float32 [d_sae]: of its activations, over firings
histogram                               uint32 [d_sae, n_bins]: firings by activation
histogram_edges                         float32 [n_bins + 1]: see :mod:`features.statistics`
top_…                                   the strongest firings, at most one per document
range_…                                 firings from each quantile band, the weakest band first
  …position                             int32 (int64 where needed): where the example is
  …value                                float32: its activation
  …scale                                float32: the largest activation in its window
  …window                               uint8 […, WINDOW]: activations around it, in scale / QUANTA
token_id                                int32 [d_sae, TOP_TOKENS]: tokens with the largest Σ activation
token_count, token_mean                 uint32, float32: firings at that token, and their mean activation
vocabulary_count                        int64 [d_vocab]: how often each token stands where positions count
promoted_id, suppressed_id              int32 [d_sae, LENS_TOKENS]: logit lens, highest and lowest
promoted_logit, suppressed_logit        float32 (these four are absent where the logit lens means nothing)
neighbour_id, neighbour_cosine          int32, float32 [d_sae, NEIGHBOURS]: nearest decoder rows
ids                                     uint16 or int32 [n_blocks, context_length]: the text
run_start, run_document                 int64, int32: runs of positions of one document; -1 is padding
vocabulary, documents (and _offsets)    uint8, int64: see :class:`activations.strings.StringTable`
======================================  ==============================================================
"""

KIND = "feature index"

TOP_EXAMPLES = 20
N_BANDS = 5
PER_BAND = 6
TOP_TOKENS = 20
LENS_TOKENS = 20
NEIGHBOURS = 20

WINDOW = 64
"""Positions around an example of which the activations are kept."""
WINDOW_BEFORE = 40
"""How many of them lie before the example: the model has read those, so they explain it."""
QUANTA = 255
"""A window's activations are kept as one byte each, in units of the largest of them / QUANTA."""

EXAMPLE_ARRAYS = ("position", "value", "scale", "window")
LENS_ARRAYS = ("promoted_id", "promoted_logit", "suppressed_id", "suppressed_logit")
ARRAYS = (
    *("count", "mean", "std", "max", "histogram", "histogram_edges"),
    *(f"top_{name}" for name in EXAMPLE_ARRAYS),
    *(f"range_{name}" for name in EXAMPLE_ARRAYS),
    *("token_id", "token_count", "token_mean", "vocabulary_count", "neighbour_id", "neighbour_cosine"),
    *("ids", "run_start", "run_document"),
    *("vocabulary", "vocabulary_offsets", "documents", "documents_offsets"),
)
"""Arrays that every index has."""
