"""Interventions on a sentence encoder: how far does an embedding move when latents are turned?

In: a sentence encoder, texts, and interventions as `interventions.py` has them, on token states or on the embeddings.
Out: embeddings without and with. A sentence encoder predicts no tokens, so what there is to compare is direction.

Texts run through the encoder's own `encode`, with its prompt, batches and pooling. Hooks change the states on the way,
at the tokens that dictionaries train on: not padding, not special tokens, not the prompt's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dictionary_learning.activations.hook_points import ResolvedHookPoint
from dictionary_learning.activations.hooks import is_activation
from dictionary_learning.activations.sentence_model import SENTENCE, TOKENS, SentenceEncoder
from dictionary_learning.analysis.interventions import Intervention, place, replacements
from dictionary_learning.errors import UserError


class EmbeddingComparison(NamedTuple):
    """Embeddings [N, d] of N texts without and with the interventions, and the cosines [N] between the two."""

    original_ND: Tensor
    modified_ND: Tensor
    cosine_N: Tensor


@torch.no_grad()
def steer_embeddings(
    model: Any,
    texts: str | Sequence[str],
    interventions: Intervention | Sequence[Intervention],
    *,
    prompt: str | None = None,
    normalize: bool = False,
    batch_texts: int = 64,
) -> EmbeddingComparison:
    """Embed texts, without and with the interventions.

    Those on token states act on all tokens of a text. Those on "sentence_embedding" act on what the encoder gives,
    behind its normalisation, and what they give is not normalised again.

    Args:
        model: whatever `SentenceEncoder.load` takes.
        prompt, normalize: as the dictionaries were trained with them, see `SentenceEncoder.embed`.

    Raises:
        UserError: see `SentenceEncoder.load` and `place`; no text; positions other than "all".
    """
    encoder = SentenceEncoder.load(model)
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError("There is no text to embed, or an empty one: give at least a word.")
    interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    if any(one.positions != "all" for one in interventions):
        raise UserError("Of a sentence encoder interventions act on all tokens of a text: leave positions at 'all'.")
    placed = place(encoder, interventions, [torch.ones(1, dtype=torch.bool)] * len(interventions))
    options: dict[str, Any] = {"batch_texts": batch_texts, "prompt": prompt, "normalize": normalize}
    if any((one.read.name == SENTENCE) != (one.written.name == SENTENCE) for one in placed):
        raise UserError(f"A transcoder from or to '{SENTENCE}' can't act: a text has one embedding and many tokens.")
    original_ND = encoder.embed(texts, **options)
    points = {point for one in placed for point in (one.read, one.written) if point.name != SENTENCE}
    skipped = _prompt_tokens(encoder, prompt) if points else 0
    current: dict[ResolvedHookPoint, Callable[[Tensor], Tensor]] = {}

    def begin(module: Any, args: tuple) -> None:
        mask_BL = _text_tokens(encoder, args[0], skipped)
        current.update(replacements([one._replace(mask_CL=mask_BL) for one in placed])[0])

    handles = [encoder.model[0].register_forward_pre_hook(begin)] if points else []
    handles += [_hook(encoder, point, current) for point in points]
    try:
        modified_ND = encoder.embed(texts, **options)
    finally:
        for handle in handles:
            handle.remove()
    every_N = torch.ones(len(texts), dtype=torch.bool)
    at_the_end = [one._replace(mask_CL=every_N) for one in placed if one.written.name == SENTENCE]
    for change in replacements(at_the_end)[0].values():
        modified_ND = change(modified_ND)
    return EmbeddingComparison(original_ND, modified_ND, torch.cosine_similarity(original_ND, modified_ND, dim=-1))


def _hook(encoder: SentenceEncoder, point: ResolvedHookPoint, current: dict[Any, Callable[[Tensor], Tensor]]) -> Any:
    """Change what passes at a hook point by what `current` holds for it."""

    def changed(value: Any) -> Any:
        """The same value with the first activation in it changed."""
        if not isinstance(value, tuple | list):
            return current[point](value)
        place = next(index for index, item in enumerate(value) if is_activation(item))
        return type(value)((*value[:place], current[point](value[place]), *value[place + 1 :]))

    if point.name == TOKENS:
        module = encoder.model[0]
        return module.register_forward_hook(lambda _, __, out: {**out, TOKENS: current[point](out[TOKENS])})
    module = encoder._inner.get_submodule(point.path)
    if point.io == "out":
        return module.register_forward_hook(lambda _, __, out: changed(out))

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if any(map(is_activation, args)):
            return changed(args), kwargs
        name = next(name for name, value in kwargs.items() if is_activation(value))
        return args, {**kwargs, name: current[point](kwargs[name])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _prompt_tokens(encoder: SentenceEncoder, prompt: str | None) -> int:
    """Tokens in front of a text that are the prompt's, special ones included."""
    if prompt is None:
        model = encoder.model
        prompt = (getattr(model, "prompts", None) or {}).get(getattr(model, "default_prompt_name", None), "")
    return len(encoder._features([prompt])["input_ids"][0]) - encoder._trailing if prompt else 0


def _text_tokens(encoder: SentenceEncoder, features: dict[str, Any], skipped: int) -> Tensor:
    """[texts, tokens] bool: not padding, not special, not the prompt's. The tokens that `token_states` gives."""
    tokens_BL, real_BL = features["input_ids"].cpu(), features["attention_mask"].cpu().bool()
    special = torch.tensor(sorted(set(encoder.tokenizer.all_special_ids)), dtype=torch.long)
    place_BL = real_BL.cumsum(1) - 1  # in the text with its prompt, wherever the padding is
    return real_BL & (place_BL >= skipped) & ~torch.isin(tokens_BL, special)
