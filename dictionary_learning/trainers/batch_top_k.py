"""The BatchTopK SAE's loss: TopK's, where k is the mean number of active latents over a batch.

Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv:2412.06410), section 3.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from dictionary_learning.dictionary import BatchTopKSAE, Dictionary
from dictionary_learning.kernels.codes import Preactivations, SparseCodes
from dictionary_learning.trainers.top_k import SharedTopK, TopKTrainer, geometric_median

__all__ = ["BatchTopKSAE", "BatchTopKTrainer"]


class BatchTopKTrainer(TopKTrainer, architecture="batch_top_k"):
    """The k * B largest pre-activations of a batch are active; `ae.threshold` takes their place afterwards.

    `threshold_beta` None gives the threshold a memory of a fiftieth of the run, at most 1,000 steps, so that it has
    caught up with the weights by the end.
    """

    geometric_median = staticmethod(geometric_median)

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int | None,
        lm_name: str | None,
        dict_class: type[Dictionary] = BatchTopKSAE,
        lr: float | None = None,
        auxk_alpha: float = 1 / 8,
        warmup_steps: int | None = None,
        decay_start: int | None = None,
        threshold_beta: float | None = None,
        threshold_start_step: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        wandb_name: str | None = "BatchTopKSAE",
        submodule_name: str | None = None,
        **shared: Unpack[SharedTopK],
    ) -> None:
        super().__init__(
            steps,
            activation_dim,
            dict_size,
            k,
            layer,
            lm_name,
            dict_class,
            lr,
            auxk_alpha,
            warmup_steps,
            decay_start,
            1 - 1 / max(2.0, min(1000.0, steps / 50)) if threshold_beta is None else threshold_beta,
            threshold_start_step,
            seed,
            device,
            wandb_name,
            submodule_name,
            **shared,
        )

    def select(self, pre: Preactivations, k: int) -> SparseCodes:
        return pre.batch_top_k(k * len(pre.x_BD))

    def smallest_active(self, values_N: Tensor, positive_N: Tensor, codes: SparseCodes) -> Tensor:
        smallest = values_N.masked_fill(~positive_N, torch.inf).amin()
        return torch.where(smallest.isinf(), torch.nan, smallest)
