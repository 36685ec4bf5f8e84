"""What a training will take, from a few steps and one batch of the model: time, memory, disk. Nothing is written."""

import statistics
import time
from dataclasses import dataclass

import torch

from activations.blocks import TokenBlocks
from activations.capture import blocks_per_batch, capture_blocks
from activations.files import room_for
from activations.stream import BUFFER_BYTES
from features.pipeline import Pipeline
from sae.checkpoint import KEPT
from sae.scaling import Scaling
from sae.trainer import Trainer

_WARM_UP, _TIMED = 2, 5


@dataclass(frozen=True)
class Forecast:
    """What a training will take.

    Attributes:
        n_steps, batch_tokens: of the training. step_seconds: median of a few steps on random activations.
        capture_seconds: for all tokens through the model, from one batch of them; 0 where a store is read.
        memory: bytes of weights, gradients, optimiser, batch and shuffle buffer (the language model not counted).
        model_memory: bytes of the language model's weights.
        disk: bytes of the SAE and of the checkpoints while it is trained. free: bytes free there now.
    """

    n_steps: int
    batch_tokens: int
    step_seconds: float
    capture_seconds: float
    memory: int
    model_memory: int
    disk: int
    free: int

    @property
    def seconds(self) -> float:
        """Of the whole training."""
        return self.n_steps * self.step_seconds + self.capture_seconds


def forecast(pipeline: Pipeline) -> Forecast:
    """Measure what the training of a pipeline that was not started will take.

    Raises:
        InputError: as for :meth:`Pipeline.check`, and a corpus without text.
    """
    pipeline.check()
    config, model = pipeline.config, pipeline.model
    widths = [model.width(name) for name in config.hook_names]
    one = torch.zeros(widths[0], device=model.device)
    scaling = Scaling(one, 1.0)
    if config.hook_out is not None:
        scaling = Scaling(one, 1.0, torch.zeros(widths[1], device=model.device), 1.0)
    trainer = Trainer(config, scaling, pipeline.mesh)
    generator = torch.Generator().manual_seed(0)
    rows = config.resolved_batch_tokens() // pipeline.mesh.n_data
    batch = torch.randn(rows, sum(widths), generator=generator).to(model.device)
    step_seconds = statistics.median(
        [_seconds_of_step(trainer, batch) for _ in range(_WARM_UP + _TIMED)][_WARM_UP:]
    )
    tensors, _ = trainer.state()
    state = sum(tensor.nbytes for tensor in tensors.values())
    weights = sum(tensor.nbytes for tensor in trainer.weights.tensors().values())
    row = sum(widths) * model.dtype.itemsize
    buffer = 0 if pipeline.store is not None else (config.buffer_tokens or BUFFER_BYTES // row) * row
    return Forecast(
        n_steps=config.n_steps(),
        batch_tokens=config.resolved_batch_tokens(),
        step_seconds=step_seconds,
        capture_seconds=0.0 if pipeline.store is not None else _capture_seconds(pipeline),
        memory=state + weights + 3 * batch.nbytes + min(buffer, config.tokens_read() * row),
        model_memory=model.n_bytes,
        disk=weights + (KEPT + 1) * state,
        free=room_for(pipeline.run.path),
    )


def _seconds_of_step(trainer: Trainer, batch: torch.Tensor) -> float:
    begun = time.perf_counter()
    trainer.step(*trainer.scaling.apply(batch))
    if batch.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _capture_seconds(pipeline: Pipeline) -> float:
    """For every token that training reads, from a few batches of the model."""
    model, config = pipeline.model, pipeline.config
    threads = torch.get_num_threads() if model.device.type == "cpu" else 1
    n_tokens = 2 * threads * blocks_per_batch(model, pipeline.context_length) * pipeline.context_length
    blocks: TokenBlocks = pipeline.corpus.blocks(
        model.tokenizer, "train", min(n_tokens, config.resolved_tokens()), pipeline.context_length
    )
    begun = time.perf_counter()
    for _ in capture_blocks(model, blocks, config.hook_names):
        pass
    return (time.perf_counter() - begun) / max(blocks.n_tokens, 1) * config.tokens_read() / pipeline.mesh.size
