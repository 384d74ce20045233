"""Loading trained dictionaries and other small things the field imports from here."""

from __future__ import annotations

import inspect
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dictionary_learning.dictionary import Dictionary, dictionary_class, read_weights
from dictionary_learning.errors import UserError
from dictionary_learning.storage import read_json
from dictionary_learning.untrusted import allowance, bounded_lines, shown, spellable

WEIGHT_FILES = ("ae.safetensors", "ae.pt")


def load_dictionary(
    base_path: str | os.PathLike[str], device: str | torch.device = "cpu", *, revision: str | None = None
) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary in a folder (`ae.safetensors` or `ae.pt`, beside `config.json`) and its config.

    `hf://user/repo/trainer_3` is one on the Hub, `hf://user/repo` the best of a pushed run (see `hub_load.py`), there
    at a `revision` (default: the newest).

    Raises:
        UserError: a file is missing or damaged, or the config names a dictionary class that does not exist.
    """
    if str(base_path).startswith("wandb://"):
        from dictionary_learning.weights_and_biases import downloaded

        if revision is not None:
            raise UserError(f"'{base_path}' has no revision '{revision}': give an artifact's version as name:v3.")
        with downloaded(str(base_path)) as artifact:
            return load_dictionary(artifact, device)
    if revision is not None or str(base_path).startswith("hf://"):
        from dictionary_learning.hub_load import local_folder

        base_path = local_folder(base_path, revision, None)
    folder = Path(base_path).expanduser()
    path = folder / "config.json"
    config = read_json(path)
    try:
        trainer = config["trainer"]
        cls = dictionary_class(trainer["dict_class"])
    except (KeyError, TypeError):
        raise UserError(f"'{path}' does not say trainer.dict_class: it is no dictionary's config.") from None
    options: dict[str, Any] = {}
    takes_k = "k" in trainer and "k" in inspect.signature(cls).parameters
    if takes_k and "k" not in read_weights(folder):  # older files of weights leave k to the config
        if not isinstance(trainer["k"], int):
            raise UserError(f"'{path}' should give trainer.k as an integer, got {shown(repr(trainer['k']))}.")
        options["k"] = trainer["k"]
    dictionary = cls.from_pretrained(folder, device=device, **options)
    for name in ("activation_dim", "dict_size"):
        said, found = trainer.get(name), getattr(dictionary, name)
        if isinstance(said, int) and said != found:
            raise UserError(
                f"The weights in '{folder}' have {name} {found}, but config.json says {shown(said)}: they don't belong "
                "together."
            )
    return dictionary, config


def get_nested_folders(path: str | os.PathLike[str]) -> list[str]:
    """Folders at or below `path` that hold a dictionary's weights."""
    return sorted(root for root, _, files in os.walk(path) if any(name in files for name in WEIGHT_FILES))


def hf_dataset_to_generator(dataset_name: str, split: str = "train", streaming: bool = True) -> Iterator[str]:
    """The texts of a dataset on the Hub, one at a time. `streaming=False` downloads it first."""
    if not streaming:
        from datasets import load_dataset

        return (row["text"] for row in load_dataset(dataset_name, split=split))
    from dictionary_learning.corpus import open_corpus

    return (text.text for text in open_corpus(f"hf://{dataset_name}", hub_split=split).read(0))


def zst_to_generator(data_path: str | os.PathLike[str]) -> Iterator[str]:
    """The `text` of every line of a .jsonl.zst file, one at a time.

    Raises:
        UserError: no such file, or the package `zstandard` is missing; while iterating, when the file is damaged or a
            line has no text.
    """
    try:
        import zstandard
    except ImportError as error:
        raise UserError("Reading .zst files needs the package zstandard: pip install zstandard.") from error
    path = Path(data_path).expanduser()
    if not path.is_file():
        raise UserError(f"There is no file '{path}'.")

    def texts() -> Iterator[str]:
        zst = zstandard.ZstdDecompressor(max_window_size=max(allowance(path), 128 << 20))  # as far as `zstd -22` goes
        with path.open("rb") as file, zst.stream_reader(file, read_across_frames=True) as raw:
            lines = enumerate(bounded_lines(io.TextIOWrapper(raw, encoding="utf-8"), path), 1)
            while True:
                try:
                    number, line = next(lines, (0, ""))
                except (zstandard.ZstdError, ValueError) as error:
                    raise UserError(f"'{path}' is not readable as .jsonl.zst: {error}.") from error
                if not line:
                    return
                try:
                    text = spellable(json.loads(line)["text"])
                except (AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UserError(f"'{path}', line {number}, is not a JSON object with a \"text\".") from error
                yield text

    return texts()


def get_submodule(model: Any, layer: int) -> Any:
    """The block of a layer, whose output is the residual stream, of any model with a list of blocks.

    An nnsight model gives its envoy, anything else that `TracedLM.load` takes the module.

    Raises:
        UserError: see `TracedLM.load`; the layer is out of range.
    """
    from dictionary_learning.activations.language_model import TracedLM

    lm = TracedLM.load(model)
    path = lm.resolve(f"resid_post_layer_{layer}")[0].path
    return model.get(path) if hasattr(model, "get") else lm.module.get_submodule(path)
