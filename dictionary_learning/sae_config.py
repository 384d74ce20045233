"""The `config.yaml` of the tutorials: one sparse autoencoder and how it is trained.

In: a YAML file, or plain data. Out: an `SAEConfig`, every value of it checked, and from
that the dictionary, its trainer, or the file again. Names follow the tutorials; what is left out has a default.

    input_dims: 384
    n_features: 3072
    activation: relu          # or silu
    input_norm: true
    k: 32                     # or beta_l1: 0.1; one of the two
    tie_weights: false
    unit_norm_decoder: true
    epochs: 5                 # or num_steps
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pydantic

from dictionary_learning.dictionaries.configurable import KEYS, Activation, SparseAutoencoder
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.trainers.schedules import WARMUP_FRACTION, Scheduler
from dictionary_learning.untrusted import plain_yaml, shown

if TYPE_CHECKING:
    from dictionary_learning.trainers.trainer import SAETrainer

ALIASES = {"lr": "learning_rate"}  # another name -> ours
MOST_WARMUP_STEPS = 1000  # that `warmup_fraction` gives where it is left out


def _number(value: Any) -> Any:
    """YAML takes 1e-3, without a dot, for text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


# Strict: pydantic would take "4" and true for numbers, and "yes" for true.
Count = Annotated[int, pydantic.Field(ge=1, strict=True)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**63, strict=True)]
Flag = Annotated[bool, pydantic.Field(strict=True)]
Positive = Annotated[float, pydantic.Field(gt=0, strict=True), pydantic.BeforeValidator(_number)]
NotNegative = Annotated[float, pydantic.Field(ge=0, strict=True), pydantic.BeforeValidator(_number)]
Fraction = Annotated[float, pydantic.Field(ge=0, lt=1, strict=True), pydantic.BeforeValidator(_number)]
Part = Annotated[float, pydantic.Field(gt=0, lt=1, strict=True), pydantic.BeforeValidator(_number)]


@dataclass(frozen=True)
class SAEConfig:
    """A sparse autoencoder, and its training on a finite set of activations."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    input_dims: Count
    """Width of the activations."""
    n_features: Count
    """Latents."""
    activation: Activation = "relu"
    """relu or silu."""
    input_norm: Flag = True
    """Normalise every input over its own values (LayerNorm), and undo it on the reconstruction."""
    k: Count | None = None
    """Codes kept of an input: TopK's loss."""
    beta_l1: NotNegative | None = None
    """Weight of an L1 penalty, in place of k: the standard SAE's loss, for activations of unit norm."""
    tie_weights: Flag = False
    """One matrix for encoder and decoder."""
    unit_norm_decoder: Flag = True
    """Decoder rows keep norm 1."""

    learning_rate: Positive | None = None
    """Adam's peak rate (also: lr); null fits it to width and length."""
    batch_size: Count = 1024
    """Activations in a step."""
    epochs: Count | None = None
    """Passes over the training activations; 1 where num_steps is not given either."""
    num_steps: Count | None = None
    """Steps, in place of epochs."""
    scheduler: Scheduler = "wsd"
    """wsd, linear, cosine, plateau or constant."""
    warmup_fraction: Fraction | None = None
    """Of the steps, before the rate is whole; null is a twentieth, at most 1,000 steps."""
    grad_clip_norm: Positive | None = 1.0
    """Largest norm of all gradients together; null doesn't clip."""
    bf16: Flag = False
    """Encoder and decoder in bfloat16, weights in float32."""
    eval_steps: Count | None = None
    """Steps between two looks at the held-out loss; null looks 20 times."""
    save_best_only: Flag = False
    """Keep the dictionary of least held-out loss, not the last one."""
    heldout_fraction: Part = 0.1
    """Of the activations, never trained on."""
    random_seed: Seed = 0
    """Of the initial weights, the order of the activations, and their split."""
    device: str = "auto"
    """auto (cuda, mps, cpu: the first that is there), or one of them."""

    def __post_init__(self) -> None:
        if self.k is not None and self.beta_l1 is not None:
            raise UserError("give k (TopK) or beta_l1 (an L1 penalty), not both: leave one out, or write null.")
        if self.k is None and self.beta_l1 is None:
            raise UserError("give k (TopK) or beta_l1 (an L1 penalty): nothing else makes the codes sparse.")
        if self.k is not None and self.k > self.n_features:
            raise UserError(f"k must be at most n_features {self.n_features}, got {self.k}.")
        if self.epochs is not None and self.num_steps is not None:
            raise UserError("give epochs or num_steps, not both: leave one out, or write null.")

    @property
    def passes(self) -> int | None:
        """Passes over the activations; None where the number of steps is given."""
        return None if self.num_steps is not None else self.epochs or 1

    def steps(self, rows: int) -> int:
        """Training steps on so many activations: the last batch of an epoch may be shorter."""
        return self.num_steps or (self.epochs or 1) * -(-rows // self.batch_size)

    def dictionary(self) -> SparseAutoencoder:
        """An untrained autoencoder; weights from torch's default generator."""
        return SparseAutoencoder.from_config({name: getattr(self, name) for name in KEYS})

    def trainer_config(self, steps: int) -> dict[str, Any]:
        """A config for `trainSAE`, all but the device."""
        from dictionary_learning.trainers.sparse_autoencoder import SparseAutoencoderTrainer

        automatic = min(MOST_WARMUP_STEPS, int(WARMUP_FRACTION * steps))
        return {
            "trainer": SparseAutoencoderTrainer,
            "steps": steps,
            "activation_dim": self.input_dims,
            "dict_size": self.n_features,
            **{name: getattr(self, name) for name in KEYS[2:]},
            "lr": self.learning_rate,
            "scheduler": self.scheduler,
            "warmup_steps": automatic if self.warmup_fraction is None else int(self.warmup_fraction * steps),
            "grad_clip_norm": self.grad_clip_norm,
            "encoder_dtype": "bf16" if self.bf16 else "fp32",
            "seed": self.random_seed,
        }

    def trainer(self, steps: int, **more: Any) -> SAETrainer:
        """A trainer for so many steps, on the config's device; `more` are further arguments, or others.

        Raises:
            UserError: the device is not there.
        """
        from dictionary_learning.devices import resolve_device

        config = self.trainer_config(steps) | more
        config["device"] = resolve_device(config.get("device", self.device))
        return config.pop("trainer")(**config)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write it as YAML, every key with its value."""
        import yaml

        from dictionary_learning.storage import atomic_file

        with atomic_file(path) as handle:
            yaml.safe_dump(self.to_dict(), handle, sort_keys=False)


def sae_config_from_dict(data: Any, where: str = "configuration") -> SAEConfig:
    """A checked `SAEConfig` from plain data.

    Raises:
        UserError: names the key that is unknown (and the nearest right one), missing, doubled, of the wrong type or
            out of range.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected keys with values, such as 'input_dims: 384', got {_shown(data)}.")
    known = {field.name for field in dataclasses.fields(SAEConfig)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = ALIASES.get(key, key)
        if name not in known:
            raise UserError(f"{where}: unknown key '{shown(key)}'.{did_you_mean(key, sorted(known | set(ALIASES)))}")
        if name in values:
            raise UserError(f"{where}: '{key}' and '{_other(key)}' are two names of one setting: leave one out.")
        values[name] = value
    try:
        return pydantic.TypeAdapter(SAEConfig).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # from __post_init__, which says it all
            raise UserError(f"{where}: {first['ctx']['error']}") from None
        key = str(first["loc"][0])
        if first["type"] == "missing":
            raise UserError(f"{where}: the key '{key}' is missing.") from None
        hint = did_you_mean(first["input"], _choices(first)) if isinstance(first["input"], str) else ""
        wanted = first["msg"].replace("Input should be", "must be")
        raise UserError(f"{where}: '{key}' {wanted}, got {_shown(first['input'])}.{hint}") from None


def load_sae_config(path: Path) -> SAEConfig:
    """Read a config.yaml.

    Raises:
        UserError: the file is absent, no YAML, or see `sae_config_from_dict`.
    """
    try:
        data = plain_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"The configuration '{path}' can't be read: {why}.") from error
    except Exception as error:  # PyYAML passes on whatever its constructors stumble over
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"The configuration '{path}' is not valid YAML: {shown(why, 300)}.") from error
    return sae_config_from_dict(data, str(path))


def _other(key: str) -> str:
    return next((ours if key == alias else alias) for alias, ours in ALIASES.items() if key in (alias, ours))


def _choices(error: Any) -> list[str]:
    return [part.strip(" '") for part in str(error.get("ctx", {}).get("expected", "")).replace(" or ", ",").split(",")]


def _shown(value: Any) -> str:
    return shown(repr(value)) if isinstance(value, str | int | float | bool | None) else type(value).__name__
