"""The typed configuration of a run, from what users edit (`Preset`, `Sweep` in demo_config.py) to what is recorded.

`Preset` says which model, corpus and sizes fit together, `Sweep` what to train at each hook point. Resolved with the
command line they give one `RunConfig`, which holds every number of the run and goes to and from JSON or YAML; an error
names the field.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.untrusted import plain_json, plain_yaml, shown

CONFIG_VERSION = 1
DEBUG = False  # scripts written for the dictionary-learning package read it; nothing here has a debugging mode
_STRICT = {"extra": "forbid", "allow_inf_nan": False}  # unknown keys and NaN are errors
_SIZES = ("num_tokens", "ctx_len", "harvest_contexts", "buffer_contexts", "batch_size", "eval_tokens", "eval_contexts")


@dataclass(frozen=True)
class SentenceSettings:
    """How a sentence encoder (a sentence-transformers model) is read."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    level: str = "text"
    """text: one embedding a text; token: the states of its tokens."""
    prompt: str | None = None
    """Put before every text; None is the model's own default, "" none."""
    normalize: bool = False
    """Scale embeddings to unit length, whether or not the model does."""

    def __post_init__(self) -> None:
        from dictionary_learning.activations.sentence_encoder import check_level

        check_level(self.level, normalize=self.normalize)


@dataclass(frozen=True)
class Preset:
    """A model with a corpus and the sizes that fit it."""

    model_name: str
    """A model on the Hub, a local folder, or "embedded"."""
    corpus: str
    layers: tuple[int, ...]
    widths: tuple[int, ...]
    """Latents of a dictionary."""
    num_tokens: int
    """Activations to train on."""
    ctx_len: int = 128
    """Tokens in a context; of a sentence encoder, those at which a text is cut."""
    harvest_contexts: int = 32
    """Contexts (of a sentence encoder: texts) in one forward of the model."""
    buffer_contexts: int = 1024
    """Contexts' worth of activations that the buffer mixes; where there is one embedding a text, of texts."""
    batch_size: int = 2048
    """Activations in a training step."""
    dtype: str = "float32"
    """Of the model and the buffer; dictionaries train in float32."""
    encoder_dtype: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of the dictionaries' encoder product: fp32, tf32 or bf16."""
    eval_tokens: int = 20_000
    eval_contexts: int = 16
    """Contexts in one forward of the evaluation."""
    sentence: SentenceSettings | None = None
    """Of a sentence encoder; None is a language model."""


@dataclass(frozen=True)
class Sweep:
    """What to train at each hook point: every combination of what stands here."""

    architectures: tuple[str, ...]
    sparsities: Mapping[str, Mapping[str, tuple[float, ...]]]
    """Architecture -> {the trainer's sparsity argument: its values}."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Architecture -> further arguments of its trainer, the same for all its dictionaries."""
    learning_rates: tuple[float | None, ...] = (None,)
    """None is the rule that fits width and length."""
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class DictionarySpec:
    """One dictionary of a run."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    architecture: str
    hook_point: str
    width: int
    sparsity: dict[str, float]
    lr: float | None = None
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the trainer."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"The width of a dictionary must be positive, got {self.width}.")
        try:
            json.dumps(self.settings, allow_nan=False)
        except (TypeError, ValueError) as error:  # YAML has dates and NaN
            raise UserError(f"The settings of a dictionary must be what JSON can hold: {error}.") from None
        _check_seed(self.seed)

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of the trainer that this spec decides."""
        return {
            "dict_size": self.width,
            "lr": self.lr,
            "seed": self.seed,
            "submodule_name": self.hook_point,
            **{name: int(v) if float(v).is_integer() else v for name, v in self.sparsity.items()},
            **self.settings,
        }

    @property
    def label(self) -> str:
        """A short name for tables and logs."""
        sparsity = " ".join(f"{name}={value:g}" for name, value in self.sparsity.items())
        return f"{self.architecture} {sparsity} m={self.width} {self.hook_point}"


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    model_name: str
    corpus: str
    dictionaries: list[DictionarySpec]
    num_tokens: int
    ctx_len: int
    harvest_contexts: int
    buffer_contexts: int
    batch_size: int
    dtype: str
    eval_tokens: int
    eval_contexts: int
    heldout_fraction: float = 0.05
    remove_bos: bool = True
    max_activation_norm_multiple: float | None = 10.0
    normalize_activations: bool = True
    seed: int = 0
    encoder_dtype: Literal["fp32", "tf32", "bf16"] = "fp32"
    sentence: SentenceSettings | None = None
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        if not self.dictionaries:
            raise UserError("The run has no dictionaries: name at least one architecture and one sparsity.")
        if self.sentence is not None:
            self._check_sentence(self.sentence)
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 < self.heldout_fraction < 1:
            raise UserError(f"heldout_fraction must lie between 0 and 1, got {self.heldout_fraction}.")
        if self.num_tokens < self.batch_size:
            raise UserError(f"num_tokens {self.num_tokens} is less than one batch of {self.batch_size} activations.")
        if self.max_activation_norm_multiple is not None and self.max_activation_norm_multiple < 1:
            raise UserError(
                "max_activation_norm_multiple counts medians and must be at least 1, or null for no filter, got "
                f"{self.max_activation_norm_multiple}."
            )
        _check_seed(self.seed)

    def _check_sentence(self, sentence: SentenceSettings) -> None:
        if self.max_activation_norm_multiple is not None:
            raise UserError("max_activation_norm_multiple is for language models: with sentence settings, write null.")
        if sentence.level == "text" and not self.remove_bos:
            raise UserError("remove_bos: false keeps special tokens, which the embedding of a text has none of.")

    @property
    def rows_per_context(self) -> int:
        """Activations that a context (of a sentence encoder: a text) gives at most."""
        return 1 if self.sentence is not None and self.sentence.level == "text" else self.ctx_len

    @property
    def steps(self) -> int:
        """Training steps: whole batches in `num_tokens`."""
        return self.num_tokens // self.batch_size

    @property
    def hook_points(self) -> list[str]:
        """The hook points of the dictionaries, each once."""
        return list(dict.fromkeys(spec.hook_point for spec in self.dictionaries))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def resolve(
    preset: Preset,
    sweep: Sweep,
    *,
    hook_points: Sequence[str],
    architectures: Sequence[str] | None = None,
    widths: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    learning_rates: Sequence[float] | None = None,
    **changes: Any,
) -> RunConfig:
    """The configuration of a run: a preset, a sweep, and what the command line gave in their place.

    Raises:
        UserError: an architecture that is unknown or has no sparsities in the sweep, a bad size, a repeated
            dictionary, a single value where the sweep lists values.
    """
    from dictionary_learning.trainers import trainer_class

    named = _several("architectures", architectures or sweep.architectures)
    others = (
        _several("widths", widths or preset.widths),
        _several("learning_rates", learning_rates or sweep.learning_rates),
        _several("seeds", seeds or sweep.seeds),
    )
    specs = []
    for hook_point, architecture in itertools.product(hook_points, named):
        trainer_class(architecture)
        choices = {name: _several(name, values) for name, values in sweep.sparsities.get(architecture, {}).items()}
        if not choices or not all(choices.values()):
            raise UserError(f"The sweep has no sparsities for '{architecture}': add them to demo_config.py.")
        sparsities = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
        further = _plain(sweep.settings.get(architecture, {}))
        specs += [
            DictionarySpec(architecture, hook_point, width, sparsity, lr, seed, dict(further))
            for width, sparsity, lr, seed in itertools.product(others[0], sparsities, *others[1:])
        ]
    for index, spec in enumerate(specs):
        if spec in specs[:index]:
            raise UserError(f"The sweep names the dictionary '{spec.label}' twice.")
    shared = {f.name for f in dataclasses.fields(Preset)} & {f.name for f in dataclasses.fields(RunConfig)}
    values = {name: getattr(preset, name) for name in shared}
    values |= {name: value for name, value in changes.items() if value is not None}
    if values["sentence"] is not None:
        values.setdefault("max_activation_norm_multiple", None)
    return RunConfig(dictionaries=specs, **values)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back from JSON."""
    return json.loads(json.dumps(dict(settings)))


def _several(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"The sweep lists values of {name}: write ({values!r},) in place of {values!r}.")
    return list(values)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"A seed must be at least 0 and below 2^63, got {seed}.")


def config_from_dict(data: Any, where: str = "configuration") -> RunConfig:
    """A checked `RunConfig` from plain data.

    Raises:
        UserError: names the field that is unknown, missing or of the wrong kind.
    """
    import pydantic

    if isinstance(data, Mapping) and data.get("version", CONFIG_VERSION) != CONFIG_VERSION:
        raise UserError(f"{where}: version {shown(data['version'])} is not {CONFIG_VERSION}, which this program reads.")
    try:
        return pydantic.TypeAdapter(RunConfig).validate_python(data)
    except pydantic.ValidationError as error:
        errors = error.errors()  # a mistyped field is unknown under one name and missing under the other
        first = next((e for e in errors if e["type"] == "unexpected_keyword_argument"), errors[0])
        place = f"field '{shown('.'.join(map(str, first['loc'])))}'" if first["loc"] else "the top level"
        if first["type"] == "unexpected_keyword_argument":
            owners = {"dictionaries": DictionarySpec, "sentence": SentenceSettings}
            owner = owners.get(str(first["loc"][0]), RunConfig) if len(first["loc"]) > 1 else RunConfig
            known = [f.name for f in dataclasses.fields(owner)]
            raise UserError(f"{where}: unknown {place}.{did_you_mean(first['loc'][-1], known)}") from None
        if first["type"] == "value_error":  # from __post_init__, which says it all
            raise UserError(f"{where}: {first['ctx']['error']}") from None
        raise UserError(f"{where}: {place}: {first['msg']}.") from None


def load_config(path: Path) -> RunConfig:
    """Read a configuration from a .json or .yaml file, or from a run's run.json.

    Raises:
        UserError: the file is absent or damaged, or a field is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"The configuration '{path}' can't be read: {why}.") from error
    form = "JSON" if path.suffix == ".json" else "YAML"
    try:
        data = plain_json(text) if form == "JSON" else plain_yaml(text)
    except Exception as error:  # PyYAML passes on whatever its constructors stumble over
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"The configuration '{path}' is not valid {form}: {shown(why, 300)}.") from error
    if isinstance(data, dict) and "config" in data:  # a run.json
        data = data["config"]
    return config_from_dict(data, str(path))


def changed_fields(old: RunConfig, new: RunConfig) -> list[str]:
    """Names of the fields in which two configurations differ."""
    before, after = old.to_dict(), new.to_dict()
    return [name for name in after if before[name] != after[name]]
