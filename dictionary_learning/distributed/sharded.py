"""One wide dictionary over all ranks: each holds some of the latents, their encoder and decoder rows and their moments.

In: batches that every rank has alike. Out: the step that one rank alone would make, to rounding. A rank computes the
pre-activations of its latents and proposes the k largest of each row; from all proposals every rank chooses the same k,
so the selection is exact. Partial reconstructions are added up. What belongs to no latent (the decoder bias, which is
the pre-bias too, and the threshold) every rank has alike, and makes the same step with.

A step sends, for B rows, world x B x k proposed values and a sum of [B, D], the reconstruction; and as much again for
AuxK where there are dead latents. Gradients stay where they are, but for that of the pre-bias, one [D].

States, settings and files are those of the unsharded trainer, so that each reads the other's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictionary_learning.dictionary import BatchTopKSAE, Dictionary
from dictionary_learning.distributed.ranks import Ranks
from dictionary_learning.errors import UserError
from dictionary_learning.kernels import kernels_for
from dictionary_learning.kernels.codes import Encoder, Preactivations, SparseCodes
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.dead_latents import COUNT_INTERVAL, AuxK
from dictionary_learning.trainers.optimizer import DictionaryOptimizer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer, _ByKTrainer
from dictionary_learning.trainers.trainer import SAETrainer

SPLIT = {"encoder.weight": 0, "encoder.bias": 0, "decoder.weight": 1}  # parameter -> its dimension of latents


class _Sum(torch.autograd.Function):
    """The sum over ranks. Every rank computes the same loss from it, so its gradient is each part's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.total(x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Common(torch.autograd.Function):
    """What all ranks have alike, where each uses it for its latents: its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.total(grad.clone()), None


def chosen_among_all(values_RN: Tensor, number: int, ranks: Ranks) -> Tensor:
    """[R, N] which of this rank's values are among the `number` largest of each row over all ranks. All ranks decide
    on the same values, so that together they choose exactly `number`, ties or not."""
    rows, own = values_RN.shape
    all_RM = ranks.stacked(values_RN.detach(), dim=1)
    chosen_RM = torch.zeros_like(all_RM, dtype=torch.bool)
    chosen_RM.scatter_(1, all_RM.topk(min(number, all_RM.shape[1]), dim=1, sorted=False).indices, True)
    return chosen_RM[:, ranks.rank * own : (ranks.rank + 1) * own]


class _Sharded(_ByKTrainer):
    """What is different where the latents are spread. `width` is the whole dictionary's, `ae` this rank's part."""

    def __init__(self, *, dict_size: int, ranks: Ranks, dict_class: type[Dictionary], **settings: Any) -> None:
        if dict_size % ranks.world:
            raise UserError(
                f"The {dict_size} latents can't be split over {ranks.world} ranks: choose a multiple of it."
            )
        k, own = settings["k"], dict_size // ranks.world
        if isinstance(k, int) and k > own:
            raise UserError(f"k = {k} is more than the {own} latents of each of the {ranks.world} ranks.")
        if settings.get("k_anneal_steps") is not None and own < settings["activation_dim"]:
            raise UserError(f"k can't be annealed where a rank has only {own} latents: leave out k_anneal_steps.")
        if settings.get("output_dim") is not None:
            raise UserError("A transcoder can't be split over ranks: spread whole dictionaries.")
        self.ranks, self.width = ranks, dict_size
        super().__init__(dict_size=dict_size, dict_class=_part_of(dict_class, ranks), **settings)
        self._optimizer = _ShardedOptimizer(self.ae, self.lr, ranks)
        self.tokens_since_fired_F = self.tokens_since_fired_F[:own].clone()
        self.top_k_aux = min(max(1, self.ae.output_dim // 2), dict_size)
        self.auxk = _ShardedAuxK(self, self.auxk_alpha, self.top_k_aux, self.auxk.dead_after_tokens)

    def preactivations(self, x_BD: Tensor) -> Preactivations:
        assert self.ae.pre_bias is not None
        encoder = Encoder(self.ae.encoder_rows, self.ae.encoder_bias, _Common.apply(self.ae.pre_bias, self.ranks))
        return Preactivations(x_BD, encoder, kernels_for(x_BD.device), self.encoder_dtype)

    def reconstruction(self, decoded_BD: Tensor, x_BD: Tensor) -> Tensor:
        return super().reconstruction(_Sum.apply(decoded_BD, self.ranks), x_BD)

    def metrics(self, x: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """As of one rank, of all latents; a message to all."""
        values = super().metrics(x, target)
        for name in ("l0", "nz_frac", "dead_latents"):
            if name in values:
                values[name] = sum(part[name] for part in self.ranks.everyone(values))
        return values | {"nz_frac": values["nz_frac"] / self.ranks.world}

    @property
    def config(self) -> dict[str, Any]:
        unsharded = next(c for c in type(self).__mro__ if c.__module__.startswith("dictionary_learning.trainers."))
        return super().config | {"trainer_class": unsharded.__name__, "dict_size": self.width}

    # ------------------------------------------------------------------------------------------- whole and part

    def whole_dictionary(self) -> Dictionary:
        """The dictionary of all ranks' latents, on every rank; takes part in a message to all."""
        state = self._whole(self.ae.state_dict(), self.ranks.stacked)
        return type(self.ae).from_state_dict(state).to(self.device)

    def _whole(self, parts: dict[str, Tensor], stacked: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
        return {n: stacked(x, SPLIT[n]) if n in SPLIT else x.clone() for n, x in parts.items()}

    def _part(self, x: Tensor, dim: int) -> Tensor:
        return x.chunk(self.ranks.world, dim)[self.ranks.rank].contiguous()

    def _of_moments(self, adam: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Adam's state with its moments of split parameters (kept by rows) changed."""
        optimizer = self._optimizer
        names = {id(leaf): name for name, leaf in optimizer.leaves.items()}
        order = [names[id(leaf)] for group in optimizer.adam.param_groups for leaf in group["params"]]
        state = {
            number: {
                key: change(x) if order[int(number)] in SPLIT and key in ("exp_avg", "exp_avg_sq") else x
                for key, x in moments.items()
            }
            for number, moments in adam["state"].items()
        }
        return adam | {"state": state}

    def state_dict(self) -> dict[str, Any]:
        """That of the unsharded trainer, on the first rank (on a GPU there may be no room for it); takes part in a
        message to it."""
        state, stacked = super().state_dict(), self.ranks.stacked_by_first
        return state | {
            "ae": self._whole(state["ae"], stacked),
            "optimizer": self._of_moments(state["optimizer"], stacked),
            "tokens_since_fired": stacked(state["tokens_since_fired"]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ae = {name: self._part(x, SPLIT[name]) if name in SPLIT else x for name, x in state["ae"].items()}
        part = {
            "ae": ae,
            "optimizer": self._of_moments(state["optimizer"], lambda x: self._part(x, 0)),
            "tokens_since_fired": self._part(state["tokens_since_fired"], 0),
        }
        super().load_state_dict(state | part)


class ShardedTopKTrainer(_Sharded, TopKTrainer):
    """TopK over ranks (see the module). For its settings see `TopKTrainer`; `ranks` are those it is spread over."""

    def __init__(self, *, dict_class: type[Dictionary] = AutoEncoderTopK, **settings: Any) -> None:
        super().__init__(dict_class=dict_class, **settings)

    def select(self, pre: Preactivations, k: int) -> SparseCodes:
        codes = pre.top_k(min(k, self.ae.dict_size))
        return _only(codes, chosen_among_all(codes.pre.view(codes.n_rows, -1), k, self.ranks))

    def smallest_active(self, values_N: Tensor, positive_N: Tensor, codes: SparseCodes) -> Tensor:
        smallest_B = values_N.masked_fill(~positive_N, torch.inf).view(codes.n_rows, -1).amin(dim=-1)
        smallest_B = self.ranks.smallest(smallest_B)
        return torch.where(smallest_B.isinf(), torch.nan, smallest_B).nanmean()


class ShardedBatchTopKTrainer(_Sharded, BatchTopKTrainer):
    """BatchTopK over ranks. For its settings see `BatchTopKTrainer`."""

    def __init__(self, *, dict_class: type[Dictionary] = BatchTopKSAE, **settings: Any) -> None:
        super().__init__(dict_class=dict_class, **settings)

    def select(self, pre: Preactivations, k: int) -> SparseCodes:
        number = k * len(pre.x_BD)
        codes = pre.batch_top_k(min(number, len(pre.x_BD) * self.ae.dict_size))
        return _only(codes, chosen_among_all(codes.pre.view(1, -1), number, self.ranks))

    def smallest_active(self, values_N: Tensor, positive_N: Tensor, codes: SparseCodes) -> Tensor:
        smallest = self.ranks.smallest(values_N.masked_fill(~positive_N, torch.inf).amin())
        return torch.where(smallest.isinf(), torch.nan, smallest)


SHARDED: dict[str, type[_Sharded]] = {"top_k": ShardedTopKTrainer, "batch_top_k": ShardedBatchTopKTrainer}


def sharded_trainer_class(architecture: str) -> type[SAETrainer]:
    """The trainer that spreads the latents of an architecture. Raises UserError where there is none."""
    if architecture not in SHARDED:
        raise UserError(
            f"The latents of '{architecture}' can't be split over ranks: that is for {', '.join(SHARDED)}; leave out "
            "--shard_latents."
        )
    return SHARDED[architecture]


def _only(codes: SparseCodes, real: Tensor) -> SparseCodes:
    return SparseCodes(codes.pre, codes.entries, codes.kernels, real.reshape(-1))


def _part_of(dict_class: type[Dictionary], ranks: Ranks) -> Any:
    """Makes this rank's latents of the dictionary that `dict_class` would make, so that all begin as it does."""

    def make(activation_dim: int, dict_size: int, k: int) -> Dictionary:
        state = dict_class(activation_dim, dict_size, k=k).state_dict()  # type: ignore[call-arg]
        part = {n: x.chunk(ranks.world, SPLIT[n])[ranks.rank] if n in SPLIT else x for n, x in state.items()}
        return dict_class.from_state_dict(copy.deepcopy(part))

    return make


class _ShardedOptimizer(DictionaryOptimizer):
    """Clips by the norm of all ranks' gradients, and stops where one of them is not finite."""

    def __init__(self, ae: Dictionary, lr: float, ranks: Ranks) -> None:
        super().__init__(ae, lr)
        self.ranks = ranks
        self._split = {id(self.leaves[name]) for name in SPLIT}

    @torch.no_grad()
    def step(self, lr: float, unit: float, clip: float | None, loss: Tensor) -> bool | None:
        """As of one rank, in passes: a fused step would not ask the other ranks in between."""
        self._collect_gradients(unit)
        for group in self.adam.param_groups:
            group["lr"] = lr * (unit if group["in_units"] else 1.0)
        return self._step_in_passes(clip, loss)

    def _squares(self, leaf: Tensor) -> Tensor:  # type: ignore[override]
        square = super()._squares(leaf)
        return self.ranks.total(square) if id(leaf) in self._split else square


class _ShardedAuxK(AuxK):
    """AuxK over the dead latents of all ranks."""

    def __init__(self, trainer: _Sharded, alpha: float, size: int, dead_after_tokens: int | None) -> None:
        super().__init__(trainer, alpha, size, dead_after_tokens)
        self.ranks, self.size = trainer.ranks, size

    def _loss(self, pre: Preactivations, residual_BD: Tensor) -> Tensor:
        dead_F = self.dead()
        codes = pre.top_k(min(self.size, self.trainer.ae.dict_size), among_F=dead_F)
        dead_N = dead_F[codes.entries.latents_N]  # where there are few dead latents, living ones had to be taken
        ranked_N = torch.where(dead_N, codes.pre.detach(), -torch.inf).view(codes.n_rows, -1)
        chosen_N = chosen_among_all(ranked_N, self.size, self.ranks).reshape(-1)
        values_N = torch.relu(codes.pre) * (dead_N & chosen_N)
        x_hat_BD = _Sum.apply(codes.decode(values_N, self.trainer.ae.decoder_rows)[0], self.ranks)
        error = (residual_BD - x_hat_BD).pow(2).sum(-1).mean()
        variance = residual_BD.var(dim=0, correction=0).sum()
        fade = (self.ranks.total(dead_F.sum()) / self.size).clamp(max=1.0)
        return fade * torch.where(variance > 0, error, 0.0) / torch.where(variance > 0, variance, 1.0)

    def after_update(self, step: int, rows: int) -> None:
        super().after_update(step, rows)
        if step % COUNT_INTERVAL == 0:  # all ranks must see dead latents in the same step
            self._count.send(self.ranks.total(self.dead().sum()))
