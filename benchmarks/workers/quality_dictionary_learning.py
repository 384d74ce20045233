"""dictionary-learning 0.1.0: each trainer's own `update` over the run, at its defaults but for what is asked.

`settings`: lr, l1_penalty, and `decay`, its linear fall to 0 over the last third. Warm-ups are cut to the length that
all have; so is the start of the thresholds' running mean where the run is shorter than it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from dictionary_learning_worker import settings as known_trainers
from quality_common import Clock, Task, Trained, main


def train(task: Task) -> tuple[float, Trained]:
    trainer = make_trainer(task)
    with Clock() as clock:
        for step, x_BD in enumerate(task.batches()):
            trainer.update(step, x_BD)
    shown = ("lr", "warmup_steps", "decay_start", "l1_penalty")
    settings = {name: getattr(trainer, name) for name in shown if getattr(trainer, name, None) is not None}
    return clock.seconds, as_arrays(trainer.ae, task.architecture, settings)


def make_trainer(task: Task) -> Any:
    config = known_trainers(task.architecture, task.d, task.m, task.k, "cpu") | {"steps": task.steps, "seed": task.seed}
    cls = config.pop("trainer")
    known = inspect.signature(cls.__init__).parameters
    given = dict(task.settings)
    if given.pop("decay", False):
        given["decay_start"] = task.steps * 2 // 3
    cut = {"warmup_steps": task.warmup, "sparsity_warmup_steps": task.warmup, "target_l0": float(task.k)}
    if task.steps <= 1000:
        cut["threshold_start_step"] = task.steps // 2
    torch.manual_seed(task.seed)  # its JumpReLU doesn't use its seed
    return cls(**config, **{name: value for name, value in cut.items() if name in known}, **given)


def as_arrays(ae: Any, architecture: str, settings: dict[str, Any]) -> Trained:
    if hasattr(ae, "W_enc"):
        encoder_FD, encoder_bias_F, decoder_FO = ae.W_enc.T, ae.b_enc, ae.W_dec
    else:
        encoder_FD, encoder_bias_F, decoder_FO = ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T
    threshold_F = None
    if architecture == "jump_relu":
        threshold_F = ae.threshold
    elif "batch_top_k" in architecture:  # negative until it is measured, and then all positive ones pass
        threshold_F = torch.full_like(encoder_bias_F, max(float(ae.threshold), 0.0))
    activation = "topk" if architecture == "top_k" else "relu" if threshold_F is None else "jumprelu"
    arrays = {
        "encoder_FD": encoder_FD,
        "encoder_bias_F": encoder_bias_F,
        "decoder_FO": decoder_FO,
        "decoder_bias_O": ae.bias if hasattr(ae, "bias") else ae.b_dec,
        "threshold_F": threshold_F,
    }
    subtracts = architecture != "jump_relu" or bool(getattr(ae, "apply_b_dec_to_input", False))
    return Trained(arrays, activation, subtracts, True, ae, settings)


if __name__ == "__main__":
    main(train)
