"""What lies in the folder of a feature index; read without torch and without the model.

Two files hold what is known of each feature, one record per feature, so that a feature's page costs one read
however many features there are:

* ``columns.npy``: COLUMNS, the numbers that are compared over all features;
* ``features.npy``: :func:`feature_record`, everything else that its firings tell.

What follows from the weights alone lies in a folder of its own (:mod:`features.weights`), and beside the records lies
the text: ``ids.npy`` ``[n_blocks, context_length]``, ``counted.npy`` of that shape where not every token counts, and
``text.safetensors`` with ``run_start`` and ``run_document``, runs of positions of one document (-1 is padding);
``vocabulary_count``, how often each token stands where positions count; ``vocabulary`` and ``documents`` (and
``…_offsets``), see :class:`activations.strings.StringTable`.

A position is block · context_length + place in the block; an unused place has position or id -1.
"""

import numpy as np

KIND = "feature index"
LAYOUT = 4
"""Grows when the files change; an index of another layout is built again."""

TOP_EXAMPLES = 20
N_BANDS = 10
PER_BAND = 3
NEAR_MISSES = 10
TOP_TOKENS = 20
NEXT_TOKENS = 10
COACTIVE = 32

WINDOW = 64
"""Positions around an example of which the activations are kept."""
WINDOW_BEFORE = 40
"""How many of them lie before the example: the model has read those, so they explain it."""
QUANTA = 255
"""A window's activations are kept as one byte each, in units of the largest of them / QUANTA."""

BINS_PER_DECADE = 10
LOWEST_EXPONENT, HIGHEST_EXPONENT = -3, 5
N_BINS = BINS_PER_DECADE * (HIGHEST_EXPONENT - LOWEST_EXPONENT)

COLUMNS = np.dtype(
    [
        ("count", np.int64),  # positions at which the feature fires
        ("mean", np.float32),  # of its activations, over firings
        ("std", np.float32),
        ("max", np.float32),
        ("entropy", np.float32),  # bits, of the tokens it fires on
        ("documents", np.int32),  # in which it fires
        ("first_place", np.float32),  # mean over these of the place of its first firing there, in tokens
        ("starts", np.int32),  # firings at the first position that counts of a block or document
        # The next three whether training left those positions out or not; how many were left out says the fourth.
        ("bos", np.int32),  # firings at the beginning-of-text token
        ("special", np.int32),  # at any special token
        ("outlier", np.int32),  # where the norm is far above the usual
        ("left_out", np.int32),  # firings that count nowhere else
        ("sampled", np.int32),  # firings among the positions that co-activation was counted on
        ("tags", np.uint32),  # see features.tags
    ]
)

FEATURES, ALL_COLUMNS, IDS, COUNTED = "features.npy", "columns.npy", "ids.npy", "counted.npy"
TEXT = "text.safetensors"
TEXT_ARRAYS = (
    *("run_start", "run_document", "vocabulary_count"),
    *("vocabulary", "vocabulary_offsets", "documents", "documents_offsets"),
)


def feature_record(n_positions: int) -> np.dtype:
    """The record of a feature, for a text of so many positions.

    ``top_…`` are the strongest firings, at most one per document; ``range_…`` a fair sample of firings from each decile
    of them by activation, the weakest first; ``miss_…`` positions of its tokens where it is silent. ``…_position`` is
    where the example is, ``…_value`` its activation, ``…_window`` the activations around it in units of the window's
    largest / QUANTA, ``…_scale`` that largest one.
    """
    place = np.int32 if n_positions < 1 << 31 else np.int64
    bands = (N_BANDS, PER_BAND)
    return np.dtype(
        [
            ("histogram", np.uint32, N_BINS),
            ("token_id", np.int32, TOP_TOKENS),  # tokens with the largest Σ activation
            ("token_count", np.uint32, TOP_TOKENS),
            ("token_mean", np.float16, TOP_TOKENS),
            ("next_id", np.int32, NEXT_TOKENS),  # tokens that follow its firings most often
            ("next_count", np.uint32, NEXT_TOKENS),
            ("coactive_id", np.int32, COACTIVE),  # features that fire at the same positions
            ("coactive_count", np.uint16, COACTIVE),  # at so many of the sampled positions
            ("coactive_sampled", np.uint16, COACTIVE),  # at how many of them those features fire
            ("top_position", place, TOP_EXAMPLES),
            ("top_value", np.float32, TOP_EXAMPLES),
            ("top_scale", np.float32, TOP_EXAMPLES),
            ("top_window", np.uint8, (TOP_EXAMPLES, WINDOW)),
            ("range_position", place, bands),
            ("range_value", np.float32, bands),
            ("range_scale", np.float32, bands),
            ("range_window", np.uint8, (*bands, WINDOW)),
            ("miss_position", place, NEAR_MISSES),
            ("miss_scale", np.float32, NEAR_MISSES),
            ("miss_window", np.uint8, (NEAR_MISSES, WINDOW)),
        ]
    )
