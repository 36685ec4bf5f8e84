"""How well a language model predicts held-out text.

    python -m activations.builtin.measure_model

measures the bundled model on the test split of the Python sources of this machine.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from activations.blocks import TokenBlocks
from activations.capture import BlockRange, BlockRanges, in_order
from activations.corpus import Corpus
from activations.errors import InputError
from activations.models import LanguageModel

_BATCH_BLOCKS = 4


@dataclass(frozen=True)
class ModelLoss:
    """Cross-entropy on held-out text.

    nats_per_token: mean over all predicted tokens.
    bits_per_byte: the same information, per byte of text.
    by_position: nats of the 1st, 2nd … prediction in a block.
    n_predicted: how many tokens were predicted.
    n_documents: how many documents they are from.
    """

    nats_per_token: float
    bits_per_byte: float
    by_position: list[float]
    n_predicted: int
    n_documents: int


def measure_loss(model: LanguageModel, blocks: TokenBlocks) -> ModelLoss:
    """Cross-entropy of every token but the first of each block, given those before it in the block."""
    special_ids = model.tokenizer.special_ids

    def measure(block_range: BlockRange) -> tuple[Tensor, Tensor, int]:
        ids, mask = blocks.ids_tensor(*block_range), blocks.attention_mask(*block_range)
        real = torch.ones_like(ids) if mask is None else mask
        logits = model.logits(
            ids.to(model.device), attention_mask=None if mask is None else mask.to(model.device)
        )
        targets, predicted = ids[:, 1:], real[:, 1:].bool()
        loss = cross_entropy(logits[:, :-1].float().cpu().transpose(1, 2), targets, reduction="none")
        n_bytes = 0
        for row, is_predicted in zip(targets, predicted, strict=True):
            text = [token for token in row[is_predicted].tolist() if token not in special_ids]
            n_bytes += len(model.tokenizer.decode(text).encode())
        return (loss * predicted).double().sum(0), predicted.sum(0), n_bytes

    nats = torch.zeros(blocks.context_length - 1, dtype=torch.float64)
    counts = torch.zeros(blocks.context_length - 1, dtype=torch.int64)
    n_bytes = 0
    ranges = BlockRanges(blocks.n_blocks, _BATCH_BLOCKS)
    for batch_nats, batch_counts, batch_bytes in in_order(model.device, measure, ranges):
        nats += batch_nats
        counts += batch_counts
        n_bytes += batch_bytes
    n_predicted = int(counts.sum())
    return ModelLoss(
        nats_per_token=float(nats.sum()) / n_predicted,
        bits_per_byte=float(nats.sum()) / math.log(2) / n_bytes,
        by_position=(nats / counts.clamp(min=1)).tolist(),
        n_predicted=n_predicted,
        n_documents=len(blocks.names),
    )


def main() -> None:
    """Measure the bundled model and print the figures of its card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin", help="bundled model, folder or hub name")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of the test split to read")
    options = parser.parse_args()
    try:
        model = LanguageModel.load(options.model)
        blocks = Corpus().blocks(model.tokenizer, "test", options.tokens, model.context_length)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    loss = measure_loss(model, blocks)
    print(f"{loss.n_predicted:,} predictions in {loss.n_documents} documents")
    print(f"{loss.nats_per_token:.3f} nats per token, {loss.bits_per_byte:.3f} bits per byte")
    print("nats by number of tokens before the predicted one:")
    for first, last in ((1, 1), (2, 3), (4, 15), (16, 63), (64, 255)):
        if nats := loss.by_position[first - 1 : last]:
            print(f"  {first} to {last}: {sum(nats) / len(nats):.2f}")


if __name__ == "__main__":
    main()
