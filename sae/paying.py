"""Losses of architectures that pay for firing (relu, gated, jumprelu): value and all gradients in one pass.

Such a loss is a reconstruction error plus a penalty that depends on each pre-activation ``z_ni`` alone. An architecture
says what happens at one entry (n, i): a :class:`Rule`. Here the rule is carried out on all entries, in either layout:

* **dense**, row tile by row tile, while many features fire: early in training half of all pre-activations are positive,
  and sparse codes would be larger than the dense tensor. The loss of a row depends on no other row, so each tile's
  gradients are taken right after its forward pass and accumulated: memory is that of one tile.
* **sparse**, only the entries that fire, once they are few: one dense product remains, or two where silent entries
  count too (jumprelu's window): for those, only sums over rows are formed.

Whatever depends linearly on *all* pre-activations needs neither: it is worked out from the sum of the inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae.architectures.base import Architecture, Weights
from sae.codes import Pattern
from sae.mesh import mesh_in_force
from sae.sparse import _buffer, gathered_dots, map_tiles, tile_rows

SPARSE_BELOW = 1 / 5  # of all entries: from there on the sparse layout is faster
_GATHER_BELOW = 1 / 32  # of all entries: there single dot products are faster than a dense product
_SAMPLE = 64  # rows that the choice of the layout is made from


class Entries(ABC):
    """Those entries of the pre-activations ``[n, d_sae]`` that fire, or all of some rows, and sums over them.

    Attributes:
        pre: their values; ``[n, d_sae]`` (dense) or ``[nnz]`` (sparse). Every per-entry tensor has this shape.
        silent: what :meth:`Rule.silent` says of all entries of these rows (sparse: 8 of them to a byte).
    """

    pre: Tensor
    silent: Tensor | None

    @abstractmethod
    def spread(self, per_feature: Tensor) -> Tensor:
        """A tensor ``[d_sae]`` in a shape that combines with per-entry tensors."""

    @abstractmethod
    def sums(self, values: Tensor) -> Tensor:
        """``Σ_n v_ni``: ``[d_sae]``."""

    @abstractmethod
    def decoded(self, values: Tensor, decoder: Tensor) -> Tensor:
        """``Σ_i v_ni W_dec,i``: ``[n, d_out]``."""

    @abstractmethod
    def dots(self, rows: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor | None]:
        """``rows_n · W_dec,i`` per entry, of ``rows [n, d_out]``, and :func:`_sums_where` of what is ``silent``."""

    @abstractmethod
    def outer(self, values: Tensor, rows: Tensor, total: Tensor | None) -> Tensor:
        """``total + Σ_n v_ni rows_n``, ``[d_sae, d]``, in place where a total is given."""


class DenseTile(Entries):
    """All entries of some rows."""

    def __init__(self, pre: Tensor, silent: Tensor | None = None) -> None:
        self.pre, self.silent = pre, silent

    def spread(self, per_feature: Tensor) -> Tensor:
        """See :class:`Entries`, as all methods."""
        return per_feature

    def sums(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def decoded(self, values: Tensor, decoder: Tensor) -> Tensor:
        return values @ decoder

    def dots(self, rows: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor | None]:
        dots = rows @ decoder.t()
        return dots, None if self.silent is None else _sums_where(self.silent, dots)

    def outer(self, values: Tensor, rows: Tensor, total: Tensor | None) -> Tensor:
        return values.t() @ rows if total is None else total.addmm_(values.t(), rows)


class SparseEntries(Entries):
    """The entries of a ragged pattern: those that fire."""

    def __init__(self, pre: Tensor, pattern: Pattern, silent: Tensor | None) -> None:
        self.pre, self.pattern, self.silent = pre, pattern, silent

    def spread(self, per_feature: Tensor) -> Tensor:
        """See :class:`Entries`, as all methods."""
        return per_feature.index_select(0, self.pattern.indices)

    def sums(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.pattern.d_sae).index_add_(0, self.pattern.indices, values)

    def decoded(self, values: Tensor, decoder: Tensor) -> Tensor:
        assert self.pattern.row_offsets is not None
        starts = self.pattern.row_offsets[:-1].to(self.pattern.indices.dtype)
        return embedding_bag(self.pattern.indices, decoder, starts, mode="sum", per_sample_weights=values)

    def dots(self, rows: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor | None]:
        n, d_sae = len(rows), self.pattern.d_sae
        if self.silent is None and len(self.pre) < _GATHER_BELOW * n * d_sae:
            return gathered_dots(rows, decoder, self.pattern), None
        found = torch.empty_like(self.pre)
        sums = self.pre.new_zeros(2, d_sae)
        step = max(
            16, tile_rows(d_sae, rows.element_size()) // 4
        )  # a few tensors of this size are there at once
        for start in range(0, n, step):
            tile = rows[start : start + step]
            pattern, span = self.pattern.slice(start, start + len(tile))
            shape = (len(tile), d_sae)
            dots = torch.mm(tile, decoder.t(), out=_buffer("tile", shape, rows.dtype, rows.device))
            places = pattern.rows().mul_(d_sae).add_(pattern.indices)
            torch.index_select(dots.view(-1), 0, places, out=found[span])
            if self.silent is not None:
                bits = np.unpackbits(self.silent[start : start + step].numpy(), axis=1, count=d_sae)
                sums += _sums_where(torch.from_numpy(bits), dots)
        return found, None if self.silent is None else sums

    def outer(self, values: Tensor, rows: Tensor, total: Tensor | None) -> Tensor:
        sums = self.pattern.transposed.weighted_sums(rows, values)
        return sums if total is None else total.add_(sums)


def _sums_where(mask: Tensor, dots: Tensor) -> Tensor:
    """``[2, d_sae]``: of the entries ``[n, d_sae]`` where a mask is true, each feature's number and sum of dots."""
    chosen = mask.to(dots.dtype)
    ones = dots.new_ones(len(dots))
    number = ones @ chosen
    return torch.stack([number, ones @ chosen.mul_(dots)])


def above(pre: Tensor, bound: Tensor | float) -> Tensor:
    """``pre > bound`` as bool, in the shape of ``pre``; without gradient.

    On a CPU numpy compares, in a quarter of the time that PyTorch takes.
    """
    if pre.device.type != "cpu":
        return pre > bound
    limit = bound.numpy() if isinstance(bound, Tensor) else bound
    return torch.from_numpy(np.greater(pre.numpy(), limit))


class Rule(ABC):
    """What an architecture does at one entry, for one batch; the factor 1/n of the mean is its business.

    It sees the entries part by part (:meth:`firing`, :meth:`codes`, :meth:`slopes`), sums up what it needs, and gives
    the rest of the loss and of the gradients at the end (:meth:`penalty`, :meth:`gradients`).
    """

    @abstractmethod
    def fires(self, pre: Tensor) -> Tensor:
        """Bool ``[n, d_sae]``: where an activation, or a pre-activation's slope, is not 0."""

    def silent(self, pre: Tensor) -> Tensor | None:
        """Bool ``[n, d_sae]``: which other entries give a parameter ``[d_sae]`` a slope; None if none ever does."""
        return None

    def at_silent(self, numbers: Tensor, from_error: Tensor) -> None:
        """Take down what those entries contribute.

        Args:
            numbers: how many a feature has, ``[d_sae]``. from_error: sums over them, ``[d_sae]``; see :meth:`slopes`.
        """
        return

    @abstractmethod
    def codes(self, entries: Entries) -> tuple[Tensor, ...]:
        """Activations per entry: first those whose reconstruction counts, then any whose reconstruction error is added
        to the loss with the decoder's side (W_dec, b_dec, W_skip) held fixed.
        """

    @abstractmethod
    def slopes(self, entries: Entries, codes: tuple[Tensor, ...], from_error: list[Tensor]) -> Tensor:
        """The loss's derivative with respect to ``(x W_enc)_ni``, per entry.

        Args:
            from_error: derivatives of the reconstruction errors with respect to each of ``codes``.
        """

    def everywhere(self, pre_sums: Tensor) -> Tensor | None:
        """The derivative ``[d_sae]`` that the loss has with respect to every pre-activation, beside :meth:`slopes`.

        Args:
            pre_sums: ``Σ_n z_ni``, ``[d_sae]``.
        """
        return None

    @abstractmethod
    def penalty(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What the loss has beside reconstruction errors, and its parts by name (without their weights)."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Gradients ``[d_sae]`` of further parameters by name, and as ``norms`` that of ‖W_dec,i‖."""


class _Known(torch.autograd.Function):
    """A scalar whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they serve once
        return None, None, *(gradient.mul_(grads[0]) for gradient in gradients)


def paid_loss(
    architecture: Architecture, rule: Rule, weights: Weights, x: Tensor, y: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """``mean_n ‖ŷ − y‖²`` plus what the rule adds.

    Args:
        architecture: says what the encoder reads and what features have to reconstruct.
        weights: all of its tensors receive gradients. x: ``[n, d_in]``. y: ``[n, d_out]``.

    Returns:
        the total, differentiable once; its parts (``mse`` first), detached; how often each feature fired, int64
        ``[d_sae]``.
    """
    goal = architecture.goal(weights, x, y)
    with torch.no_grad():
        centred = architecture.centred(weights, x)
        value, terms, firings, gradients = _evaluated(rule, weights, centred, goal)
        if architecture.input_bias(weights) is not None:
            by_input = gradients.pop("product") @ weights.encoder_rows
            gradients["b_dec"] -= mesh_in_force().sum_over_features(by_input)
        gradients.pop("product", None)
    named = weights.tensors() | {"goal": goal}
    total = _Known.apply(value, list(gradients.values()), *(named[name] for name in gradients))
    return total, terms, firings


def _evaluated(
    rule: Rule, weights: Weights, centred: Tensor, goal: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Loss, its parts, firings, and gradients by name; under ``product`` the sum over rows of that of ``x W_enc``."""
    w, n = weights, len(goal)
    gradients = {"b_dec": torch.zeros_like(w.b_dec)}
    if goal.requires_grad:
        gradients["goal"] = torch.empty_like(goal)
    mesh = mesh_in_force()
    mse = auxiliary = goal.new_zeros(())
    firings = product = torch.zeros_like(w.b_enc)
    for rows, entries in _parts(rule, centred, w):
        codes = rule.codes(entries)
        from_error = []
        for place, code in enumerate(codes):
            error = mesh.sum_over_features(entries.decoded(code, w.W_dec)).add_(w.b_dec).sub_(goal[rows])
            square = torch.linalg.vector_norm(error).square() / n
            error.mul_(2 / n)
            dots, at_silent = entries.dots(error, w.W_dec)
            from_error.append(dots)
            if at_silent is not None:
                rule.at_silent(*at_silent)
            if place > 0:
                auxiliary = auxiliary + square
                continue
            mse = mse + square
            gradients["W_dec"] = entries.outer(code, error, gradients.get("W_dec"))
            gradients["b_dec"] += error.sum(0)
            if "goal" in gradients:
                torch.neg(error, out=gradients["goal"][rows])
        firings = firings + entries.sums((codes[0] != 0).to(centred.dtype))
        slopes = rule.slopes(entries, codes, from_error)
        gradients["encoder_rows"] = entries.outer(slopes, centred[rows], gradients.get("encoder_rows"))
        product = product + entries.sums(slopes)
    inputs = centred.sum(0)
    everywhere = rule.everywhere(w.encoder_rows @ inputs + w.b_enc * n)
    if everywhere is not None:
        gradients["encoder_rows"].addr_(everywhere, inputs)
        product = product + everywhere * n
    gradients |= {"product": product, "b_enc": product.clone(), **rule.gradients()}
    norms = w.W_dec.norm(dim=1).clamp_min_(1e-12)
    gradients["W_dec"].addcmul_(w.W_dec, (gradients.pop("norms") / norms)[:, None])
    penalty, terms = rule.penalty()
    if mesh.n_shards > 1:
        penalty, *parts = mesh.sum_over_features(torch.stack([penalty, *terms.values()])).unbind()
        terms = dict(zip(terms, parts, strict=True))
    return mse + auxiliary + penalty, {"mse": mse, **terms}, firings.long(), gradients


def _parts(rule: Rule, centred: Tensor, weights: Weights) -> Iterator[tuple[slice, Entries]]:
    """All entries that fire, or simply all, with the rows they belong to."""
    rows, bias, n = weights.encoder_rows, weights.b_enc, len(centred)
    if _few_fire(rule, centred, weights):
        yield slice(0, n), _sparse_entries(rule, centred, rows, bias)
        return
    step = tile_rows(len(bias), centred.element_size())
    for start in range(0, n, step):
        part = slice(start, start + step)
        pre = torch.addmm(bias, centred[part], rows.t())
        yield part, DenseTile(pre, rule.silent(pre))


def _few_fire(rule: Rule, centred: Tensor, weights: Weights) -> bool:
    """Judged by the first rows, alike by all shards. Elsewhere than on a CPU false: asking would make it wait."""
    if centred.device.type != "cpu":
        return False
    sample = torch.addmm(weights.b_enc, centred[:_SAMPLE], weights.encoder_rows.t())
    share = mesh_in_force().sum_over_features(rule.fires(sample).float().mean())
    return float(share) < SPARSE_BELOW * mesh_in_force().n_shards


def _sparse_entries(rule: Rule, centred: Tensor, encoder_rows: Tensor, b_enc: Tensor) -> SparseEntries:
    d_sae = len(b_enc)

    def select(tile: Tensor) -> tuple[Tensor, ...]:
        places = torch.from_numpy(np.flatnonzero(rule.fires(tile).numpy()))
        counts = torch.bincount(places // d_sae, minlength=len(tile))
        found = counts, (places % d_sae).int(), tile.view(-1)[places]
        silent = rule.silent(tile)
        return found if silent is None else (*found, torch.from_numpy(np.packbits(silent.numpy(), axis=1)))

    counts, indices, values, *silent = map(
        torch.cat, zip(*map_tiles(select, centred, encoder_rows, b_enc), strict=True)
    )
    pattern = Pattern(d_sae, indices, _starting_at_0(counts.cumsum(0)))
    return SparseEntries(values, pattern, silent[0] if silent else None)


def _starting_at_0(sums: Tensor) -> Tensor:
    return torch.cat([sums.new_zeros(1), sums])
