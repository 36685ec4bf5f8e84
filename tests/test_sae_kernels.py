"""The Triton kernels: interpreted on the CPU, compiled for a GPU that need not be there, and run on one that is.

Triton decides when it is imported whether kernels are interpreted, so each way has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from activations.errors import InputError
from sae.config import ArchitectureName, SAEConfig, TrainConfig
from sae.kernels.choice import check_available, dense_is_faster
from sae.scaling import Scaling
from sae.trainer import Trainer

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
    run_checks("kernel_checks.py", TRITON_INTERPRET="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_a_step_does_not_wait_for_the_device(
    architecture: ArchitectureName, kernels: Literal["torch", "triton"], request: pytest.FixtureRequest
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.use_deterministic_algorithms(False)  # which may wait
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(True))
    sae = SAEConfig(architecture=architecture, d_sae=4096, k=8)
    config = TrainConfig(tokens=256_000, batch_tokens=256, kernels=kernels, sae=sae)
    trainer = Trainer(config, Scaling(torch.zeros(64, device="cuda"), 1.0))
    x = torch.randn(256, 64, device="cuda")
    trainer.step(x, x)  # which compiles the kernels
    trainer.dead.silent_tokens[:100] = trainer.dead.window + 1
    trainer.dead.refresh()
    trainer.step(x, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):  # between two refreshes of the list of dead features
            trainer.step(x, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_triton_on_a_cpu_is_refused_in_one_sentence() -> None:
    TrainConfig(device="cpu").check()
    with pytest.raises(InputError) as refused:
        TrainConfig(device="cpu", kernels="triton").check()
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
