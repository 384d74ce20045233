"""Reading other people's files without trusting them, and the config that goes with a dictionary.

Every file comes from a stranger: nothing in it is executed (no pickle), no path in it is followed, sizes are looked at
before memory is taken for them, and what is missing, of another shape or not a number is one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dictionary_learning import untrusted
from dictionary_learning.dictionary import Dictionary, read_weights
from dictionary_learning.errors import UserError
from dictionary_learning.storage import finite, read_json, write_json, write_tensors
from dictionary_learning.untrusted import listed, shown

OWN_CONFIG = "config.json"
MAX_JSON_BYTES = 16 << 20


class Weights:
    """The named tensors of a file, handed out as finite float32 once their shapes are what they should be."""

    def __init__(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        self.tensors, self.file = dict(tensors), file

    @classmethod
    def load(cls, file: Path) -> Weights:
        """Raises UserError: see `read_weights`."""
        return cls(read_weights(file), file)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def matrix(self, name: str) -> Tensor:
        """The matrix of a name, whatever its sizes. Raises UserError: see `take`; it is no matrix."""
        found = self.tensors.get(name)
        if found is not None and (found.ndim != 2 or 0 in found.shape):
            raise UserError(
                f"The tensor '{name}' in '{self.file}' has the shape {list(found.shape)}, expected a matrix."
            )
        return self.take(name, *(found.shape if found is not None else ()))

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of a name and shape, which is then taken out.

        Raises:
            UserError: it is missing, of another shape, not floating point, or holds NaN or infinity.
        """
        if name not in self.tensors:
            raise UserError(f"'{self.file}' lacks the tensor '{name}'; it holds {listed(list(self.tensors))}.")
        tensor = self.tensors.pop(name)
        if tensor.shape != shape:
            raise UserError(
                f"The tensor '{name}' in '{self.file}' has the shape {list(tensor.shape)}, expected {list(shape)}."
            )
        if not tensor.is_floating_point():
            raise UserError(f"The tensor '{name}' in '{self.file}' is of type {tensor.dtype}, expected floating point.")
        tensor = tensor.to("cpu", torch.float32)
        if not torch.isfinite(tensor).all():
            raise UserError(f"The tensor '{name}' in '{self.file}' holds NaN or infinity: the file is damaged.")
        return tensor.contiguous()

    def finish(self) -> None:
        """Raises UserError when a tensor was not taken: what it would do to the codes is unknown."""
        if self.tensors:
            raise UserError(f"'{self.file}' holds tensors of no known meaning: {listed(sorted(self.tensors))}.")


def read_config(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError when it does not."""
    if file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"'{file}' is larger than {MAX_JSON_BYTES >> 20} MiB: it is no config.")
    config = read_json(file)
    try:
        untrusted.checked(config, bits=None)
    except ValueError as error:
        raise UserError(f"'{file}' can't be used: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"'{file}' should hold a JSON object, but holds a {type(config).__name__}.")
    return config


def positive_integer(config: Mapping[str, Any], key: str, file: Path, default: Any = None) -> int:
    """A config's whole number above zero. Raises UserError when it is missing or something else."""
    value = config.get(key, default)
    if value is None:
        raise UserError(f"'{file}' lacks '{key}'.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"'{key}' in '{file}' must be a positive integer, got {shown(repr(value))}.")
    return value


def check_size(config: Mapping[str, Any], key: str, size: int, file: Path) -> None:
    """Raises UserError when a config gives another size than the weights have; it may leave it out."""
    if config.get(key) is not None and positive_integer(config, key, file) != size:
        raise UserError(f"'{file}' says {key} = {shown(config[key])}, but the weights beside it have {size}.")


def folder_of(path: str | os.PathLike[str], *names: str) -> Path:
    """The folder of a dictionary: the path itself, or where it is a file of one of the `names`, the folder of that.

    Raises:
        UserError: there is no such folder, or the file is another.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        return given
    if not given.is_file():
        raise UserError(f"There is nothing at '{given}': give the folder of a dictionary.")
    if given.name not in names:
        raise UserError(f"'{given}' should be named {' or '.join(names)}, or be a folder with such a file.")
    return given.parent


def read_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file; pickled objects are never loaded, and a file that unpacks to a bomb is refused.

    Raises:
        UserError: it is not such a file.
    """
    try:
        return untrusted.read_npz(file)
    except UserError:
        raise
    except Exception as error:  # zipfile, numpy and zlib each have errors of their own; all mean that it can't be used
        raise UserError(f"'{file}' is not a readable .npz of plain arrays ({type(error).__name__}).") from error


def public_name(name: Any) -> str | None:
    """A model's or corpus' name as it may stand in a file for others: of a path on this machine, the last part."""
    if not isinstance(name, str) or not name:
        return None
    return PurePath(name).name if os.path.isabs(name) or name.startswith(("~", ".")) else name


class Facts(NamedTuple):
    """What one of our configs says about where a dictionary belongs, each of its type or None."""

    model: str | None
    hook_point: str | None
    layer: int | None
    ctx_len: int | None
    corpus: str | None
    adds_bos: bool
    masks_specials: bool


def part_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The "trainer" or "buffer" part of one of our configs, or an empty one."""
    part = config.get(name)
    return dict(part) if isinstance(part, Mapping) else {}


def text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def facts_of(config: Mapping[str, Any]) -> Facts:
    """What the writers need of a config; anything of another type than expected counts as not said."""
    trainer, buffer = part_of(config, "trainer"), part_of(config, "buffer")
    return Facts(
        model=public_name(trainer.get("lm_name")),
        hook_point=text(trainer.get("submodule_name")),
        layer=whole(trainer.get("layer")),
        ctx_len=whole(buffer.get("ctx_len")),
        corpus=public_name(config.get("corpus")),
        adds_bos=buffer.get("add_special_tokens") is not False,
        masks_specials=buffer.get("remove_bos") is True,
    )


def our_config(
    dictionary: Dictionary,
    *,
    format_name: str,
    source: Mapping[str, Any],
    lm_name: Any = None,
    hook_point: Any = None,
    layer: Any = None,
    ctx_len: Any = None,
) -> dict[str, Any]:
    """The config.json of an imported dictionary; `source` is what its own library said, kept as it was. What is not of
    the type it should be counts as not said."""
    trainer: dict[str, Any] = {
        "dict_class": type(dictionary).__name__,
        "activation_dim": dictionary.activation_dim,
        "dict_size": dictionary.dict_size,
        "layer": whole(layer),
        "lm_name": text(lm_name),
        "submodule_name": text(hook_point),
        "norm_factor": 1.0,
        "imported_from": {"format": format_name, "config": dict(source)},
    } | _transcoder_options(dictionary)
    if "k" in dictionary.state_dict():
        trainer["k"] = int(dictionary.state_dict()["k"])
    return {"trainer": trainer, "buffer": {} if whole(ctx_len) is None else {"ctx_len": ctx_len}}


def _transcoder_options(dictionary: Dictionary) -> dict[str, Any]:
    """What a config says of a transcoder besides."""
    if not dictionary.is_transcoder:
        return {}
    return {"output_dim": dictionary.output_dim, "skip": dictionary.W_skip is not None}


def write_own(
    dictionary: Dictionary, config: Mapping[str, Any], folder: Path, measured_F: Tensor | None = None
) -> None:
    """Our config.json beside the files of a format that has no place for model and hook point."""
    facts = facts_of(config)
    trainer: dict[str, Any] = {
        "dict_class": type(dictionary).__name__,
        "lm_name": facts.model,
        "layer": facts.layer,
        "submodule_name": facts.hook_point,
    } | _transcoder_options(dictionary)
    if measured_F is not None:
        trainer["threshold"] = float(measured_F[0])
    write_json(folder / OWN_CONFIG, finite({"trainer": trainer, "buffer": {"ctx_len": facts.ctx_len}}))


def read_own(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The "trainer" and "buffer" parts of what `write_own` wrote, empty where it did not. Raises UserError: damaged."""
    config = read_config(folder / OWN_CONFIG) if (folder / OWN_CONFIG).is_file() else {}
    return part_of(config, "trainer"), part_of(config, "buffer")


def measured_threshold(facts: Any, d_sae: int) -> Tensor | None:
    """The `threshold` of a TopK dictionary in what we wrote beside, for every latent, or None."""
    value = facts.get("threshold") if isinstance(facts, Mapping) else None
    if not isinstance(value, float) or not 0 <= value <= torch.finfo(torch.float32).max:  # no NaN is
        return None
    return torch.full((d_sae,), value)


def save_ours(dictionary: Dictionary, config: Mapping[str, Any], folder: Path) -> None:
    """Write `ae.safetensors` and `config.json`, as `load_dictionary` reads them. The config comes last, so that a
    folder with one is whole."""
    write_tensors(folder / "ae.safetensors", dictionary.state_dict())
    write_json(folder / "config.json", config)
