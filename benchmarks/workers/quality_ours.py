"""Ours: each trainer at its defaults but for the sizes and the asked L0, on activations of unit mean squared norm, as
a run's configuration has them by default. The factor is folded into the weights, so the dictionary takes raw rows."""

from __future__ import annotations

import itertools
from typing import Any

from quality_common import Clock, Task, Trained, main

from dictionary_learning.formats.coder import as_coder
from dictionary_learning.trainers import SAETrainer, trainer_class

NORM_BATCHES = 100
SHOWN = ("lr", "warmup_steps", "decay_start", "auxk_alpha", "l1_penalty", "sparsity_penalty", "bandwidth")


def train(task: Task) -> tuple[float, Trained]:
    trainer = make_trainer(task)
    squares = [float(x_BD.pow(2).sum(-1).mean()) for x_BD in itertools.islice(task.batches(), NORM_BATCHES)]
    norm = (sum(squares) / len(squares)) ** 0.5
    with Clock() as clock:
        for step, x_BD in enumerate(task.batches()):
            trainer.update(step, x_BD / norm)
    trainer.ae.scale_biases(norm)
    coder = as_coder(trainer.ae)
    arrays = {
        name: getattr(coder, name)
        for name in ("encoder_FD", "encoder_bias_F", "decoder_FO", "decoder_bias_O", "r_mag_F", "mag_bias_F")
    }
    arrays["threshold_F"] = coder.threshold_F if coder.activation == "jumprelu" else None
    settings = {name: trainer.config[name] for name in SHOWN if trainer.config.get(name) is not None}
    forward, promised = trainer.ae, trainer.ae.unit_norm_decoder
    return clock.seconds, Trained(arrays, coder.activation, coder.subtracts_bias, promised, forward, settings)


def make_trainer(task: Task) -> SAETrainer:
    cls = trainer_class(task.architecture)
    wanted: dict[str, Any] = {"k": task.k, "target_l0": task.k, "group_fractions": [1 / 16, 1 / 8, 1 / 4, 9 / 16]}
    more = {name: value for name, value in wanted.items() if name in cls.argument_names()} | task.settings
    sizes: dict[str, Any] = {"steps": task.steps, "activation_dim": task.d, "dict_size": task.m}
    return cls(**sizes, layer=None, lm_name=None, seed=task.seed, device="cpu", **more)


if __name__ == "__main__":
    main(train)
