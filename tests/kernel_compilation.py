"""What ``test_sae_kernels.py`` runs in a process of its own: every kernel compiled for a GPU that need not be there.

The interpreter takes more than the compiler does, so this keeps the kernels fit to run between two runs on a device;
and it says whether a thread's registers hold what the modules' docstrings say they hold.
"""

import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sae.kernels import adam_rows, decoding, grouped, selection
from sae.kernels.launch import padded, warps

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOATS, HALVES, INTS, LONGS = "*fp32", "*bf16", "*i32", "*i64"
SCALARS = ("step_size", "root_correction", "one_minus_beta1", "beta2", "one_minus_beta2", "epsilon")


def check(
    folder: Path, kernel: JITFunction, block: int, types: dict[str, str], **constants: int | bool | None
) -> None:
    """Compile for a block of so many numbers; nothing may spill. Arguments neither typed nor constant are int32."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs={})
    binary = triton.compile(source, target=HOPPER, options={"num_warps": warps(block)}).asm["cubin"]
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    used = subprocess.run([CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    assert f"Function {kernel.__name__}" in used
    assert "STACK:0" in used, used


@pytest.mark.parametrize("kind", [FLOATS, HALVES, "*fp16"])
def test_selection(tmp_path: Path, kind: str) -> None:
    check(tmp_path, selection._run_maxima, 4096, {"tile_ptr": kind, "maxima_ptr": INTS}, RUN=32, RUNS=128)
    types = {"source_ptr": kind, "winners_ptr": INTS, "values_ptr": kind, "indices_ptr": INTS}
    rounds = 16 if kind == HALVES else 32
    check(tmp_path, selection._select, 2048, types, RUN=32, ROUNDS=rounds, BLOCK=2048)


@pytest.mark.parametrize("k", [{}, {"k": 1}])  # Triton makes a constant of a 1
def test_selection_among_keys(tmp_path: Path, k: dict[str, int]) -> None:
    types = {"source_ptr": INTS, "indices_ptr": INTS}
    none = {"winners_ptr": None, "values_ptr": None}
    check(tmp_path, selection._select, 8_192, types, RUN=1, ROUNDS=32, BLOCK=8_192, **none, **k)


@pytest.mark.parametrize(("table", "k"), [(FLOATS, 32), (FLOATS, 256), (HALVES, 1), (HALVES, 64)])
def test_error_and_dots(tmp_path: Path, table: str, k: int) -> None:
    pointers = ("values_ptr", "b_dec_ptr", "goal_ptr", "error_ptr", "dots_ptr")
    types = dict.fromkeys(pointers, FLOATS) | {"indices_ptr": INTS, "decoder_ptr": table}
    columns = decoding.columns_of(8192, padded(k))
    check(tmp_path, decoding._error_and_dots, padded(k) * columns, types, K=padded(k), COLUMNS=columns)


@pytest.mark.parametrize("offsets", [None, LONGS])
def test_sums_and_dots(tmp_path: Path, offsets: str | None) -> None:
    size = {"CHUNK": 16, "COLUMNS": 256}
    types = {"values_ptr": FLOATS, "indices_ptr": INTS, "table_ptr": HALVES, "out_ptr": FLOATS}
    dots = {"left_ptr": FLOATS, "indices_ptr": INTS, "right_ptr": HALVES, "dots_ptr": FLOATS}
    for kernel, pointers in ((decoding._gather_sum, types), (decoding._gathered_dots, dots)):
        if offsets:
            check(tmp_path, kernel, 4096, {**pointers, "offsets_ptr": offsets}, **size)
        else:
            check(tmp_path, kernel, 4096, pointers, offsets_ptr=None, **size)


def test_weighted_sums(tmp_path: Path) -> None:
    pointers = ("order_ptr", "rows_ptr", "offsets_ptr", "counts_ptr")
    types = dict.fromkeys(pointers, LONGS) | {"weights_ptr": FLOATS, "table_ptr": FLOATS, "out_ptr": FLOATS}
    check(tmp_path, grouped._weighted_sums, 2048, types, CHUNK=8, COLUMNS=256)


@pytest.mark.parametrize("d", [768, 8192])
def test_adam_rows(tmp_path: Path, d: int) -> None:
    pointers = ("rows_ptr", "gradient_ptr", "mean_ptr", "square_ptr")
    types = dict.fromkeys(pointers, FLOATS) | dict.fromkeys(SCALARS, "fp32")
    check(tmp_path, adam_rows._adam_rows, padded(d), types, UNIT=True, BLOCK=padded(d))
