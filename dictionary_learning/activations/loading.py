"""Loading a causal language model from wherever it is, with one sentence when that fails.

In comes a Hub id, a local folder, a torch module or an nnsight wrapper; out go the torch module in eval mode and its
tokenizer. transformers reports a missing model as a page of advice after half a minute of retries, so the Hub is asked
once, with a timeout, before anything is loaded; without a network a cached copy is used as it is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dictionary_learning.devices import resolve_device
from dictionary_learning.errors import UserError, did_you_mean

HUB_TIMEOUT_S = 10.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


class Loaded(NamedTuple):
    """`name` is the Hub id, the folder's name, or what the module's config says; `tokenizer` may be None."""

    module: nn.Module
    tokenizer: Any | None
    name: str
    revision: str | None


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`"bfloat16"`, `"bf16"` or a torch.dtype -> torch.dtype.

    Raises:
        UserError: no such floating-point type.
    """
    name = str(dtype).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        raise UserError(f"Unknown dtype '{dtype}'; known are {', '.join(DTYPES)}.{did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def load(
    model: Any,
    tokenizer: Any | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Loaded:
    """See `TracedLM.load`."""
    torch_dtype = None if dtype is None else resolve_dtype(dtype)
    torch_device = None if device is None else resolve_device(device)
    if isinstance(model, (str, Path)):
        if str(model) == "embedded":
            from data_prep.embedded import MODEL_DIR

            model = MODEL_DIR
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        loaded = _load_by_name(str(model), tokenizer, torch_dtype or torch.float32, revision, options)
        torch_device = torch_device or torch.device("cpu")
    else:
        loaded = _adopt(model, tokenizer)
        if torch_dtype is not None:
            loaded.module.to(torch_dtype)
    if torch_device is not None:
        loaded.module.to(torch_device)
    loaded.module.eval()  # dropout would make activations random
    return loaded


def _adopt(model: Any, tokenizer: Any | None) -> Loaded:
    """A torch module or an nnsight wrapper of one."""
    from nnsight import Envoy

    module = model
    if isinstance(model, Envoy):
        if model._edits:
            raise UserError("The nnsight model carries edits, which would be ignored here; pass the unedited model.")
        if hasattr(model, "dispatch"):
            model.dispatch()  # nnsight loads weights at the first trace
        module = model._module
        tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if not isinstance(module, nn.Module):
        raise UserError(
            f"A model is a Hub id, a local folder, a torch module or an nnsight model, not {type(model).__name__}."
        )
    config = getattr(module, "config", None)
    name = getattr(config, "_name_or_path", "") or type(module).__name__
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _load_tokenizer(str(tokenizer), None, {}, required=True)
    return Loaded(module, tokenizer, name, getattr(config, "_commit_hash", None))


def _load_by_name(
    name: str, tokenizer: Any | None, dtype: torch.dtype, revision: str | None, options: dict[str, Any]
) -> Loaded:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():  # its bar of loaded weights is for a terminal
        transformers_logging.disable_progress_bar()
    source = _find(name, revision)
    try:
        module = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **source, **options)
    except Exception as error:  # a damaged file is a SafetensorError, TypeError, KeyError, AttributeError, ...
        raise UserError(_why(name, error)) from error
    if tokenizer is None:
        tokenizer = _load_tokenizer(name, source, options, required=False)
    elif isinstance(tokenizer, (str, Path)):
        tokenizer = _load_tokenizer(str(tokenizer), None, options, required=True)
    if Path(name).is_dir():
        return Loaded(module, tokenizer, Path(name).resolve().name, None)
    return Loaded(module, tokenizer, name, cached_commit(name, revision) or revision)


def _load_tokenizer(name: str, source: dict[str, Any] | None, options: dict[str, Any], *, required: bool) -> Any | None:
    from transformers import AutoTokenizer

    source = _find(name, None, "tokenizer_config.json") if source is None else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=options.get("trust_remote_code", False), **source
        )
        # A folder without tokenizer files gives a tokenizer that knows its special tokens and no word.
        if not set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
            return tokenizer
        reason = "it holds no vocabulary"
    except Exception as error:  # see above
        reason = _first_sentence(error)
    if required:
        raise UserError(f"Could not load a tokenizer from '{name}': {reason}.")
    return None


def _find(name: str, revision: str | None, file: str = "config.json") -> dict[str, Any]:
    """Check that a model is there before loading it -> the keywords `from_pretrained` needs to find it."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / file).exists():
            raise UserError(f"The folder '{name}' holds no {file}; expected a folder written by save_pretrained().")
        return {}
    if name.startswith((".", "/", "~")) or folder.exists():
        raise UserError(f"There is no model folder '{name}'.")
    return _find_on_hub(name, revision, file)


def _find_on_hub(name: str, revision: str | None, file: str) -> dict[str, Any]:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().model_info(name, revision=revision or "main", timeout=HUB_TIMEOUT_S)
    except HFValidationError:
        raise UserError(f"'{name}' is neither a local folder nor a Hub id such as 'openai-community/gpt2'.") from None
    except GatedRepoError as error:
        raise UserError(f"'{name}' is gated: accept its terms on the Hub and log in with `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"'{name}' has no revision '{revision}' on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"There is no model '{name}' on the Hub, or it is private and you are not logged in."
            + did_you_mean(name, _cached_models())
        ) from error
    except Exception as error:  # noqa: BLE001 - no network: httpx, socket and proxy errors, offline mode, a sick Hub
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return {"revision": revision, "local_files_only": True}
        why = "the Hub could not be reached"
        if isinstance(error, OfflineModeIsEnabled):
            why = "offline mode is on (HF_HUB_OFFLINE)"
        elif isinstance(error, HfHubHTTPError):
            why = f"the Hub answered: {_first_sentence(error)}"
        raise UserError(
            f"Model '{name}' is not a local folder, not in the local cache, and {why}."
            + did_you_mean(name, _cached_models())
        ) from error
    return {"revision": revision}


def cached_commit(name: str, revision: str | None) -> str | None:
    """The commit that was just loaded, which is that of its folder in the cache."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _cached_models() -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return [p.name.removeprefix("models--").replace("--", "/") for p in Path(HF_HUB_CACHE).glob("models--*")]


def _why(name: str, error: Exception) -> str:
    """One sentence for what `AutoModelForCausalLM.from_pretrained` raised."""
    text = str(error)
    if "trust_remote_code" in text:
        return f"'{name}' brings its own Python code; read it, then pass trust_remote_code=True to run it."
    if match := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", text):
        return f"'{name}' is a {match[1]} model, which is not a causal language model in transformers."
    return f"Could not load a language model from '{name}': {_first_sentence(error)}."


def _first_sentence(error: Exception) -> str:
    said = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".:")
    plain = isinstance(error, OSError | ValueError | ImportError)
    return said if said and plain else f"{type(error).__name__}{': ' if said else ''}{said}"
