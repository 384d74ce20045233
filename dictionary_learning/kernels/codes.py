"""The codes of one batch on a support, and what can be done with them: the trainers' only way to the kernels.

`Preactivations` is the encoder's product, the one dense product of a sparse step; it is formed without a graph, in
memory that every step of every dictionary shares, and is never handed out. From it come `Codes`, either dense ([B, F])
or on the entries that an architecture chooses ([N]), with the same operations. So a loss is written once, over
`codes.pre`, and is exact either way: where an entry is inactive its code and its gradients are zero.

Gradients are those of dense autograd, see `products`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dictionary_learning.kernels import Entries, Kernels
from dictionary_learning.kernels.products import Bags, DenseDecode, DenseEncode, PerLatent, Select, linear, scratch
from dictionary_learning.kernels.select import batch_top_k, places, top_k
from dictionary_learning.profiling import span

EncoderDtype = Literal["fp32", "tf32", "bf16"]
FILL = -1e30  # a pre-activation that no cutoff lets through; finite, since 0 times it must be 0
SLACK = 0.25  # candidates beyond k that a product of reduced precision proposes, to be chosen from in full precision


class Encoder(NamedTuple):
    """x -> (x - pre_bias) W^T + bias."""

    W_FD: Tensor
    bias_F: Tensor | None = None
    pre_bias_D: Tensor | None = None


class Codes(ABC):
    """Values of a [B, F] code matrix: `pre` holds the pre-activations, [B, F] or [N], with gradients.

    Every tensor of values given to a method has the shape of `pre`.
    """

    pre: Tensor
    n_rows: int  # B

    @abstractmethod
    def per_latent(self, v_F: Tensor) -> Tensor:
        """What there is once a latent, as it broadcasts against `pre`; differentiable."""

    @abstractmethod
    def relu(self) -> Tensor:
        """max(pre, 0); cheaper than that, for a loss that needs nothing else of `pre`."""

    @abstractmethod
    def decode(self, values: Tensor, W_FD: Tensor, weights_F: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """([B, D] codes times decoder rows, scalar sum of the codes, weighted by latent if `weights_F` is given)."""

    @abstractmethod
    def row_sums(self, values: Tensor) -> Tensor:
        """[B] sum of each row's values."""

    @abstractmethod
    def firings(self, values: Tensor) -> Tensor:
        """[F] in how many rows each latent has a positive value. (`values` without a gradient.)"""


class SparseCodes(Codes):
    """Codes on N entries. `real_N` is false at entries that only fill up a fixed number (None: all are real); `full`
    says (as a scalar on the device) whether none of these does, so that there may have been more than room."""

    full: Tensor | None = None

    def __init__(self, pre_N: Tensor, entries: Entries, kernels: Kernels, real_N: Tensor | None = None) -> None:
        self.pre, self.entries, self.kernels, self.n_rows = pre_N, entries, kernels, entries.n_rows
        if real_N is not None:
            self.pre = torch.where(real_N, pre_N, FILL)
            self.full = real_N[-1]

    def per_latent(self, v_F: Tensor) -> Tensor:
        return PerLatent.apply(v_F, self.entries, self.kernels)

    def relu(self) -> Tensor:
        return torch.relu(self.pre)

    def decode(self, values: Tensor, W_FD: Tensor, weights_F: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_hat_BD = Bags.apply(values, W_FD, self.entries, self.kernels)
        return x_hat_BD, (values if weights_F is None else values * self.per_latent(weights_F)).sum()

    def decode_parts(self, values: Tensor, W_FD: Tensor, part_F: Tensor, parts: int) -> Tensor:
        """[B, parts, D] the reconstruction by each part of the latents; `part_F` says which part one belongs to."""
        e = self.entries
        part_row_N, order = (e.rows_N * parts + part_F[e.latents_N]).sort(stable=True)
        split = Entries.of_pairs(e.latents_N[order], part_row_N, e.n_rows * parts, e.n_latents)
        return Bags.apply(values[order], W_FD, split, self.kernels).view(e.n_rows, parts, -1)

    def row_sums(self, values: Tensor) -> Tensor:
        if values.device.type == "cpu":
            return values.new_zeros(self.n_rows).index_add(0, self.entries.rows_N, values)
        # A decoding: CUDA's index_add adds up in another order each time.
        return Bags.apply(values, values.new_ones(self.entries.n_latents, 1), self.entries, self.kernels)[:, 0]

    def firings(self, values: Tensor) -> Tensor:
        return self.kernels.latent_sums((values > 0).to(values.dtype), self.entries)


class DenseCodes(Codes):
    def __init__(self, product: Preactivations) -> None:
        self._inputs, self.n_rows = (product.x_BD, product.centered_BD, *product.encoder), len(product.x_BD)
        self._decoded = 0

    @cached_property
    def pre(self) -> Tensor:  # type: ignore[override]
        return DenseEncode.apply(*self._inputs, False)

    def per_latent(self, v_F: Tensor) -> Tensor:
        return v_F

    def relu(self) -> Tensor:
        return DenseEncode.apply(*self._inputs, True)

    def decode(self, values: Tensor, W_FD: Tensor, weights_F: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._decoded += 1
        return DenseDecode.apply(values, W_FD, weights_F, f"gradient {self._decoded}")

    def row_sums(self, values: Tensor) -> Tensor:
        return values.sum(-1)

    def firings(self, values: Tensor) -> Tensor:
        # Written as numbers: summing or counting booleans takes ten times as long on CPU.
        return torch.gt(values, 0, out=scratch("positive", values.shape, values.dtype, values.device)).sum(0)


class Preactivations:
    """The pre-activations of a batch, for reading until the next are formed.

    Args:
        x_BD: the encoder's input.
        encoder_dtype: precision of the dense product. Where it is less than fp32, it only proposes entries: the k
            largest are chosen, and all values computed, in full precision. (Which lie `above` a cutoff it decides.)
    """

    def __init__(self, x_BD: Tensor, encoder: Encoder, kernels: Kernels, encoder_dtype: EncoderDtype = "fp32") -> None:
        self.x_BD, self.encoder, self.kernels = x_BD, encoder, kernels
        with torch.no_grad():
            self.centered_BD = x_BD if encoder.pre_bias_D is None else x_BD - encoder.pre_bias_D
        on_cuda = x_BD.device.type == "cuda"
        self.reduced = encoder_dtype if encoder_dtype == "bf16" or (encoder_dtype == "tf32" and on_cuda) else None
        self._matrix: Tensor | None = None

    @property
    @torch.no_grad()
    def _matrix_BF(self) -> Tensor:
        if self._matrix is None:
            x_BD, W_FD, bias_F = self.centered_BD, self.encoder.W_FD, self.encoder.bias_F
            if self.reduced == "bf16":
                W_FD = scratch("weights", W_FD.shape, torch.bfloat16, W_FD.device).copy_(W_FD)
                x_BD, bias_F = x_BD.bfloat16(), None if bias_F is None else bias_F.bfloat16()
            out = scratch("pre", (len(x_BD), len(W_FD)), x_BD.dtype, x_BD.device)
            with span("encoder product"), _tf32(self.reduced == "tf32"):
                self._matrix = linear(x_BD, W_FD, bias_F, out)
            self._written = self._matrix._version
        elif self._matrix._version != self._written:
            raise RuntimeError("the pre-activations of this batch have been written over by those of another")
        return self._matrix

    def dense(self) -> DenseCodes:
        """All F latents. (In full precision: a dense step has nothing to recompute them from.)"""
        return DenseCodes(self)

    def top_k(self, k: int, among_F: Tensor | None = None) -> SparseCodes:
        """The k largest of each row, at `among_F` (bool) if given: where that has fewer than k, others fill up."""
        pre_BF = self._matrix_BF
        if among_F is not None:
            pre_BF = pre_BF.masked_fill(~among_F, -torch.inf)
        if self.reduced is None:
            indices_Bk = top_k(pre_BF, k)
            return self._codes(Entries.of_rows(indices_Bk, pre_BF.shape[1]), pre_BF.gather(1, indices_Bk).view(-1))
        proposed_BK = top_k(pre_BF, min(_with_slack(k), pre_BF.shape[1]))
        values_BK = self._recompute(Entries.of_rows(proposed_BK, pre_BF.shape[1])).view(proposed_BK.shape)
        if among_F is not None:
            values_BK = values_BK.masked_fill(~among_F[proposed_BK], -torch.inf)
        picked_Bk = values_BK.topk(k, dim=-1, sorted=False).indices
        entries = Entries.of_rows(proposed_BK.gather(1, picked_Bk), pre_BF.shape[1])
        return self._codes(entries, values_BK.gather(1, picked_Bk).view(-1))

    def batch_top_k(self, number: int, scale_F: Tensor | None = None) -> SparseCodes:
        """The `number` largest of the batch; with `scale_F` the largest after each latent's are multiplied by it."""
        pre_BF = self._matrix_BF
        rows, latents = pre_BF.shape
        ranked_BF = pre_BF if scale_F is None else pre_BF * scale_F
        proposed = number if self.reduced is None else min(_with_slack(number), rows * latents)
        entries = Entries.of_flat(batch_top_k(ranked_BF, proposed), rows, latents)
        if self.reduced is None:
            return self._codes(entries, pre_BF[entries.rows_N, entries.latents_N])
        values_N = self._recompute(entries)
        ranked_N = values_N if scale_F is None else values_N * scale_F[entries.latents_N]
        kept = ranked_N.topk(number, sorted=False).indices.sort().values
        entries = Entries.of_pairs(entries.latents_N[kept], entries.rows_N[kept], rows, latents)
        return self._codes(entries, values_N[kept])

    def group_max(self, k: int) -> SparseCodes:
        """The largest of each of k groups of neighbouring latents (of a product of reduced precision: its largest)."""
        pre_BF = self._matrix_BF
        size = pre_BF.shape[1] // k
        indices_Bk = pre_BF.view(len(pre_BF), k, size).argmax(-1) + torch.arange(
            0, k * size, size, device=pre_BF.device
        )
        entries = Entries.of_rows(indices_Bk, pre_BF.shape[1])
        values_N = pre_BF.gather(1, indices_Bk).view(-1) if self.reduced is None else self._recompute(entries)
        return self._codes(entries, values_N)

    def above(self, cutoff_F: Tensor | float, capacity: int | None = None) -> SparseCodes:
        """Those above a cutoff. `capacity` (for CUDA) fixes their number, see `select.places`."""
        pre_BF = self._matrix_BF
        flat_N, real_N = places(pre_BF > cutoff_F, capacity)
        entries = Entries.of_flat(flat_N, *pre_BF.shape)
        values_N = pre_BF.view(-1)[flat_N] if self.reduced is None else self._recompute(entries)
        return self._codes(entries, values_N, real_N)

    def _recompute(self, entries: Entries) -> Tensor:
        """[N] pre-activations in full precision."""
        with torch.no_grad():
            values_N = self.kernels.dots(self.centered_BD, entries, self.encoder.W_FD)
            return values_N if self.encoder.bias_F is None else values_N + self.encoder.bias_F[entries.latents_N]

    def _codes(self, entries: Entries, values_N: Tensor, real_N: Tensor | None = None) -> SparseCodes:
        pre_N = Select.apply(values_N, self.x_BD, self.centered_BD, *self.encoder, entries, self.kernels)
        return SparseCodes(pre_N, entries, self.kernels, real_N)


def _with_slack(k: int) -> int:
    return k + max(8, math.ceil(SLACK * k))


class _tf32:
    """Inside, fp32 products on CUDA run in TF32."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __enter__(self) -> None:
        if self.on:
            self.before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True

    def __exit__(self, *_: Any) -> None:
        if self.on:
            torch.backends.cuda.matmul.allow_tf32 = self.before
