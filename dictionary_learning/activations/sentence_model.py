"""A sentence encoder: texts in, one embedding a text out, or the states of its tokens at hook points.

The model is a sentence-transformers one; what makes an embedding of token states (prompt, pooling, dense layers,
normalisation) is its own configuration, and its own `encode` does it. Token states are read by hooks in one forward,
with the padding, the special tokens and the prompt left out. `sentence_encoder.py` makes a stream of either.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dictionary_learning.activations.hook_points import IO, ResolvedHookPoint, layer_of
from dictionary_learning.activations.hooks import capture, find_points, first_activation, is_activation, to_device
from dictionary_learning.activations.loading import _find, _first_sentence, cached_commit, resolve_device, resolve_dtype
from dictionary_learning.errors import UserError

SENTENCE, TOKENS = "sentence_embedding", "token_embeddings"  # hook points, called as sentence-transformers calls them
OUT: IO = "out"


class TextStates(NamedTuple):
    """States of one text's tokens: `acts[name]` is [T, d]; `token_T` ids, `position_T` places (-1: a special token)."""

    acts: dict[str, Tensor]
    token_T: Tensor
    position_T: Tensor


class SentenceEncoder:
    """A sentence-transformers model, and what of it a run needs. Made by `load`.

    Attributes:
        model: the SentenceTransformer, in eval mode. name, revision: where it came from.
    """

    def __init__(self, model: Any, name: str, revision: str | None = None) -> None:
        self.model, self.name, self.revision = model.eval(), name, revision

    @classmethod
    def load(
        cls,
        model: Any,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> SentenceEncoder:
        """A model given as Hub id, local folder, `SentenceTransformer`, or `SentenceEncoder` (returned as it is).

        Args:
            dtype: of the weights; float32 for a model loaded by name, an object stays as it is.
            device: the CPU for a model loaded by name, an object stays where it is.
            max_length: tokens at which a text is cut, at most what the model says; it is set on the model.
            trust_remote_code: run Python code that comes with the model.

        Raises:
            UserError: no such model, no network, not a sentence-transformers model, a `max_length` that it can't take.
        """
        if isinstance(model, SentenceEncoder):
            return model
        SentenceTransformer = _sentence_transformer()
        name = ""
        if isinstance(model, str | Path):
            name = str(model)
            source = _find_encoder(name, revision)
            try:
                model = SentenceTransformer(
                    name,
                    device=str(resolve_device(device or "cpu")),
                    trust_remote_code=trust_remote_code,
                    revision=source.get("revision"),
                    local_files_only=source.get("local_files_only", False),
                )
            except Exception as error:  # a damaged file is whatever the libraries stumble over
                if "trust_remote_code" in str(error):
                    raise UserError(
                        f"'{name}' brings its own Python code; read it, then pass trust_remote_code=True to run it."
                    ) from error
                raise UserError(
                    f"Could not load a sentence encoder from '{name}': {_first_sentence(error)}."
                ) from error
            dtype = dtype or torch.float32
            if Path(name).is_dir():
                name = Path(name).resolve().name
            else:
                revision = cached_commit(name, revision) or revision
        if not isinstance(model, SentenceTransformer):
            raise UserError(
                f"A sentence encoder is a Hub id, a local folder or a SentenceTransformer, not {type(model).__name__}."
            )
        known = getattr(getattr(_transformer(model), "config", None), "_name_or_path", "")
        encoder = cls(model, name or known or type(model).__name__, revision)
        if dtype is not None:
            model.to(resolve_dtype(dtype))
        if device is not None:
            model.to(resolve_device(device))
        if max_length is not None:
            encoder.cut_at(max_length)
        return encoder

    def cut_at(self, max_length: int) -> None:
        """Cut texts at so many tokens from now on. Raises UserError for more than the model takes."""
        longest = self.max_positions
        if max_length < 1 or (longest is not None and max_length > longest):
            raise UserError(f"max_length {max_length} is not between 1 and the {longest} tokens of {self.name}.")
        self.model.max_seq_length = max_length

    # ---- what the model is ---------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def max_positions(self) -> int | None:
        """Tokens at which the model cuts a text, None where it does not say."""
        return self.model.max_seq_length

    @cached_property
    def d_model(self) -> int:
        """Width of an embedding."""
        return self.embed(["width"]).shape[1]

    @cached_property
    def config(self) -> dict[str, Any]:
        """What identifies the model, JSON-able, as `TracedLM.config`; `weights` digests eight numbers a tensor."""
        digest = hashlib.sha256(str(list(self.model)[1:]).encode())  # pooling and normalisation have no weights
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:8].cpu().double().numpy().tobytes())
        inner = _transformer(self.model)
        return {
            "name": self.name,
            "revision": self.revision,
            "architecture": type(self.model if inner is None else inner).__name__,
            "modules": [type(module).__name__ for module in self.model],
            "dtype": str(self.dtype).removeprefix("torch."),
            "d_model": self.d_model,
            "max_length": self.max_positions,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "weights": digest.hexdigest()[:16],
        }

    def resolve(self, places: str | Iterable[str]) -> list[ResolvedHookPoint]:
        """Hook points: "sentence_embedding" (a row a text), or of the token states "token_embeddings" (the last hidden
        layer, as pooling takes it), names as "resid_post_layer_3" and paths in the transformer.

        Raises:
            UserError: no such place, or a model without token states.
        """
        names = [places] if isinstance(places, str) else list(places)
        points = []
        for name in names:
            if name == SENTENCE:
                points.append(ResolvedHookPoint(name, "", "out", None, self.d_model, 0, None))
                continue
            path, side = ("", OUT) if name == TOKENS else self._place(name)
            width = self._states(self._features(["width"]), [name], whole=True)[name].shape[-1]
            layer = layer_of(path, self._inner) if path else None
            points.append(ResolvedHookPoint(name, path, side, layer, width, 0, None))
        return points

    @property
    def _inner(self) -> nn.Module:
        """The transformer."""
        inner = _transformer(self.model)
        if inner is None:
            raise UserError(f"{self.name} has no transformer to take token states from: take level='text'.")
        return inner

    # ---- running -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(
        self, texts: Sequence[str], *, batch_texts: int = 64, prompt: str | None = None, normalize: bool = False
    ) -> Tensor:
        """Embeddings [texts, d], as `SentenceTransformer.encode` has them.

        Args:
            prompt: put before every text; None takes the model's own default, if it has one.
            normalize: scale to unit length, whether or not the model does.
        """
        options: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
        embeddings = self.model.encode(
            [_clean(text) for text in texts],
            batch_size=batch_texts,
            convert_to_tensor=True,
            show_progress_bar=False,
            normalize_embeddings=normalize,
            **options,
        )
        return embeddings.clone()  # which were made in inference mode

    @torch.no_grad()
    def token_states(
        self,
        texts: Sequence[str],
        names: Sequence[str] = (TOKENS,),
        *,
        batch_texts: int = 64,
        prompt: str | None = None,
        remove_special: bool = True,
    ) -> list[TextStates]:
        """States of the tokens of each text at hook points (see `resolve`), in the order of the texts.

        Tokens of the prompt are left out, special tokens on request. The forward stops after the last hook point.
        """
        if prompt is None:
            prompt = (getattr(self.model, "prompts", None) or {}).get(
                getattr(self.model, "default_prompt_name", None), ""
            )
        skip = len(self._features([prompt])["input_ids"][0]) - self._trailing if prompt else 0
        texts = [prompt + _clean(text) for text in texts]
        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)), dtype=torch.long)
        found: dict[int, TextStates] = {}
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        for start in range(0, len(order), batch_texts):
            numbers = order[start : start + batch_texts]
            features = self._features([texts[number] for number in numbers])
            tokens_TL, real_TL = features["input_ids"].cpu(), features["attention_mask"].cpu().bool()
            special_TL = torch.isin(tokens_TL, special)
            place_TL = real_TL.cumsum(1) - 1  # in the text with its prompt, wherever the padding is
            keep_TL = real_TL & ((place_TL >= skip) | special_TL)
            if remove_special:
                keep_TL &= ~special_TL
            position_TL = torch.where(special_TL, -1, (real_TL & ~special_TL & (place_TL >= skip)).cumsum(1) - 1)
            acts = self._states(features, names)
            for row, number in enumerate(numbers):
                index = keep_TL[row].nonzero().flatten()
                found[number] = TextStates(
                    {name: x[row].index_select(0, index.to(x.device)) for name, x in acts.items()},
                    tokens_TL[row, index],
                    position_TL[row, index],
                )
        return [found[number] for number in range(len(texts))]

    @property
    def _trailing(self) -> int:
        """Special tokens behind a text."""
        return int(self._features(["a"])["input_ids"][0][-1].item() in set(self.tokenizer.all_special_ids))

    def _features(self, texts: list[str]) -> dict[str, Any]:
        """What the model's first module takes in."""
        if _transformer(self.model) is None:
            raise UserError(f"{self.name} has no transformer to take token states from: take level='text'.")
        preprocess = getattr(self.model, "preprocess", None) or self.model.tokenize  # before sentence-transformers 5.1
        features = preprocess(texts)
        if features["attention_mask"].shape != features["input_ids"].shape:
            raise UserError(f"{self.name} does not pad its batches, and its tokens can't be told apart.")
        return features

    def _states(self, features: dict[str, Any], names: Sequence[str], whole: bool = False) -> dict[str, Tensor]:
        """Activations {name: [texts, tokens, d]}; `whole` as `capture` has it."""
        shape = tuple(features["input_ids"].shape)
        last: dict[str, Tensor] = {}

        def run() -> None:
            last.update({TOKENS: self.model[0](to_device(features, self.device))[TOKENS]})

        def first(name: str, value: Any) -> Tensor:
            x = first_activation(value)
            if not is_activation(x) or tuple(x.shape[:-1]) != shape:
                got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise UserError(f"'{name}' of {self.name} passes {got}, not a tensor [texts, tokens, width].")
            return x

        points = [(name, *self._place(name)) for name in names if name != TOKENS]
        if not points:
            run()
            return last
        acts = capture(self._inner, points, run, first, whole=whole or TOKENS in names)
        return {name: (acts | last)[name] for name in names}

    def _place(self, name: str) -> tuple[str, IO]:
        if name not in self._places:
            point = find_points(self._inner, name)[0]
            self._places[name] = (point.locate(self._inner), point.io)
        return self._places[name]

    @cached_property
    def _places(self) -> dict[str, tuple[str, IO]]:
        return {}


def _sentence_transformer() -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            "Sentence encoders need the package sentence-transformers: pip install 'sae-factory[sentence]'."
        ) from error
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():  # its bar of loaded weights is for a terminal
        transformers_logging.disable_progress_bar()
    return SentenceTransformer


def _find_encoder(name: str, revision: str | None) -> dict[str, Any]:
    """Check that a model is there and says how it pools -> the keywords that find it."""
    folder = Path(name).is_dir()
    said = not folder or (Path(name) / "modules.json").is_file()
    source = _find(name, revision, "modules.json") if said else {}
    if not folder:
        from sentence_transformers.util import is_sentence_transformer_model

        local = source.get("local_files_only", False)
        said = is_sentence_transformer_model(name, revision=revision, local_files_only=local)
    if not said:
        raise UserError(
            f"'{name}' holds no modules.json, so it is no sentence encoder: it does not say how token states become an "
            "embedding."
        )
    return source


def _transformer(model: Any) -> nn.Module | None:
    """The transformer of a SentenceTransformer, None where its embeddings come from something else."""
    inner = getattr(model[0], "auto_model", None)
    return inner if isinstance(inner, nn.Module) else None


def _clean(text: str) -> str:
    """A text without lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()
