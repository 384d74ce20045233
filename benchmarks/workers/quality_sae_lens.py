"""sae-lens 6.54.0: its trainer's own `fit` over the run, at its defaults but for what is asked (`settings`: lr,
l1_coefficient). What is handed over is the dictionary that it saves for use: of BatchTopK with its threshold."""

from __future__ import annotations

import tempfile
from typing import Any

from quality_common import Clock, Task, Trained, main
from sae_lens import SAE, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens_worker import CONFIGS

DEFAULT_LR = 3e-4


def train(task: Task) -> tuple[float, Trained]:
    asked = dict(task.settings)
    lr = asked.pop("lr", DEFAULT_LR)
    sae = dictionary(task, asked)
    config = SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        device="cpu",
        lr=lr,
        lr_end=lr / 10,  # its runners' default; the rate is constant by default
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, task.batches())
    with Clock() as clock:
        trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved: Any = SAE.load_from_disk(folder)
    if getattr(saved.cfg, "rescale_acts_by_decoder_norm", False):
        saved.fold_W_dec_norm()
        saved.cfg.rescale_acts_by_decoder_norm = False
    arrays = {
        "encoder_FD": saved.W_enc.T,
        "encoder_bias_F": saved.b_enc,
        "decoder_FO": saved.W_dec,
        "decoder_bias_O": saved.b_dec,
        "threshold_F": getattr(saved, "threshold", None),
    }
    activation = {"topk": "topk", "jumprelu": "jumprelu", "standard": "relu"}[saved.cfg.architecture()]
    subtracts = bool(saved.cfg.apply_b_dec_to_input)
    return clock.seconds, Trained(arrays, activation, subtracts, False, saved, {"lr": lr} | asked)


def dictionary(task: Task, more: dict[str, Any]) -> Any:
    if "top_k" in task.architecture:
        more = more | {"k": task.k}
    if "matryoshka" in task.architecture:
        m = task.m
        more = more | {"matryoshka_widths": [m // 16, m * 3 // 16, m * 7 // 16, m]}
    config = CONFIGS[task.architecture](d_in=task.d, d_sae=task.m, device="cpu", **more)
    return get_sae_training_class(config.architecture())[0](config)


if __name__ == "__main__":
    main(train)
