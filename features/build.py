"""Building a feature index: one pass over the text, all features at once.

Every chunk of firings goes to four accumulators (statistics, strongest examples, a fair sample, tokens), each
of which works on all features by sorting and never loops over them. Nothing dense in features × positions is
made, and memory does not grow with the text, except for the (feature, token) pairs that occur.
"""

import io
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from activations.blocks import TokenBlocks
from activations.errors import InputError
from activations.files import (
    MANIFEST,
    is_finished,
    new_folder,
    read_manifest,
    room_needed,
    write_bytes,
    write_manifest,
)
from activations.models import LanguageModel
from activations.progress import Progress, silent
from activations.store import HookActivations
from activations.strings import StringTable
from features.examples import ExampleTable, quantile_bands, sampling_rank, strength_rank
from features.firings import Firings, stream_firings
from features.index import FeatureIndex
from features.layout import KIND, LENS_TOKENS, NEIGHBOURS, PER_BAND, TOP_EXAMPLES, TOP_TOKENS
from features.lens import decoder_neighbours, logit_lens
from features.statistics import HISTOGRAM_EDGES, ActivationStatistics
from features.token_counts import TokenCounts
from sae.model import SparseAutoencoder, check_belongs

SAMPLE = 64
"""Firings of each feature in the fair sample: some 13 for each quantile band, of which PER_BAND are kept."""
_RESIDUAL = re.compile(r"hook_(resid_(pre|mid|post)|attn_out|mlp_out)$")
"""Hooks whose vectors are (added to) the residual stream, which the unembedding reads."""


def build_index(
    model: LanguageModel,
    sae: SparseAutoencoder,
    blocks: TokenBlocks,
    folder: str | Path,
    *,
    activations: HookActivations | None = None,
    inputs: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> FeatureIndex:
    """Index all features of ``sae`` over ``blocks`` into ``folder``; if that is done already, open it.

    An index made from other inputs is replaced; one that is interrupted leaves ``folder`` as it was.

    Args:
        activations: a store that begins with these blocks, read instead of running the model.
        inputs: further facts that decide whether an index on disk is the one asked for.

    Raises:
        InputError: model, SAE, blocks and store do not belong together, ``folder`` holds something else, no
            position counts, or the disk is full.
    """
    folder = Path(folder)
    _check_belongs(model, sae, blocks, activations)
    bounds = {hook_name: rule.max_norm for hook_name, rule in sae.exclusions(model.tokenizer).items()}
    max_norm, max_norm_out = (
        bound if np.isfinite(bound) else None for bound in (bounds[sae.hook_name], bounds[sae.hook_out])
    )
    described = {
        "sae_hash": sae.hash,
        "architecture": sae.config.architecture,
        "k": sae.config.k,
        "model_hash": model.hash,
        "tokenizer_hash": model.tokenizer.hash,
        "blocks_hash": blocks.hash,
        "hook_name": sae.hook_name,
        "max_norm": max_norm,
        **({"hook_name_out": sae.hook_out, "max_norm_out": max_norm_out} if sae.config.transcoder else {}),
        **(inputs or {}),
    }
    if is_finished(folder, KIND, described):
        return FeatureIndex.open(folder)
    _check_replaceable(folder)
    vocabulary = model.tokenizer.vocabulary()
    accumulators = _Accumulators(sae.d_sae, len(vocabulary), blocks)
    stream = stream_firings(model, sae, blocks, activations)
    with progress("index", total=blocks.ids.size, unit="tokens") as step, closing(stream):
        for firings, n_blocks in stream:
            accumulators.add(firings)
            step(n_blocks * blocks.context_length)
    if accumulators.n_positions == 0:
        raise InputError("The text holds special tokens only, and no feature fires there: give other text.")
    lens = _lens_arrays(model, sae)
    arrays = {
        **accumulators.arrays(),
        **lens,
        **_neighbour_arrays(sae),
        **_text_arrays(blocks, vocabulary),
    }
    facts = {
        "n_tokens": accumulators.n_positions,
        "d_sae": sae.d_sae,
        "logit_lens": bool(lens),
        "split": blocks.split,
        "packing": blocks.packing,
        "bos": blocks.bos,
    }
    megabytes = sum(array.nbytes for array in arrays.values()) / 1e6
    no_space = (
        f"The disk has too little room for the feature index in {folder}, {megabytes:,.1f} MB: free some, or"
        " choose a folder on another disk."
    )
    with room_needed(no_space), new_folder(folder) as new:
        for name, array in arrays.items():
            # By way of a buffer: numpy's own writing to files does not say why it failed.
            buffer = io.BytesIO()
            np.save(buffer, array)
            write_bytes(new / f"{name}.npy", buffer.getvalue())
        write_manifest(new, KIND, described, **facts)
    return FeatureIndex.open(folder)


class _Accumulators:
    """Everything that is summed or chosen while the text streams by."""

    def __init__(self, d_sae: int, d_vocab: int, blocks: TokenBlocks) -> None:
        self.n_positions = 0
        self.statistics = ActivationStatistics(d_sae)
        self.strongest = ExampleTable(d_sae, TOP_EXAMPLES, one_per_document=True)
        self.sample = ExampleTable(d_sae, SAMPLE, one_per_document=False)
        self.tokens = TokenCounts(d_sae, d_vocab)
        self.vocabulary_count = np.zeros(d_vocab, dtype=np.int64)
        self._ids = blocks.ids.reshape(-1)
        self._documents = blocks.documents.reshape(-1)

    def add(self, firings: Firings) -> None:
        """Take the next stretch of text."""
        self.n_positions += len(firings.kept)
        self.vocabulary_count += np.bincount(self._ids[firings.kept], minlength=len(self.vocabulary_count))
        self.statistics.add(firings.feature, firings.value)
        document = self._documents[firings.position]
        self.strongest.add(firings, strength_rank(firings.value), document)
        self.sample.add(firings, sampling_rank(firings.feature, firings.position), document)
        self.tokens.add(firings.feature, self._ids[firings.position].astype(np.int64), firings.value)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is kept of it, by file name; see :mod:`features.layout`."""
        statistics = self.statistics
        tokens = self.tokens.top(TOP_TOKENS)
        bands = quantile_bands(self.sample.table, statistics.histogram, PER_BAND)
        position_dtype = np.int32 if len(self._ids) < 1 << 31 else np.int64
        arrays: dict[str, np.ndarray] = {
            "count": statistics.count,
            "mean": statistics.mean.astype(np.float32),
            "std": statistics.std.astype(np.float32),
            "max": statistics.max,
            "histogram": statistics.histogram.astype(np.uint32),
            "histogram_edges": HISTOGRAM_EDGES,
            "token_id": tokens.token,
            "token_count": tokens.firings.astype(np.uint32),
            "token_mean": tokens.mean,
            "vocabulary_count": self.vocabulary_count,
        }
        for group, table in (("top", self.strongest.table), ("range", bands)):
            arrays[f"{group}_position"] = table["position"].astype(position_dtype)
            for name in ("value", "scale", "window"):
                arrays[f"{group}_{name}"] = np.ascontiguousarray(table[name])
        return arrays


def _lens_arrays(model: LanguageModel, sae: SparseAutoencoder) -> dict[str, np.ndarray]:
    """The logit lens; nothing where features write off the residual stream or the final norm is not known."""
    if not _RESIDUAL.search(sae.hook_out) or sae.d_out != model.d_model:
        return {}
    try:
        gain, W_U = model.logit_lens_weights()
    except InputError:
        return {}
    lens = logit_lens(sae.W_dec, gain, W_U, LENS_TOKENS)
    return {
        "promoted_id": lens.promoted.numpy().astype(np.int32),
        "promoted_logit": lens.promoted_logit.numpy(),
        "suppressed_id": lens.suppressed.numpy().astype(np.int32),
        "suppressed_logit": lens.suppressed_logit.numpy(),
    }


def _neighbour_arrays(sae: SparseAutoencoder) -> dict[str, np.ndarray]:
    neighbours = decoder_neighbours(sae.W_dec, NEIGHBOURS)
    return {
        "neighbour_id": neighbours.feature.numpy().astype(np.int32),
        "neighbour_cosine": neighbours.cosine.numpy(),
    }


def _text_arrays(blocks: TokenBlocks, vocabulary: list[str]) -> dict[str, np.ndarray]:
    documents = blocks.documents.reshape(-1)
    run_start = np.flatnonzero(np.diff(documents, prepend=documents[:1] - 1))
    words, names = StringTable.of(vocabulary), StringTable.of(blocks.names)
    return {
        "ids": blocks.ids,
        "run_start": run_start,
        "run_document": documents[run_start],
        "vocabulary": words.text,
        "vocabulary_offsets": words.offsets,
        "documents": names.text,
        "documents_offsets": names.offsets,
    }


def _check_belongs(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, store: HookActivations | None
) -> None:
    check_belongs(model, sae)
    if store is None:
        return
    if store.hook_name != sae.hook_name:
        raise InputError(
            f"{store.folder} holds activations of {store.hook_name}, and the SAE reads {sae.hook_name}:"
            " give a store of that hook."
        )
    n, held = blocks.n_blocks, store.blocks
    same_ids = np.array_equal(held.ids[:n], blocks.ids)
    if not same_ids or not np.array_equal(held.documents[:n], blocks.documents):
        raise InputError(f"{store.folder} holds activations of other text than the index is to be made of.")


def _check_replaceable(folder: Path) -> None:
    """Refuse to put an index in the place of anything but an index."""
    if (folder / MANIFEST).is_file():
        read_manifest(folder, KIND)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something other than a feature index: give an empty or new folder.")
