"""Where in a document a feature first fires, and how often at the start of one: is it about position?"""

from collections.abc import Mapping

import numpy as np

from activations.blocks import PADDING
from features.firings import Firings


class Places:
    """Counts of documents and of firings at the start, as firings pass by.

    Attributes:
        documents: int64 ``[d_sae]``, documents in which a feature fires.
        first_total: int64 ``[d_sae]``, Σ over these of the place of its first firing there, in tokens of the document.
        starts: int64 ``[d_sae]``, firings at the first position that counts of a block or of a document.
    """

    _ARRAYS = ("documents", "first_total", "starts", "_fired_in_last", "_first_place")

    def __init__(self, d_sae: int, document_of: np.ndarray, context_length: int) -> None:
        """document_of: int32 ``[n_positions]``, the document of every position of the text."""
        self._document_of = document_of
        self._context_length = context_length
        self.documents = np.zeros(d_sae, dtype=np.int64)
        self.first_total = np.zeros(d_sae, dtype=np.int64)
        self.starts = np.zeros(d_sae, dtype=np.int64)
        # A document may go on in the next stretch of text: there it is not counted again.
        self._last = PADDING
        self._fired_in_last = np.zeros(d_sae, dtype=bool)
        # The same for a document that began before the first stretch, whose beginning another process has read.
        self._first = PADDING
        self._first_place = np.full(d_sae, -1, dtype=np.int64)

    def add(self, firings: Firings, document: np.ndarray, document_start: np.ndarray) -> None:
        """Count firings.

        Args:
            document: int32 ``[m]``, of each firing. document_start: int64, the first position of every document.
        """
        if not len(firings.kept):
            return
        kept_document = self._document_of[firings.kept]
        if self._first == PADDING:
            self._first = int(kept_document[0])
        begins = np.ones(len(firings.kept), dtype=bool)  # a stretch of text begins with a block
        begins[1:] = kept_document[1:] != kept_document[:-1]
        begins[1:] |= np.diff(firings.kept // self._context_length) != 0
        at_start = firings.among(firings.kept[begins])
        d_sae = len(self.starts)
        self.starts += np.bincount(firings.feature[at_start], minlength=d_sae)

        is_first = np.ones(len(document), dtype=bool)
        is_first[1:] = (document[1:] != document[:-1]) | (firings.feature[1:] != firings.feature[:-1])
        is_first &= ~((document == self._last) & self._fired_in_last[firings.feature])
        feature, owner = firings.feature[is_first], document[is_first]
        place = firings.position[is_first] - document_start[owner]
        self.documents += np.bincount(feature, minlength=d_sae)
        np.add.at(self.first_total, feature, place)
        in_first = owner == self._first
        self._first_place[feature[in_first]] = place[in_first]
        last = int(kept_document[-1])
        if last != self._last:
            self._last = last
            self._fired_in_last[:] = False
        self._fired_in_last[firings.feature[document == last]] = True

    def merge(self, later: "Places") -> None:
        """Add what another process counted on the text behind."""
        if later._first == PADDING:
            return
        self.documents += later.documents
        self.first_total += later.first_total
        self.starts += later.starts
        if later._first == self._last:
            twice = self._fired_in_last & (later._first_place >= 0)
            self.documents[twice] -= 1
            self.first_total[twice] -= later._first_place[twice]
        if self._first == PADDING:
            self._first, self._first_place = later._first, later._first_place.copy()
        went_on = later._last == self._last
        self._fired_in_last = later._fired_in_last | (self._fired_in_last & went_on)
        self._last = later._last

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that it holds, by name."""
        ends = np.array([self._first, self._last])
        return {"ends": ends, **{name.lstrip("_"): getattr(self, name) for name in self._ARRAYS}}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`arrays` gave."""
        self._first, self._last = (int(end) for end in arrays["ends"])
        for name in self._ARRAYS:
            setattr(self, name, np.array(arrays[name.lstrip("_")]))
