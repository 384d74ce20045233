"""What does one latent do? The field's three first looks: its effect on the next token, where it fires, and a map.

In: a language model, a hook point and a dictionary (or None for the module's own neurons). Out: tokens with numbers, or
a picture. `feature_umap` needs `umap-learn` and `plotly`, which are no dependencies of this project.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dictionary_learning.activations.language_model import TracedLM
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError

INPUTS_A_FORWARD = 32


class FeatureProfile(NamedTuple):
    """`top_contexts`: [(tokens, activations at them)], cut behind the token where the latent is most active;
    `top_tokens`: [(token, its mean activation)]; `top_affected`: [(next token, what ablation takes from it)]."""

    top_contexts: list[tuple[list[str], Tensor]]
    top_tokens: list[tuple[str, float]]
    top_affected: list[tuple[str, float]]


@torch.no_grad()
def feature_effect(
    model: Any,
    submodule: Any,
    dictionary: Dictionary | None,
    feature: int,
    inputs: Any,
    max_length: int = 128,
    add_residual: bool = True,
    k: int = 10,
    largest: bool = True,
) -> tuple[Tensor, Tensor]:
    """The next tokens whose log-probability most depends on a latent at the last position.

    Args:
        dictionary: None for a neuron of the module's output itself.
        inputs: a text, a list of texts, or lists of token ids; cut at `max_length` tokens.
        add_residual: keep what the dictionary does not reconstruct, so that only the ablation tells.
        largest: the tokens that lose most by the ablation; False for those that gain most.

    Returns:
        (token ids [k], mean over the inputs of log p(clean) - log p(ablated) [k]).

    Raises:
        UserError: see `TracedLM.resolve`; no such latent, no inputs.
    """
    lm = TracedLM.load(model)
    point = lm.resolve(submodule)[0]
    _check_feature(dictionary, feature, point.width)
    total = torch.zeros(lm.vocab_size, device=lm.device)
    rows = _token_rows(lm, inputs, max_length)
    for ids in rows:  # one at a time: without padding, the last position is the last token
        tokens_CL = torch.tensor([ids])
        x = lm.capture(tokens_CL, [point])[point.name]
        clean, ablated = _with_and_without(x, dictionary, feature, add_residual)
        log_p, log_q = (
            lm.logits(tokens_CL, replace={point: y})[0][0, -1].float().log_softmax(-1) for y in (clean, ablated)
        )
        total += (log_p - log_q)[: len(total)]
    top = (total / len(rows)).topk(min(k, len(total)), largest=largest)
    return top.indices, top.values


def _with_and_without(
    x: Tensor, dictionary: Dictionary | None, feature: int, add_residual: bool
) -> tuple[Tensor, Tensor]:
    """Activations [1, L, D] as the model is to see them, with the latent and without it at the last position."""
    if dictionary is None:
        ablated = x.clone()
        ablated[:, -1, feature] = 0
        return x, ablated
    inputs = x.to(dictionary.decoder_rows.dtype)
    f = dictionary.encode(inputs).clone()
    x_hat = dictionary.reconstruct(f, inputs)
    f[:, -1, feature] = 0
    without = dictionary.reconstruct(f, inputs)
    residual = inputs - x_hat if add_residual else torch.zeros_like(inputs)
    return (x_hat + residual).to(x.dtype), (without + residual).to(x.dtype)


@torch.no_grad()
def examine_dimension(
    model: Any,
    submodule: Any,
    buffer: Any,
    dictionary: Dictionary | None = None,
    max_length: int = 128,
    n_inputs: int = 512,
    dim_idx: int | None = None,
    k: int = 30,
) -> FeatureProfile:
    """Where a latent fires and what it does, on the next `n_inputs` texts of a buffer.

    Args:
        dictionary: None for a neuron of the module's output itself.
        dim_idx: the latent; None picks one at random.
        k: contexts, tokens and affected tokens to return.

    Raises:
        UserError: see `TracedLM.resolve`; no such latent.
    """
    lm = TracedLM.load(model)
    point = lm.resolve(submodule)[0]
    width = point.width if dictionary is None else dictionary.dict_size
    feature = random.randrange(width) if dim_idx is None else dim_idx
    _check_feature(dictionary, feature, point.width)
    rows = _token_rows(lm, buffer.text_batch(n_inputs), max_length)
    acts = [act for part in _parts(rows) for act in _activations(lm, point, dictionary, feature, part)]
    places = torch.cat(acts).topk(min(k, sum(map(len, acts)))).indices.tolist()
    contexts = []
    for place in places:
        row = 0
        while place >= len(rows[row]):
            place -= len(rows[row])
            row += 1
        contexts.append((rows[row][: place + 1], acts[row][: place + 1]))
    affected = feature_effect(lm, point, dictionary, feature, [ids for ids, _ in contexts], max_length, k=k)
    return FeatureProfile(
        top_contexts=[([lm.tokenizer.decode([token]) for token in ids], act) for ids, act in contexts],
        top_tokens=_top_tokens(lm, torch.cat([torch.tensor(ids) for ids in rows]), torch.cat(acts), k),
        top_affected=[
            (lm.tokenizer.decode([token]), value)
            for token, value in zip(affected[0].tolist(), affected[1].tolist(), strict=True)
        ],
    )


def _activations(lm: TracedLM, point: Any, dictionary: Dictionary | None, feature: int, rows: Any) -> list[Tensor]:
    """The latent's activation at every token of some rows, padded on the right for one forward."""
    length = max(map(len, rows))
    tokens_CL = torch.tensor([ids + [ids[-1]] * (length - len(ids)) for ids in rows])
    x = lm.capture(tokens_CL, [point])[point.name]
    f = x if dictionary is None else dictionary.encode(x.to(dictionary.decoder_rows.dtype))
    return [act[: len(ids)].float().cpu() for act, ids in zip(f[..., feature], rows, strict=True)]


def _top_tokens(lm: TracedLM, tokens_N: Tensor, acts_N: Tensor, k: int) -> list[tuple[str, float]]:
    """The tokens of highest mean activation."""
    kinds, index_N, counts = tokens_N.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(kinds)).index_add_(0, index_N, acts_N) / counts
    top = means.topk(min(k, len(kinds)))
    return [
        (lm.tokenizer.decode([int(kinds[i])]), mean) for i, mean in zip(top.indices, top.values.tolist(), strict=True)
    ]


def _token_rows(lm: TracedLM, inputs: Any, max_length: int) -> list[list[int]]:
    """Token ids of texts, or ids as they are; neither empty nor longer than `max_length`."""
    inputs = [inputs] if isinstance(inputs, str) else inputs
    rows = [lm.tokenizer(row)["input_ids"] if isinstance(row, str) else list(map(int, row)) for row in inputs]
    rows = [row[:max_length] for row in rows if len(row)]
    if not rows:
        raise UserError("There are no inputs to look at: give texts or token ids.")
    return rows


def _parts(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    for start in range(0, len(rows), INPUTS_A_FORWARD):
        yield rows[start : start + INPUTS_A_FORWARD]


def _check_feature(dictionary: Dictionary | None, feature: int, width: int) -> None:
    size = width if dictionary is None else dictionary.dict_size
    if not 0 <= feature < size:
        raise UserError(f"There is no latent {feature}: they are numbered 0 to {size - 1}.")


def feature_umap(
    dictionary: Dictionary,
    weight: str = "decoder",
    n_neighbors: int = 15,
    metric: str = "cosine",
    min_dist: float = 0.05,
    n_components: int = 2,
    feat_idxs: int | list[int] | None = None,
) -> Any:
    """A plotly scatter plot of the latents' directions ("decoder") or encoder weights ("encoder"), by UMAP.

    Args:
        n_neighbors, metric, min_dist, n_components: of UMAP; 2 or 3 components.
        feat_idxs: latents to show in red.

    Raises:
        UserError: another weight or number of components; umap-learn or plotly are missing.
    """
    if weight not in ("decoder", "encoder"):
        raise UserError(f"weight must be 'decoder' or 'encoder', got {weight!r}.")
    if n_components not in (2, 3):
        raise UserError(f"n_components must be 2 or 3, got {n_components!r}.")
    try:
        import plotly.express as express
        import umap
    except ImportError as error:
        raise UserError(
            f"feature_umap needs umap-learn and plotly ({error}): pip install umap-learn plotly."
        ) from error
    rows_FD = dictionary.decoder_rows if weight == "decoder" else dictionary.encoder_rows
    reducer = umap.UMAP(n_neighbors=n_neighbors, metric=metric, min_dist=min_dist, n_components=n_components)
    places = reducer.fit_transform(rows_FD.detach().float().cpu().numpy())
    red = {feat_idxs} if isinstance(feat_idxs, int) else set(feat_idxs or ())
    numbers = range(len(places))
    colors = None if feat_idxs is None else ["red" if number in red else "blue" for number in numbers]
    axes = {axis: places[:, number] for number, axis in enumerate("xyz"[:n_components])}
    draw = express.scatter if n_components == 2 else express.scatter_3d
    return draw(**axes, hover_name=[str(number) for number in numbers], color=colors)
