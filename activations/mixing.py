"""Which tokens of which documents, in what order: even shares first, and sources in proportion to their weights."""

from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from activations.packing import TokenDocument
from activations.sources.documents import Documents
from activations.tokenising import Tokenising

BYTES_PER_TOKEN = 4  # of English text and of code, about


def first_share(n_tokens: int, n_documents: int, context_length: int) -> int:
    """How many tokens a document gives at first: half as much again as its even share of ``n_tokens``."""
    return max(4 * context_length, 3 * n_tokens // (2 * max(n_documents, 1)))


def expected_bytes(documents: Documents, places: np.ndarray, limit: int, n_tokens: int) -> int:
    """About how many bytes are read for ``n_tokens`` tokens, where each document gives ``limit`` at most."""
    if not len(places):
        return 0
    total = int(documents.table["length"][places].sum())
    mean = total / len(places)
    return int(min(total, mean * n_tokens / min(mean / BYTES_PER_TOKEN, limit)))


def capped(
    documents: Documents, tokenising: Tokenising, places: np.ndarray, limit: int, *, rests: bool
) -> Iterator[TokenDocument]:
    """Each document up to ``limit`` tokens; with ``rests``, then what was cut off of them."""
    cut = array("q")
    for place, ids, counted in tokenising.read(places):
        yield TokenDocument(documents.name(place), ids[:limit], None if counted is None else counted[:limit])
        if len(ids) > limit:
            cut.append(place)
    if rests and cut:
        for place, ids, counted in tokenising.read(np.frombuffer(cut, dtype=np.int64)):
            rest = None if counted is None else counted[limit:]
            yield TokenDocument(documents.name(place), ids[limit:], rest)


def mixed(
    streams: Sequence[Iterator[TokenDocument]],
    weights: Sequence[float],
    overhead: int,
    ran_out: Callable[[int, int], None],
) -> Iterator[TokenDocument]:
    """Documents of all streams, each time of the one that is furthest behind its share of the tokens.

    overhead: tokens that every document costs besides its own.
    ran_out: told (stream, its tokens) when one ends before the caller has enough.
    """
    given = [0] * len(streams)
    going = list(range(len(streams)))
    while going:
        behind = min(going, key=lambda stream: given[stream] / weights[stream])
        document = next(streams[behind], None)
        if document is None:
            going.remove(behind)
            ran_out(behind, given[behind])
        else:
            given[behind] += len(document.ids) + overhead
            yield document
