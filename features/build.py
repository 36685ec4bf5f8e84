"""Building a feature index: one pass over the text, all features at once.

Every chunk of firings goes to :class:`features.gathering.Gathering`, which works on all features by sorting and never
loops over them. Nothing dense in features × positions is made, and memory does not grow with the text. What is gathered
is saved every :data:`SAVE_EVERY` positions, so that a killed pass goes on where it was saved; several processes
(``torchrun``) read a part of the text each.
"""

import shutil
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from activations.blocks import TokenBlocks
from activations.capture import in_order
from activations.errors import InputError
from activations.files import (
    MANIFEST,
    is_finished,
    link_folder,
    new_folder,
    read_manifest,
    room_needed,
    write_manifest,
)
from activations.models import LanguageModel
from activations.processes import Processes, started_processes
from activations.progress import Progress, silent
from activations.store import HookActivations
from activations.strings import StringTable
from features.coactive import jaccard
from features.examples import feature_blocks, quantile_bands
from features.firings import Firings, stream_firings, usual_outlier_norm
from features.gathering import STATE, Gathering
from features.groups import group_starts, run_starts
from features.index import FeatureIndex
from features.layout import (
    ALL_COLUMNS,
    COACTIVE,
    COLUMNS,
    COUNTED,
    FEATURES,
    IDS,
    KIND,
    LAYOUT,
    NEAR_MISSES,
    NEXT_TOKENS,
    PER_BAND,
    TEXT,
    TOP_TOKENS,
    feature_record,
)
from features.pair_counts import Tally, best_pairs
from features.records import write_array, write_arrays, write_records
from features.statistics import HISTOGRAM_EDGES
from features.tags import tag_bits
from features.weights import WeightIndex, build_weights
from sae.memory import keep_freed_memory
from sae.model import SparseAutoencoder, check_belongs

SAVE_EVERY = 1 << 20
"""Positions between two saved states."""
_FEATURES_IN_HAND, _WRITING_THREADS = 2048, 8
WEIGHTS_FOLDER = "weights"
"""The folder of the weight index inside that of the index."""


def build_index(
    model: LanguageModel,
    sae: SparseAutoencoder,
    blocks: TokenBlocks,
    folder: str | Path,
    *,
    activations: HookActivations | None = None,
    inputs: Mapping[str, Any] | None = None,
    weights_folder: Path | None = None,
    processes: Processes | None = None,
    progress: Progress = silent,
) -> FeatureIndex:
    """Index all features of ``sae`` over ``blocks`` into ``folder``; if that is done already, open it.

    An index made from other inputs is replaced; until the new one is whole, ``folder`` stays as it was. What is not
    finished lies in ``folder.partial``, and the same call goes on with it.

    Args:
        activations: a store that begins with these blocks, read instead of running the model.
        inputs: further facts that decide whether an index on disk is the one asked for.
        weights_folder: where what the weights tell lies, or is to lie, for other indices of this SAE too.
        processes: those that share the work; by default those that ``torchrun`` started.

    Raises:
        InputError: model, SAE, blocks and store do not belong together, ``folder`` holds something else, no
            position counts, or the disk is full.
    """
    folder = Path(folder)
    _check_belongs(model, sae, blocks, activations)
    described = _described(model, sae, blocks, inputs or {})
    partial = folder.with_name(f"{folder.name}.partial")
    processes = processes or started_processes()
    if is_finished(folder, KIND, described):
        if processes.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # a kill in the last moment may have left it
        return FeatureIndex.open(folder)
    _check_replaceable(folder)
    keep_freed_memory()
    job = _Job(model, sae, blocks, activations, described, partial, processes, progress)
    lock = FileLock(folder.with_name(f".lock-{folder.name}"), timeout=0)
    no_space = (
        f"The disk has too little room for the feature index in {folder},"
        f" about {sae.d_sae * _bytes_per_feature(blocks) / 1e6:,.1f} MB: free some, or choose a folder on another disk."
    )
    with room_needed(no_space), ExitStack() as held:
        if processes.rank == 0:
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(lock)
            except Timeout:
                raise InputError(f"Another command is building {folder}: wait for it.") from None
            weights = build_weights(model, sae, weights_folder or partial / WEIGHTS_FOLDER, progress=progress)
        gathered = job.gather()
        processes.wait()  # until all have saved what they gathered
        if processes.rank == 0:
            for rank in range(1, processes.size):
                gathered.merge(job.of_rank(rank))
            if gathered.n_positions == 0:
                raise InputError(
                    "The text holds special tokens only, and no feature fires there: give other text."
                )
            _write(folder, job, gathered, weights)
            shutil.rmtree(partial, ignore_errors=True)
        processes.wait()
    return FeatureIndex.open(folder)


@dataclass
class _Job:
    """What one process has to do, and where."""

    model: LanguageModel
    sae: SparseAutoencoder
    blocks: TokenBlocks
    activations: HookActivations | None
    described: dict[str, Any]
    partial: Path
    processes: Processes
    progress: Progress

    def gather(self) -> Gathering:
        """Read this process's part of the text, or what is left of it."""
        rank, size = self.processes.rank, self.processes.size
        bounds = [self.blocks.n_blocks * r // size for r in (rank, rank + 1)]
        gathered, start = self._resumed(rank, *bounds)
        n_tokens = (bounds[1] - start) * self.blocks.context_length
        stream = stream_firings(
            self.model,
            self.sae,
            self.blocks,
            self.activations,
            start=start,
            stop=bounds[1],
            outlier_norm=usual_outlier_norm(self.model, self.sae, self.blocks, self.activations),
        )

        def take(firings: Firings, n_blocks: int | None) -> None:
            if n_blocks is not None:
                gathered.save(self._inputs(rank), n_blocks)
            gathered.add(firings)

        unsaved = 0
        # While one stretch of text is encoded, what the one before it told is taken in.
        with (
            self.progress("index", total=n_tokens, unit="tokens") as step,
            closing(stream),
            ThreadPoolExecutor(1) as beside,
        ):
            waiting: Future[None] | None = None
            for firings, n_blocks in stream:
                if waiting is not None:
                    waiting.result()
                save = unsaved >= SAVE_EVERY
                waiting = beside.submit(take, firings, start if save else None)
                unsaved = 0 if save else unsaved
                start += n_blocks
                unsaved += n_blocks * self.blocks.context_length
                step(n_blocks * self.blocks.context_length)
            if waiting is not None:
                waiting.result()
        if size > 1:
            gathered.save(self._inputs(rank), start)
        return gathered

    def of_rank(self, rank: int) -> Gathering:
        """What another process gathered."""
        gathered = self._empty(rank)
        gathered.resume()
        return gathered

    def _inputs(self, rank: int) -> dict[str, Any]:
        source = None if self.activations is None else self.activations.store.manifest["inputs"]["stored_as"]
        return {**self.described, "rank": rank, "processes": self.processes.size, "stored_as": source}

    def _empty(self, rank: int) -> Gathering:
        d_vocab = len(self.model.tokenizer.vocabulary())
        folder = self.partial / str(rank)
        return Gathering(self.sae.d_sae, d_vocab, self.blocks, folder, self.model.tokenizer.bos_id)

    def _resumed(self, rank: int, first: int, last: int) -> tuple[Gathering, int]:
        """What was saved by an earlier call with the same inputs, or nothing, and where to go on."""
        gathered = self._empty(rank)
        state = gathered.folder / "state"
        if is_finished(state, STATE, self._inputs(rank)):
            return gathered, gathered.resume()
        shutil.rmtree(gathered.folder, ignore_errors=True)
        return gathered, first


def _write(folder: Path, job: _Job, gathered: Gathering, weights: WeightIndex) -> None:
    """Make the records of all features, and put the index in its place."""
    sae, blocks = job.sae, job.blocks
    vocabulary = job.model.tokenizer.vocabulary()
    columns = np.zeros(sae.d_sae, COLUMNS)
    with new_folder(folder) as new:
        dtype = feature_record(blocks.ids.size)
        with closing(_records(gathered, blocks, vocabulary, weights, dtype, columns)) as records:
            write_records(new / FEATURES, dtype, (sae.d_sae,), records)
        write_array(new / ALL_COLUMNS, columns)
        write_array(new / IDS, blocks.ids)
        if blocks.counted is not None:
            write_array(new / COUNTED, blocks.counted)
        write_arrays(new / TEXT, _text_arrays(blocks, vocabulary, gathered.vocabulary_count))
        link_folder(weights.folder, new / WEIGHTS_FOLDER)
        write_manifest(
            new,
            KIND,
            job.described,
            n_tokens=gathered.n_positions,
            n_sampled=gathered.coactive.n_sampled,
            d_sae=sae.d_sae,
            histogram_edges=[float(edge) for edge in HISTOGRAM_EDGES],
            split=blocks.split,
            packing=blocks.packing,
            bos=blocks.bos,
            counted=blocks.counted is not None,
        )


def _records(
    gathered: Gathering,
    blocks: TokenBlocks,
    vocabulary: list[str],
    weights: WeightIndex,
    dtype: np.dtype,
    columns: np.ndarray,
) -> Generator[np.ndarray, None, None]:
    """Records of consecutive ranges of features; their columns are filled in on the way."""
    d_sae, d_vocab = len(columns), len(vocabulary)
    ids = blocks.ids.reshape(-1)
    tokens, nexts, pairs = (
        counts.by_feature() for counts in (gathered.tokens, gathered.nexts, gathered.coactive)
    )
    sampled = gathered.coactive.count
    is_numeric = np.array([text.strip().isdigit() for text in vocabulary])
    is_space = np.array([text.isspace() for text in vocabulary])

    def record_of(features: slice) -> np.ndarray:
        of_token, of_next, of_pair = tokens(features), nexts(features), pairs(features)
        record = np.zeros(features.stop - features.start, dtype)
        column = columns[features]
        statistics = gathered.statistics
        count = statistics.count[features]
        column["count"], column["max"] = count, statistics.max[features]
        column["mean"], column["std"] = statistics.mean[features], statistics.std[features]
        column["documents"] = gathered.places.documents[features]
        column["first_place"] = gathered.places.first_total[features] / gathered.places.documents[
            features
        ].clip(min=1)
        column["starts"] = gathered.places.starts[features]
        for name in ("bos", "special", "outlier", "left_out"):
            column[name] = getattr(gathered, name)[features]
        column["sampled"] = sampled[features]
        column["entropy"] = _entropy(of_token, features, d_vocab)
        record["histogram"] = statistics.histogram[features]

        top = best_pairs(of_token, of_token.total, features, d_vocab, TOP_TOKENS)
        record["token_id"], record["token_count"] = top.second, top.times
        record["token_mean"] = (top.total / top.times.clip(min=1)).clip(max=np.finfo(np.float16).max)
        following = best_pairs(of_next, of_next.times, features, d_vocab, NEXT_TOKENS)
        record["next_id"], record["next_count"] = following.second, following.times
        first, second = np.divmod(of_pair.key, d_sae)
        likeness = jaccard(of_pair.times, sampled[first], sampled[second])
        together = best_pairs(of_pair, likeness, features, d_sae, COACTIVE)
        record["coactive_id"], record["coactive_count"] = together.second, together.times
        record["coactive_sampled"] = np.where(together.second >= 0, sampled[together.second], 0)

        for name, values in gathered.strongest.examples(features).items():
            record[f"top_{name}"] = values
        sample = gathered.sample.examples(features)
        bands = quantile_bands(
            sample, gathered.sample.rank[features], statistics.histogram[features], PER_BAND
        )
        for name, values in sample.items():
            record[f"range_{name}"] = _taken(
                values, bands.reshape(len(bands), -1), name == "position"
            ).reshape(*bands.shape, *values.shape[2:])
        misses = gathered.misses.examples(features)
        chosen = _of_own_tokens(misses["position"], ids, top.second)
        for name in ("position", "scale", "window"):
            record[f"miss_{name}"] = _taken(misses[name], chosen, name == "position")

        followed, everywhere = of_next.times, count + column["left_out"]
        column["tags"] = tag_bits(
            {
                "silence": (everywhere == 0).astype(np.float64),
                "density": count / gathered.n_positions,
                "one_token": _ratio(_most_per_feature(of_token, features, d_vocab), count),
                "starts": _ratio(column["starts"], count),
                "numeric": _ratio(_count_where(of_token, is_numeric, features, d_vocab), count),
                "whitespace": _ratio(_count_where(of_token, is_space, features, d_vocab), count),
                "outlier": _ratio(column["outlier"], everywhere),
                **_weight_measures(weights, of_next, followed, features, d_vocab),
            }
        )
        columns[features] = column
        return record

    # Smaller ranges for more threads: what all of them have in hand does not grow with their number.
    n_threads = min(torch.get_num_threads(), _WRITING_THREADS)
    ranges = feature_blocks(d_sae, _FEATURES_IN_HAND // n_threads)
    with closing(in_order(torch.device("cpu"), record_of, ranges, n_workers=n_threads)) as made:
        yield from made


def _weight_measures(
    weights: WeightIndex, of_next: Tally, followed: np.ndarray, features: slice, d_vocab: int
) -> dict[str, np.ndarray]:
    """Measures that need the weights: "says" and "duplicate"."""
    measures: dict[str, np.ndarray] = {}
    records = weights.records[features]
    if weights.has_neighbours:
        measures["duplicate"] = records["neighbour_cosine"][:, 0].astype(np.float64)
    if weights.has_logit_lens:
        promoted = records["promoted_id"].astype(np.int64)
        own = np.sort((np.arange(features.start, features.stop)[:, None] * d_vocab + promoted)[promoted >= 0])
        place = np.searchsorted(own, of_next.key).clip(max=max(len(own) - 1, 0))
        said = own[place] == of_next.key if len(own) else np.zeros(len(of_next.key), dtype=bool)
        first = of_next.key // d_vocab - features.start
        n = features.stop - features.start
        measures["says"] = _ratio(
            np.bincount(first, weights=followed * said, minlength=n),
            np.bincount(first, weights=followed, minlength=n),
        )
    return measures


def _taken(values: np.ndarray, places: np.ndarray, is_position: bool) -> np.ndarray:
    """Those of ``values [n, capacity, …]`` that stand at ``places [n, m]``; 0, or position -1, where that is -1."""
    rows = np.arange(len(values))[:, None]
    taken = values[rows, places.clip(min=0)]
    taken[places < 0] = -1 if is_position else 0
    return taken


def _of_own_tokens(position: np.ndarray, ids: np.ndarray, token: np.ndarray) -> np.ndarray:
    """The first NEAR_MISSES of each feature's positions ``[n, capacity]`` that hold one of its tokens ``[n, m]``."""
    at = np.where(position >= 0, ids[position.clip(min=0)].astype(np.int64), -2)
    fits = (at[:, :, None] == token[:, None, :]).any(axis=2)
    order = np.argsort(~fits, axis=1, kind="stable")[:, :NEAR_MISSES]
    return np.where(np.take_along_axis(fits, order, axis=1), order, -1)


def _entropy(of_token: Tally, features: slice, d_vocab: int) -> np.ndarray:
    """−Σ p log2 p over the tokens at which each feature fires: float64 ``[n]``."""
    first = of_token.key // d_vocab - features.start
    n = features.stop - features.start
    count = np.bincount(first, weights=of_token.times, minlength=n)
    surprise = np.bincount(first, weights=of_token.times * np.log2(of_token.times.clip(min=1)), minlength=n)
    return np.log2(count.clip(min=1)) - surprise / count.clip(min=1)


def _most_per_feature(of_token: Tally, features: slice, d_vocab: int) -> np.ndarray:
    """Firings of each feature at the token where it fires most often."""
    first = of_token.key // d_vocab - features.start
    most = np.zeros(features.stop - features.start)
    starts = group_starts(first)
    if len(starts):
        most[first[starts]] = np.maximum.reduceat(of_token.times, starts)
    return most


def _count_where(of_token: Tally, holds: np.ndarray, features: slice, d_vocab: int) -> np.ndarray:
    first, token = np.divmod(of_token.key, d_vocab)
    n = features.stop - features.start
    return np.bincount(first - features.start, weights=of_token.times * holds[token], minlength=n)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """float64, nan where there is nothing."""
    part = part.astype(np.float64)
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _bytes_per_feature(blocks: TokenBlocks) -> int:
    return feature_record(blocks.ids.size).itemsize + COLUMNS.itemsize


def _described(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """What the index is made from."""
    bounds = {hook_name: rule.max_norm for hook_name, rule in sae.exclusions(model.tokenizer).items()}
    max_norm, max_norm_out = (
        bound if np.isfinite(bound) else None for bound in (bounds[sae.hook_name], bounds[sae.hook_out])
    )
    return {
        "layout": LAYOUT,
        "sae_hash": sae.hash,
        "architecture": sae.config.architecture,
        "k": sae.config.k,
        "model_hash": model.hash,
        "tokenizer_hash": model.tokenizer.hash,
        "blocks_hash": blocks.hash,
        "hook_name": sae.hook_name,
        "max_norm": max_norm,
        **({"hook_name_out": sae.hook_out, "max_norm_out": max_norm_out} if sae.config.transcoder else {}),
        **inputs,
    }


def _text_arrays(
    blocks: TokenBlocks, vocabulary: list[str], vocabulary_count: np.ndarray
) -> dict[str, np.ndarray]:
    documents = blocks.documents.reshape(-1)
    run_start = run_starts(documents)
    words, names = StringTable.of(vocabulary), StringTable.of(blocks.names)
    return {
        "run_start": run_start,
        "run_document": documents[run_start],
        "vocabulary_count": vocabulary_count,
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
    if store.store.manifest["inputs"]["model"] != model.hash:
        raise InputError(f"{store.folder} holds activations of other weights than those of {model.name}.")
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
