"""What a run will cost, before it runs: dictionaries, parameters, bytes, tokens, and the time by a short probe."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dictionary_learning.activations.language_model import TracedLM
from dictionary_learning.activations.sentence_encoder import SentenceEncoder
from dictionary_learning.activations.types import ActivationSource
from dictionary_learning.config import DictionarySpec, RunConfig
from dictionary_learning.distributed.ranks import Ranks
from dictionary_learning.distributed.sharded import sharded_trainer_class
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.resume import carried_settings
from dictionary_learning.sentence_run import KEEP_MB
from dictionary_learning.slots import check_capacity
from dictionary_learning.trainers import trainer_class

OF_THE_RUN = {  # arguments of a trainer that `settings` can't hold
    *("steps", "activation_dim", "layer", "lm_name", "device", "encoder_dtype", "dict_class", "wandb_name"),
    *("submodule_name", "dict_size", "lr", "seed", "output_dim", "skip"),
}
FLOAT = 4  # bytes; dictionaries, their gradients and Adam's moments are float32
PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, rates in activations a second."""

    dictionaries: int
    parameters: int
    model_bytes: int
    buffer_bytes: int
    training_bytes: int
    disk_bytes: int
    steps: int
    tokens: int
    unit: str = "tokens"
    state_bytes: int = 0
    harvest_rate: float | None = None
    training_rate: float | None = None

    @property
    def device_bytes(self) -> int:
        """What must fit on the device: the model, the buffer, and all dictionaries with their optimisers."""
        return self.model_bytes + self.buffer_bytes + self.training_bytes

    @property
    def seconds(self) -> float | None:
        """Estimated time of the training, evaluation not counted."""
        if not self.harvest_rate or not self.training_rate:
            return None
        return self.tokens * (1 / self.harvest_rate + 1 / self.training_rate)

    def lines(self) -> list[tuple[str, str]]:
        """(name, value) pairs for a table."""
        rows = [
            ("dictionaries", f"{self.dictionaries:,}"),
            ("parameters", f"{self.parameters:,}"),
            (self.unit, f"{self.tokens:,} in {self.steps:,} steps"),
            (
                "on the device",
                f"{_size(self.device_bytes)} (model {_size(self.model_bytes)}, buffer "
                f"{_size(self.buffer_bytes)}, dictionaries {_size(self.training_bytes)})",
            ),
            ("on disk", _size(self.disk_bytes)),
            *([("a saved state", f"{_size(self.state_bytes)}, and as much host memory")] if self.state_bytes else []),
        ]
        if self.seconds is not None:
            rows += [
                ("harvest", f"{self.harvest_rate:,.0f} activations a second"),
                ("training", f"{self.training_rate:,.0f} activations a second through all dictionaries"),
                ("estimated time", _duration(self.seconds)),
            ]
        return rows


def plan_run(config: RunConfig, lm: TracedLM | SentenceEncoder, checkpoints: int = 0) -> Plan:
    """The sizes of a run; times are filled in by `probe`.

    Raises:
        UserError: a dictionary that can't be, such as one with k > width; a hook point that the model lacks.
    """
    widths = {point.name: point.width for point in lm.resolve(config.hook_points)}
    each = config.rows_per_context
    check_capacity(config.buffer_contexts, each, config.harvest_contexts * each, config.batch_size)
    parameters = [_parameters(spec, widths[spec.hook_point]) for spec in config.dictionaries]
    itemsize = torch.empty((), dtype=lm.dtype).element_size()
    row_bytes = sum(widths.values()) * itemsize
    buffer_bytes = config.buffer_contexts * each * row_bytes
    scratch = 4 * config.batch_size * max(spec.width for spec in config.dictionaries)  # pre-activations and their kin
    weights = sum(parameters) * FLOAT
    embeddings = config.sentence is not None and config.sentence.level == "text"
    kept = min(int(KEEP_MB * 1e6), config.num_tokens * row_bytes) if embeddings else 0
    state = 3 * weights + buffer_bytes + kept
    return Plan(
        dictionaries=len(config.dictionaries),
        parameters=sum(parameters),
        model_bytes=sum(p.numel() * p.element_size() for p in lm.module.parameters()),
        buffer_bytes=buffer_bytes,
        training_bytes=4 * weights + scratch * FLOAT,
        disk_bytes=(1 + checkpoints) * weights + 3 * state,  # two states kept while a third is written
        state_bytes=state,
        steps=config.steps,
        tokens=config.steps * config.batch_size,
        unit="embeddings" if embeddings else "tokens",
    )


def probe(
    plan: Plan,
    config: RunConfig,
    source: ActivationSource,
    device: torch.device,
    seconds: float = PROBE_SECONDS,
) -> Plan:
    """The plan with rates measured for `seconds`: half on harvesting, half on steps of each kind of dictionary."""
    began, rows, batch = time.perf_counter(), 0, None
    next(source)  # the first forward pays for warming up
    _wait(device)
    warm = time.perf_counter()
    while batch is None or time.perf_counter() - began < seconds / 2:
        batch = next(source, None)
        if batch is None:
            break
        rows += len(next(iter(batch.acts.values())))
        _wait(device)
    harvest_rate = rows / (time.perf_counter() - warm)

    kinds: dict[Any, int] = {}
    for spec in config.dictionaries:
        kind = (spec.architecture, spec.width, source.widths[spec.hook_point])
        kinds[kind] = kinds.get(kind, 0) + 1
    step_seconds = 0.0
    for (architecture, width, d), count in kinds.items():
        spec = next(s for s in config.dictionaries if (s.architecture, s.width) == (architecture, width))
        trainer = build_trainer(config, spec, d, None, device)
        x_BD = torch.randn(config.batch_size, d, device=device) / d**0.5
        trainer.update(0, x_BD)
        trainer.update(1, x_BD)
        _wait(device)
        start, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - start < seconds / 2 / len(kinds):
            trainer.update(min(2 + steps, config.steps - 1), x_BD)
            _wait(device)
            steps += 1
        step_seconds += count * (time.perf_counter() - start) / steps
        del trainer
    return replace(plan, harvest_rate=harvest_rate, training_rate=config.batch_size / step_seconds)


def build_trainer(
    config: RunConfig,
    spec: DictionarySpec,
    width: int,
    layer: int | None,
    device: Any,
    began: Mapping[str, Any] | None = None,
    shards: Ranks | None = None,
) -> Any:
    """The trainer of a dictionary of the run.

    Args:
        began: the settings that it began with, where the run is resumed: what follows from its length is taken from
            there, see `resume.FROM_LENGTH`.
        shards: ranks that its latents are split over.

    Raises:
        UserError: settings that its class can't take.
    """
    cls = trainer_class(spec.architecture) if shards is None else sharded_trainer_class(spec.architecture)
    given = {name: value for name, value in spec.trainer_arguments().items() if value is not None or name != "lr"}
    given |= {} if shards is None else {"ranks": shards}
    try:
        return cls(
            steps=config.steps,
            activation_dim=width,
            layer=layer,
            lm_name=config.model_name,
            device=device,
            encoder_dtype=config.encoder_dtype,
            **{**carried_settings(began, trainer_class(spec.architecture)), **given},
        )
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # an argument missing, or of another kind than the class computes with
        raise UserError(f"'{spec.label}' can't be made from its settings: {error}.") from error


def _parameters(spec: DictionarySpec, activation_dim: int) -> int:
    """Parameters of a dictionary, counted on one on the meta device, where nothing is drawn or filled."""
    for name in spec.settings:
        if name in OF_THE_RUN:
            raise UserError(f"The settings of '{spec.label}' can't hold '{name}': the run decides it.")
    signature = inspect.signature(trainer_class(spec.architecture))
    try:
        signature.bind(steps=1, activation_dim=activation_dim, layer=None, lm_name=None, **spec.trainer_arguments())
    except TypeError as error:  # a sparsity that is missing, or a setting that the run itself decides
        raise UserError(f"The settings of '{spec.label}' don't fit its architecture: {error}.") from error
    known = trainer_class(spec.architecture).argument_names()
    for name in spec.trainer_arguments():
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"The settings of '{spec.label}' don't fit its architecture: it has no '{name}'.{hint}")
    given = {"activation_dim": activation_dim, "group_sizes": [spec.width], **spec.trainer_arguments()}
    cls = signature.parameters["dict_class"].default
    with torch.device("meta"):
        dictionary = cls(**{name: given[name] for name in inspect.signature(cls).parameters if name in given})
    return sum(parameter.numel() for parameter in dictionary.parameters())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
