"""One text in, its tokens and their activations out: for looking at a model, in a notebook or a test.

A run over a corpus goes through `LanguageModelActivations`; this is for a single sentence, with the token strings
beside the rows so that a plot can be labelled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from dictionary_learning.activations.traced_lm import Place, TracedLM
from dictionary_learning.errors import UserError


class Sample(NamedTuple):
    """A text of L tokens: ids, the string of each token, and activations {hook point: [L, d]}.

    A character that takes several tokens of a byte-level tokenizer shows as replacement characters in `tokens`;
    joined ids decode properly.
    """

    text: str
    token_ids: list[int]
    tokens: list[str]
    acts: dict[str, Tensor]


def extract(
    text: str,
    model: Any,
    hook_points: Place | list[Place],
    *,
    tokenizer: Any | None = None,
    add_special_tokens: bool = True,
    max_tokens: int | None = None,
    **load_options: Any,
) -> Sample:
    """Activations of one text at the hook points, in one forward pass.

    Args:
        model: a `TracedLM`, or anything `TracedLM.load` takes (a Hub id, a folder, "embedded", a module, an nnsight
            model).
        add_special_tokens: let the tokenizer add its special tokens. The first token is usually an attention sink.
        max_tokens: keep only the first tokens. Without it, a text longer than the model's positions is refused.
        load_options: for `TracedLM.load` (dtype, device, revision, ...).

    Raises:
        UserError: an empty text, no tokenizer, or see `TracedLM.load` and `TracedLM.capture`.
    """
    lm = TracedLM.load(model, tokenizer, **load_options)
    tokenizer = tokenizer if tokenizer is not None and not isinstance(tokenizer, str) else lm.tokenizer
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt", verbose=False)
    tokens_CL = encoded["input_ids"].long()[:, :max_tokens]
    if not tokens_CL.numel():
        raise UserError("The text gives no tokens; expected at least one.")
    acts = lm.capture(tokens_CL, hook_points)
    token_ids = tokens_CL[0].tolist()
    return Sample(text, token_ids, [tokenizer.decode([i]) for i in token_ids], {n: x[0] for n, x in acts.items()})
