"""The Triton kernels: interpreted on the CPU, compiled for a GPU that need not be there, and run on one that is.

Triton decides when it is imported whether kernels are interpreted, so each way has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from activations.errors import InputError
from sae.kernels.choice import check_available, dense_is_faster

TESTS = Path(__file__).parent


def run_checks(file: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_interpreted_on_the_cpu() -> None:
    run_checks("kernel_checks.py", TRITON_INTERPRET="1")


def test_kernels_compile(tmp_path: Path) -> None:
    run_checks("kernel_compilation.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    run_checks("kernel_checks.py", TRITON_INTERPRET="0")


def test_triton_on_a_cpu_is_refused_in_one_sentence() -> None:
    check_available("torch", torch.device("cpu"))
    with pytest.raises(InputError) as refused:
        check_available("triton", torch.device("cpu"))
    assert str(refused.value) == (
        "kernels is triton, which needs a CUDA device, and this run is on cpu: take kernels torch."
    )


def test_triton_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="package triton is not installed"):
        check_available("triton", torch.device("cuda"))


def test_dense_products_win_where_few_features_are_silent() -> None:
    """3 · L0 · itemsize / 4.8e12 against 10 · d_sae / rate: equal at 87.5 for bfloat16 and 15 for float32."""
    assert dense_is_faster(32_768, 32_768 / 87, 2)
    assert not dense_is_faster(32_768, 32_768 / 88, 2)
    assert dense_is_faster(32_768, 32_768 / 14.9, 4)
    assert not dense_is_faster(32_768, 32_768 / 15.1, 4)
    assert not dense_is_faster(16, 16, 8)
