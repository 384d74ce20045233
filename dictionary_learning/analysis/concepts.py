"""The most telling latents of an analysis: those that a reader would call a concept, found by the tool alone.

In: the columns of features.parquet. Out: the latents whose label is made of content words, ranked by the product of
    share      of its samples that hold a word of the label, which are drawn over the whole range of activations and not
               only from the top: whether the latent is about its words;
    rarity     of the documents in which it fires, in bits (inverse document frequency, Sparck Jones 1972) up to
               `RARE_BITS`: whether it tells documents apart, which words of a template ("option", "following") do not;
    contrast   in bits up to `CONTRAST_BITS`, where a general text was counted beside: how much rarer than elsewhere are
               the latent's firing and the first word of its label there, whichever is less.

The only list of words here is of function words of English; which words are medical is for the corpora to say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.analysis.labels import word_contrast
from dictionary_learning.errors import UserError, did_you_mean

LEAST_SHARE = 0.25
LEAST_DOCUMENTS = 10
SIGNIFICANT_Q = 0.01
RARE_BITS = 4.0  # one document in 16
CONTRAST_BITS = 4.0
LEAST_LETTERS = 4

FUNCTION_WORDS = frozenset(
    """about above after again against all almost along already also although always among an and another any anything
    are around as at away back be because been before being below between both but by came can cannot come could did do
    does doing done down during each either else enough even ever every few first for from further gave get give given
    goes going gone got had has have having he hence her here hers herself him himself his how however if in indeed into
    is it its itself just last least less let like likely made make many may me might mine more most much must my myself
    near neither never next no none nor not nothing now of off often on once one only onto or other others our ours out
    over own per perhaps quite rather really same second several shall she should show shown since so some something
    still such take taken than that the their theirs them themselves then there therefore these they thing things third
    this those though three through thus to together too toward towards two under until up upon us use used using very
    via was way we well went were what whatever when where whether which while who whom whose why will with within
    without would yes yet you your yours""".split()
)


@dataclass(frozen=True)
class Concept:
    """A telling latent.

    share: of its samples that hold a word of `label` where it is active. documents: in how many it fires. log2_ratio:
    of its firing rate elsewhere to that in the general text (of several the least); None without one. score: in [0, 1].
    """

    feature: int
    label: str
    share: float
    density: float
    documents: int
    log2_ratio: float | None
    score: float


def concepts(
    table: Mapping[str, np.ndarray],
    documents: int,
    *,
    against: Sequence[str] = (),
    words: Mapping[str, float] | None = None,
    limit: int | None = None,
) -> list[Concept]:
    """The telling latents of one dictionary, the best first; of several with the same first word only the best.

    Dead and dense latents are left out, and those that fire in fewer than `LEAST_DOCUMENTS` documents.

    Args:
        table: the columns of features.parquet.
        documents: how many were seen.
        against: those of the corpora that are general: latents must fire less in each (q < `SIGNIFICANT_Q`).
        words: the contrast of words between the other corpora and these, in bits (`word_contrast`).

    Raises:
        UserError: the analysis has no such corpus.
    """
    share_F, in_documents_F = table["label_share"], table["documents"]
    wanted_F = (table["status"] == "") & (share_F >= LEAST_SHARE) & (in_documents_F >= LEAST_DOCUMENTS)
    wanted_F &= np.array([_is_content(label) for label in table["label"]], dtype=bool)
    rarity_F = np.log2(max(documents, 1) / np.clip(in_documents_F, 1, max(documents, 1)))
    score_F = share_F * np.minimum(rarity_F / RARE_BITS, 1)
    ratio_F = None
    if against:
        ratio_F, q_F = _contrast(table, against)
        wanted_F &= (ratio_F > 0) & (q_F < SIGNIFICANT_Q)
        said_F = np.array([(words or {}).get(label.partition(",")[0], np.inf) for label in table["label"]])
        score_F = score_F * np.clip(np.minimum(ratio_F, said_F) / CONTRAST_BITS, 0, 1)
    found: dict[str, Concept] = {}
    for feature in sorted(np.flatnonzero(wanted_F & (score_F > 0)).tolist(), key=lambda f: (-score_F[f], f)):
        label = str(table["label"][feature])
        concept = Concept(
            feature=feature,
            label=label,
            share=float(share_F[feature]),
            density=float(table["density"][feature]),
            documents=int(in_documents_F[feature]),
            log2_ratio=None if ratio_F is None else float(ratio_F[feature]),
            score=float(score_F[feature]),
        )
        found.setdefault(label.partition(",")[0], concept)
    return list(found.values())[:limit]


def telling_features(folder: AnalysisFolder, name: str, limit: int | None = None) -> list[Concept]:
    """`concepts` of a dictionary of an analysis, against the corpora that it was given with --against.

    Raises:
        UserError: see `AnalysisFolder`.
    """
    against = folder.info["settings"].get("against") or ()
    words = None
    if against:
        general = [at for at, corpus in enumerate(folder.info["corpora"]) if corpus in against]
        texts = {document: str(entry["text"]) for document, entry in folder.texts().items()}
        words = word_contrast(folder.examples(name)[1], general, folder.vocabulary(), texts)
    return concepts(folder.table(name), int(folder.info["documents"]), against=against, words=words, limit=limit)


def print_concepts(folder: AnalysisFolder, name: str, limit: int = 10) -> None:
    """Print the most telling latents of a dictionary. Raises UserError, see `AnalysisFolder`."""
    from rich.console import Console
    from rich.table import Table

    found = telling_features(folder, name, limit)
    if not found:
        print(f"No latent of {name} is of one concept that could be told from the text.")
        return
    table = Table(title=f"The most telling latents of {name}", title_justify="left")
    against = [] if found[0].log2_ratio is None else ["log2 ratio to general text"]
    for column in ("latent", "words", "share of samples", "documents", *against):
        table.add_column(column, justify="left" if column == "words" else "right")
    for concept in found:
        ratio = [] if concept.log2_ratio is None else [f"{concept.log2_ratio:.1f}"]
        table.add_row(str(concept.feature), concept.label, f"{concept.share:.2f}", f"{concept.documents:,}", *ratio)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _is_content(label: str) -> bool:
    """Whether each of its words is a content word, as far as can be told without a dictionary."""
    words = label.split(", ") if label else [""]
    return all(word.isalpha() and len(word) >= LEAST_LETTERS and word not in FUNCTION_WORDS for word in words)


def _contrast(table: Mapping[str, np.ndarray], against: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """([F] log2 of the rate elsewhere to that in `against`, [F] its q): the least telling of several."""
    known = [column.removeprefix("q:") for column in table if column.startswith("q:")]
    for name in against:
        if name not in known:
            have = f"rates of {', '.join(known)}" if known else "one corpus only"
            raise UserError(f"The analysis has no rates of corpus '{name}', but {have}.{did_you_mean(name, known)}")
    ratio_F = np.min([-table[f"log2_ratio:{name}"] for name in against], axis=0)
    return ratio_F, np.max([table[f"q:{name}"] for name in against], axis=0)
