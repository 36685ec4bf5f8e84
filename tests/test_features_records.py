"""The files of an index, and counts that outgrow memory."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import load_file

from activations.errors import InputError
from features import coactivation, pair_counts
from features.coactivation import Coactivation
from features.firings import Encoded, Firings
from features.pair_counts import PairCounts, Tally
from features.records import fetch_beginnings, read_array, read_arrays, write_array, write_arrays

ARRAYS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.sampled_from([np.int64, np.int32, np.uint8]).flatmap(
        lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=1, max_dims=3, min_side=0))
    ),
    min_size=1,
    max_size=5,
)


@given(arrays=ARRAYS)
def test_arrays_in_one_file_are_safetensors_and_come_back(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("arrays") / "some.safetensors"
    write_arrays(path, arrays)
    for read in (read_arrays(path), load_file(path)):
        assert set(read) == set(arrays)
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)
    assert all(array.ctypes.data % array.itemsize == 0 for array in read_arrays(path).values() if array.size)


def test_damaged_arrays_are_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_arrays(path, {"a": np.arange(100), "b": np.arange(5, dtype=np.uint8)})
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:6],
        whole[:40],
        whole[:-1],
        whole.replace(b"I64", b"X99"),
        b"\xff" * len(whole),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"cannot be read .* build the index again"):
            read_arrays(path)
    path.write_bytes(whole.replace(b"[100]", b"[101]"))
    with pytest.raises(InputError, match="contradicts itself"):
        read_arrays(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_arrays(tmp_path / "nothing")
    write_array(tmp_path / "plain.npy", np.arange(3))
    fetch_beginnings([path, tmp_path / "nothing", tmp_path / "plain.npy"])
    assert read_array(tmp_path / "plain.npy").tolist() == [0, 1, 2]


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize(("n_parts", "n_first"), [(3, 30), (60, 30), (60, 2)])
def test_pairs_are_counted_exactly_however_often_they_are_spilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summed: bool, n_parts: int, n_first: int
) -> None:
    """Of many different pairs, which go to files, and of few, which stay in memory."""
    monkeypatch.setattr(pair_counts, "SORTED_AT_ONCE", 20)
    monkeypatch.setattr(pair_counts, "PAIRS_IN_MEMORY", 60)
    monkeypatch.setattr(pair_counts, "_PAIRS_AT_ONCE", 7)
    random = np.random.default_rng(n_parts)
    counts = PairCounts(50, tmp_path, summed=summed)
    times: Counter[tuple[int, int]] = Counter()
    totals: Counter[tuple[int, int]] = Counter()
    kept: list[int] = []
    most_files = 0
    put = PairCounts._put

    def watched(self: PairCounts, run: Tally) -> None:
        before = sum(len(run.key) for run in self._in_memory)
        put(self, run)
        if before + len(run.key) > 60:
            kept.append(len(self._in_memory))

    monkeypatch.setattr(PairCounts, "_put", watched)
    for part in range(n_parts):
        first, second = random.integers(
            0, [[n_first], [min(2 * n_first, 50)]], size=(2, int(random.integers(0, 50)))
        )
        value = random.integers(1, 100, size=len(first)).astype(np.float32)
        counts.add(first, second, value if summed else None)
        for pair, v in zip(zip(first.tolist(), second.tolist(), strict=True), value.tolist(), strict=True):
            times[pair] += 1
            totals[pair] += int(v)
        if part == n_parts // 2:  # taken up by another process
            runs = counts.spill()
            counts = PairCounts(50, tmp_path, summed=summed)
            counts.resume(runs)
        most_files = max(most_files, len(counts._on_disk))
    found = list(map(counts.by_feature(), [slice(0, 11), slice(11, 12), slice(12, 30)]))
    key = np.concatenate([tally.key for tally in found])
    assert [tuple(pair) for pair in np.stack(np.divmod(key, 50), axis=1).tolist()] == sorted(times)
    assert np.concatenate([tally.times for tally in found]).tolist() == [
        times[pair] for pair in sorted(times)
    ]
    if summed:
        assert np.concatenate([tally.total for tally in found]).tolist() == [
            totals[pair] for pair in sorted(times)
        ]
    if n_parts > 3:
        assert kept  # memory was full
        assert set(kept) == ({0} if n_first > 2 else {1})  # and was emptied, or made room for
        assert most_files < 12 if n_first > 2 else most_files <= 1


@given(seed=st.integers(0, 1000), at_once=st.sampled_from([1, 10, 1 << 20]))
def test_features_that_fire_together_are_counted_as_by_a_matrix_product(seed: int, at_once: int) -> None:
    random = np.random.default_rng(seed)
    d_sae, context = 7, 5
    fires = random.random((4 * context, d_sae)) < 0.4
    together = Coactivation(d_sae, fires.shape[0])
    none = np.zeros(0, np.int64)
    for start in range(0, len(fires), 2 * context):
        position, feature = np.nonzero(fires[start : start + 2 * context])
        values = np.ones(len(position), np.float32)
        kept = np.arange(start, start + 2 * context)
        part = Encoded(position + start, feature, values, kept, none, none, none, none, none)
        together.add(Firings.of([part], context))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(coactivation, "_PAIRS_AT_ONCE", at_once)
        tallies = list(map(together.by_feature(), [slice(0, 3), slice(3, 7)]))
    found = np.zeros((d_sae, d_sae), np.int64)
    for tally in tallies:
        assert (np.diff(tally.key) > 0).all()
        found[np.divmod(tally.key, d_sae)] = tally.times
    expected = fires.T.astype(int) @ fires
    np.testing.assert_array_equal(together.count, expected.diagonal())
    np.fill_diagonal(expected, 0)
    np.testing.assert_array_equal(found, expected)
