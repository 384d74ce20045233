"""TopK dictionaries: k latents an input, k on average over a batch, nested prefixes of latents, one of each group."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, overload

import torch
from torch import Tensor

from dictionary_learning.dictionaries.base import Dictionary
from dictionary_learning.dictionaries.layouts import _LinearDictionary, _MatrixDictionary
from dictionary_learning.errors import UserError


class _ByK(Dictionary):
    """A dictionary with a number `k` of active latents.

    `threshold` is the running mean of the smallest kept activation; with it each latent is treated on its own, whatever
    the others do. It is negative until training has measured it.
    """

    measures_threshold: ClassVar[bool] = True

    k: Tensor
    threshold: Tensor

    def __init__(
        self, activation_dim: int, dict_size: int, k: int, *, output_dim: int | None = None, skip: bool = False
    ) -> None:
        super().__init__(activation_dim, dict_size, output_dim=output_dim, skip=skip)
        if not isinstance(k, int) or isinstance(k, bool) or not 0 < k <= dict_size:
            raise UserError(f"k must be a positive integer of at most the width {dict_size}, got {k!r}.")
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        if self.measures_threshold:
            self.register_buffer("threshold", torch.tensor(-1.0))

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], k: int | None = None, **kwargs: Any) -> Self:
        """`k` is needed for files that don't hold it.

        Raises:
            UserError: `k` is another than the file's.
        """
        if k is None:
            k = int(state["k"])
        elif "k" in state and k != int(state["k"]):
            raise UserError(f"This dictionary was trained with k = {int(state['k'])}, and k = {k} was asked for.")
        unmeasured = {"threshold": torch.tensor(-1.0)} if cls.measures_threshold else {}
        state = {**unmeasured, **state, "k": torch.tensor(k, dtype=torch.int)}
        return super().from_state_dict(state, k=k, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the package's order: k, then the device
        cls,
        path: str | os.PathLike[str],
        k: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> Self:
        """See `Dictionary.from_pretrained`; `k` is needed for files that don't hold it."""
        return super().from_pretrained(path, dtype, device, **(kwargs if k is None else {"k": k, **kwargs}))


class AutoEncoderTopK(_ByK, _LinearDictionary):
    """The TopK SAE: only the k largest ReLU pre-activations of each input are kept.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv:2406.04093), section 2.3.
    """

    decoder_bias_name = "b_dec"
    scaled_with_data = ("b_dec", "encoder.bias", "threshold")

    @overload
    def encode(self, x: Tensor, return_topk: Literal[False] = False, use_threshold: bool = False) -> Tensor: ...
    @overload
    def encode(
        self, x: Tensor, return_topk: Literal[True], use_threshold: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def encode(
        self, x: Tensor, return_topk: bool = False, use_threshold: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes [..., F]; with `return_topk` also their k values, their indices, and all ReLU pre-activations.

        Raises:
            UserError: `use_threshold` before it was measured.
        """
        acts_F = torch.relu(self.preactivations(x))
        if use_threshold:
            if self.threshold < 0:
                raise UserError("This TopK dictionary has no measured threshold: encode without use_threshold.")
            f = acts_F * (acts_F > self.threshold)
            if not return_topk:
                return f
            top = f.topk(int(self.k), dim=-1, sorted=False)
            return f, top.values, top.indices, acts_F
        top = acts_F.topk(int(self.k), dim=-1, sorted=False)
        f = torch.zeros_like(acts_F).scatter(-1, top.indices, top.values)
        return (f, top.values, top.indices, acts_F) if return_topk else f


class AutoEncoderGroupMax(_ByK, _LinearDictionary):
    """Group-max TopK: the latents are k groups of `group_size` neighbours, and of each only the largest may fire.

    As in EleutherAI's sparsify (activation "groupmax"). It needs no sorting, and at most k latents fire. It has no
    threshold: whether a latent fires depends on its neighbours alone, at any size.
    """

    decoder_bias_name = "b_dec"
    scaled_with_data = ("b_dec", "encoder.bias")
    measures_threshold = False

    group_size: Tensor

    def __init__(
        self, activation_dim: int, dict_size: int, k: int, *, output_dim: int | None = None, skip: bool = False
    ) -> None:
        super().__init__(activation_dim, dict_size, k, output_dim=output_dim, skip=skip)
        if dict_size % k:
            raise UserError(f"The {dict_size} latents can't be split into k = {k} groups of one size.")
        self.register_buffer("group_size", torch.tensor(dict_size // k, dtype=torch.int))

    @overload
    def encode(self, x: Tensor, return_topk: Literal[False] = False) -> Tensor: ...
    @overload
    def encode(self, x: Tensor, return_topk: Literal[True]) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def encode(self, x: Tensor, return_topk: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes [..., F]; with `return_topk` also each group's largest value, its index, and all ReLU
        pre-activations."""
        acts_F = torch.relu(self.preactivations(x))
        group_size = int(self.group_size)
        top = acts_F.unflatten(-1, (-1, group_size)).max(dim=-1)
        indices_k = top.indices + torch.arange(0, self.dict_size, group_size, device=acts_F.device)
        f = torch.zeros_like(acts_F).scatter(-1, indices_k, top.values)
        return (f, top.values, indices_k, acts_F) if return_topk else f

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], k: int | None = None, **kwargs: Any) -> Self:
        group_size = int(state["group_size"])
        dictionary = super().from_state_dict(state, k, **kwargs)
        if group_size * int(dictionary.k) != dictionary.dict_size:
            raise UserError(
                f"{int(dictionary.k)} groups of {group_size} are not the {dictionary.dict_size} latents of this file."
            )
        return dictionary


class _BatchTopK(_ByK):
    """Of a whole batch the k times B largest ReLU pre-activations are kept: k an input on average.

    That depends on the batch, so by default a latent fires above `threshold`, on its own. As long as that is negative,
    not yet measured, every positive pre-activation fires.
    """

    scaled_with_data = ("b_dec", "encoder.bias", "threshold")

    @overload
    def encode(self, x: Tensor, return_active: Literal[False] = False, use_threshold: bool = True) -> Tensor: ...
    @overload
    def encode(
        self, x: Tensor, return_active: Literal[True], use_threshold: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def encode(
        self, x: Tensor, return_active: bool = False, use_threshold: bool = True
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Codes [..., F] by the threshold, or without `use_threshold` by the k largest an input over the whole batch;
        with `return_active` also which latents fired [F] (bool), and all ReLU pre-activations."""
        acts_F = torch.relu(self.preactivations(x))
        if use_threshold:
            f = acts_F * (acts_F > self.threshold)
        else:
            flat = acts_F.flatten()
            top = flat.topk(int(self.k) * (flat.numel() // self.dict_size), sorted=False)
            f = torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(acts_F)
        f = self._of_active_groups(f)
        return (f, (f > 0).flatten(0, -2).any(0), acts_F) if return_active else f

    def _of_active_groups(self, f: Tensor) -> Tensor:
        """The codes that take part, where latents are in groups."""
        return f


class BatchTopKSAE(_BatchTopK, _LinearDictionary):
    """The BatchTopK SAE: in training k latents an input on average over the batch, afterwards by a threshold.

    Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv:2412.06410), section 3.
    """

    decoder_bias_name = "b_dec"


class MatryoshkaBatchTopKSAE(_BatchTopK, _MatrixDictionary):
    """A BatchTopK SAE whose latents are in groups, such that each prefix of groups is a dictionary of its own.

    Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders"
    (arXiv:2503.17547), section 3.

    Args:
        group_sizes: latents of each group, in order; they add up to the width.

    `active_groups` (all of them at first) is how many groups take part in `encode`.
    """

    scaled_with_data = ("b_dec", "b_enc", "threshold")

    group_sizes: Tensor

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        k: int,
        group_sizes: Sequence[int],
        *,
        output_dim: int | None = None,
        skip: bool = False,
    ) -> None:
        super().__init__(activation_dim, dict_size, k, output_dim=output_dim, skip=skip)
        sizes = list(group_sizes)
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes) or sum(sizes) != dict_size:
            raise UserError(f"group_sizes must be positive and add up to the width {dict_size}, got {sizes}.")
        self.register_buffer("group_sizes", torch.tensor(sizes))
        self.group_indices = list(itertools.accumulate(sizes, initial=0))  # where each group begins, and the end
        self.active_groups = len(sizes)

    @property
    def active_groups(self) -> int:
        """How many groups take part in `encode`, from the first on."""
        return self._active_groups

    @active_groups.setter
    def active_groups(self, number: int) -> None:
        groups = len(self.group_indices) - 1
        if not isinstance(number, int) or not 0 < number <= groups:
            raise UserError(f"active_groups must lie between 1 and the {groups} groups there are, got {number!r}.")
        self._active_groups = number

    def _of_active_groups(self, f: Tensor) -> Tensor:
        end = self.group_indices[self.active_groups]
        if end == self.dict_size:
            return f
        return torch.cat([f[..., :end], torch.zeros_like(f[..., end:])], dim=-1)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], k: int | None = None, **kwargs: Any) -> Self:
        return super().from_state_dict(state, k, group_sizes=state["group_sizes"].tolist(), **kwargs)
