"""Small token blocks and stores for the tests of what is on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from activations.blocks import PADDING, TokenBlocks
from activations.progress import Progress

HOOK, SECOND_HOOK = "blocks.1.hook_resid_post", "blocks.2.mlp.hook_post"
CONTEXT, WIDTH, SECOND_WIDTH = 16, 32, 72


def make_blocks(n_blocks: int, padded: int = 0, seed: int = 0, split: str = "train") -> TokenBlocks:
    """Random tokens with a separator (0) here and there; ``padded`` positions of padding at the very end."""
    ids = np.random.default_rng(seed).integers(0, 40, (n_blocks, CONTEXT)).astype(np.uint16)
    documents = np.zeros((n_blocks, CONTEXT), np.int32)
    if padded:
        ids[-1, -padded:] = 0
        documents[-1, -padded:] = PADDING
    return TokenBlocks(ids, documents, ["a document"], split, "concatenated", bos=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


class Stop(Exception):
    """Interrupts some work."""


def stop_after(n_tokens: int) -> Progress:
    """A progress bar that interrupts the work."""

    @contextmanager
    def progress(description: str, *, total: int, unit: str) -> Iterator:
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            if done > n_tokens:
                raise Stop

        yield step

    return progress
