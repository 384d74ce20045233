"""From what was measured to the files of one dictionary: its table of latents, its examples as JSON.

In: `FeatureStatistics`, and the model and dictionary for what its latents do. Out: files, by `AnalysisFolder`. The last
one written is features.parquet: a dictionary that has it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dictionary_learning.analysis.corpora import compare_corpora, specific_corpus
from dictionary_learning.analysis.density import status
from dictionary_learning.analysis.effects import (
    LogitEffects,
    ablation_losses,
    logit_effects,
    nearest_features,
    why_no_logit_effects,
)
from dictionary_learning.analysis.folder import PER_CORPUS, AnalysisFolder
from dictionary_learning.analysis.labels import label_features
from dictionary_learning.analysis.subjects import Subject
from dictionary_learning.analysis.types import QUANTILES, FeatureStatistics
from dictionary_learning.analysis.vocabulary import token_strings

NEAREST = 10  # tokens, neighbours and co-active latents listed of each latent
ABLATED_EXAMPLES = 5  # of a latent: every so-manieth of its samples, which are ordered by activation


def write_dictionary(
    folder: AnalysisFolder,
    subject: Subject,
    statistics: FeatureStatistics,
    *,
    lm: Any,
    texts: Mapping[int, str],
    effects: bool,
    ablate: int,
) -> None:
    """Measure what the latents do, name them, and write all files of one dictionary.

    Args:
        lm: the model, for strings of tokens and for effects. texts: document -> text, of sources of whole texts.
        effects: whether to read directions as tokens, where they can be. ablate: latents to ablate, the most active.
    """
    top, samples = statistics.top, statistics.samples
    logits = _logit_effects(lm, subject) if effects else None
    kept = [top.token_FEW, samples.token_FEW] + ([] if statistics.probes is None else [statistics.probes.token_RW])
    ids = [np.unique(array[array >= 0]) for array in kept]
    if logits is not None:
        ids += [np.unique(logits.top_tokens_Fk), np.unique(logits.bottom_tokens_Fk)]
    wanted = np.unique(np.concatenate(ids)).tolist()
    strings = token_strings(lm.tokenizer, wanted) if wanted else {}
    labels, shares = label_features(top, samples, strings, texts)
    columns = {
        **_statistics_columns(statistics),
        **_corpus_columns(statistics),
        **_logit_columns(logits, strings, subject.dictionary.dict_size),
        **_neighbour_columns(subject),
        "ablation_loss": _ablation_column(lm, subject, statistics, ablate),
        "label": labels,
        "label_share": shares,
    }

    # The tokenizer behind a fast one of transformers is asked itself: what wraps it takes ten times as long.
    plain = getattr(lm.tokenizer, "backend_tokenizer", None) if top.token_FEW.shape[-1] else None

    def text_of(document: int, tokens: list[int]) -> str:
        if not tokens:
            return texts[document]
        if plain is not None:
            return plain.decode(tokens, skip_special_tokens=False)
        return lm.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    folder.write_statistics(subject.name, statistics)
    folder.write_top_activations(subject.name, top, statistics.corpora, strings, text_of)
    folder.write_vocabulary(folder.vocabulary() | strings)
    folder.write_table(subject.name, columns, statistics.corpora)


def _statistics_columns(statistics: FeatureStatistics) -> dict[str, Any]:
    density_F = statistics.density_F
    coactive, jaccard = _coactive(statistics)
    return {
        "feature": np.arange(len(density_F)),
        "density": density_F,
        "active": statistics.active_F,
        "documents": statistics.documents_F,
        "mean": statistics.mean_F,
        "std": statistics.std_F,
        "max": statistics.max_F,
        **{f"q{round(100 * q)}": statistics.quantiles_FQ[:, i] for i, q in enumerate(QUANTILES)},
        "status": status(density_F).astype(object),
        "coactive": coactive,
        "coactive_jaccard": jaccard,
    }


def _corpus_columns(statistics: FeatureStatistics) -> dict[str, Any]:
    if len(statistics.corpora) < 2:
        return {"corpus": [""] * len(statistics.active_F)}
    found = compare_corpora(statistics)
    measured = (found.rate_CF, found.log2_ratio_CF, found.p_CF, found.q_CF)
    return {
        **{
            f"{kind}:{corpus}": values_CF[index]
            for index, corpus in enumerate(found.corpora)
            for kind, values_CF in zip(PER_CORPUS, measured, strict=True)
        },
        "corpus": specific_corpus(found).astype(object),
    }


def _coactive(statistics: FeatureStatistics) -> tuple[list[list[int]], list[list[float]]]:
    """For each of the counted latents those that most often fire with it, by the share of the rows in which either
    fires that both do (Jaccard); empty lists for the others."""
    latents_M, both_MM = statistics.coactive_M, statistics.coactive_MM.astype(np.float64)
    active_M = statistics.active_F[latents_M]
    share_MM = both_MM / np.maximum(active_M[:, None] + active_M[None] - both_MM, 1)
    np.fill_diagonal(share_MM, 0)
    order_MK = np.argsort(-share_MM, axis=1, kind="stable")[:, :NEAREST]
    others: list[list[int]] = [[] for _ in range(len(statistics.active_F))]
    shares: list[list[float]] = [[] for _ in others]
    for latent, order, row in zip(latents_M.tolist(), order_MK, share_MM, strict=True):
        order = order[row[order] > 0]
        others[latent], shares[latent] = latents_M[order].tolist(), row[order].tolist()
    return others, shares


def _logit_effects(lm: Any, subject: Subject) -> LogitEffects | None:
    """None where the model has no tokens to predict, or the hook point no direct path to them."""
    from dictionary_learning.activations.language_model import TracedLM

    if not isinstance(lm, TracedLM) or why_no_logit_effects(lm, subject.dictionary, subject.site):
        return None
    return logit_effects(lm, subject.dictionary, subject.site, k=NEAREST)


def _logit_columns(logits: LogitEffects | None, strings: Mapping[int, str], latents: int) -> dict[str, Any]:
    if logits is None:
        return {f"{side}_{what}": [[]] * latents for side in ("top", "bottom") for what in ("tokens", "logits")}
    return {
        "top_tokens": [[strings[token] for token in row] for row in logits.top_tokens_Fk.tolist()],
        "top_logits": logits.top_logits_Fk.tolist(),
        "bottom_tokens": [[strings[token] for token in row] for row in logits.bottom_tokens_Fk.tolist()],
        "bottom_logits": logits.bottom_logits_Fk.tolist(),
    }


def _neighbour_columns(subject: Subject) -> dict[str, Any]:
    nearest = nearest_features(subject.dictionary, k=NEAREST)
    return {"neighbours": nearest.indices_Fk.tolist(), "neighbour_cosines": nearest.cosines_Fk.tolist()}


def _ablation_column(lm: Any, subject: Subject, statistics: FeatureStatistics, number: int) -> np.ndarray:
    """[F] mean change of the loss where a latent is ablated, of the `number` most active ones; NaN for the others.

    Measured in a few of a latent's samples, which are drawn from all the rows in which it fires: in its top examples
    alone every latent would look as important as at its strongest.
    """
    from dictionary_learning.activations.language_model import TracedLM

    losses_F = np.full(len(statistics.active_F), np.nan)
    samples = statistics.samples
    if not number or not isinstance(lm, TracedLM) or not samples.token_FEW.size:
        return losses_F
    order_F = np.argsort(-statistics.active_F, kind="stable")[:number]
    order_F = np.sort(order_F[statistics.active_F[order_F] > 0])
    if len(order_F):
        step = -(-samples.token_FEW.shape[1] // ABLATED_EXAMPLES)
        windows_FEW = samples.token_FEW[order_F, ::step]
        losses_F[order_F] = ablation_losses(lm, subject.dictionary, subject.site, windows_FEW, order_F.tolist())
    return losses_F
