"""Memory that a step frees stays with the process."""

import platform
import resource

import pytest
import torch

from sae.memory import keep_freed_memory

BYTES = 80 << 20  # more than glibc's largest threshold for returning a block


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_large_block_is_not_faulted_in_twice() -> None:
    keep_freed_memory()
    torch.ones(BYTES, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(BYTES, dtype=torch.uint8)
    pages = BYTES // resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 10
