"""`sae-factory steer` for sentence encoders: how far embeddings move, and what they are more and less similar to then.

In: an encoder, prompts, one intervention, and texts to compare with. Out: `TextsView`: cosines and codes, as tables for
the terminal and as JSON. A sentence encoder predicts no tokens; what people use of it is similarity, so that of each
changed embedding to texts that are left as they are stands where a language model's next tokens stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dictionary_learning.analysis import steer_views
from dictionary_learning.analysis.effects import as_the_dictionary
from dictionary_learning.analysis.embedding_interventions import steer_embeddings
from dictionary_learning.analysis.interventions import SCALES, Intervention
from dictionary_learning.errors import UserError

if TYPE_CHECKING:
    from dictionary_learning.activations.sentence_encoder import SentenceEncoder
    from dictionary_learning.analysis.steer import SteerArgs
    from dictionary_learning.config import SentenceSettings

OF_LANGUAGE_MODELS = ("positions", "matching", "at", "max_new_tokens", "scope", "temperature", "top_p", "seed", "bos")
TEXT_CHARACTERS = 60  # of a text in a table


@dataclass(frozen=True)
class TextsView:
    """P prompts embedded without and with an intervention on n latents, and W texts that they are compared with.

    before_Pn, after_Pn: a latent's code in each prompt, where it changes most (of token states). cosine_P: of the two
    embeddings of a prompt. original_PW, modified_PW: cosines of each with the embeddings of the texts, which are left
    as they are. listed: texts to show of each prompt. silent: latents that fire in no prompt and are left as they are.
    """

    title: str
    intervention: Intervention
    prompts: list[str]
    texts: list[str]
    before_Pn: np.ndarray
    after_Pn: np.ndarray
    cosine_P: np.ndarray
    original_PW: np.ndarray
    modified_PW: np.ndarray
    listed: int
    silent: list[int]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "dictionary": self.title,
            "intervention": steer_views.as_json(self.intervention),
            "never_fires": self.silent,
            "prompts": [
                {
                    "prompt": prompt,
                    "cosine": float(self.cosine_P[at]),
                    "before": self.before_Pn[at].tolist(),
                    "after": self.after_Pn[at].tolist(),
                    "similarities": [
                        {"text": text, "original": p, "modified": q}
                        for text, p, q in zip(
                            self.texts, self.original_PW[at].tolist(), self.modified_PW[at].tolist(), strict=True
                        )
                    ],
                }
                for at, prompt in enumerate(self.prompts)
            ],
        }


def refuse_options_of_language_models(args: SteerArgs) -> None:
    """Raises UserError for what would be without effect on a sentence encoder."""
    from dictionary_learning.analysis.steer import PICTURES

    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name in OF_LANGUAGE_MODELS:
        if getattr(args, name) != defaults[name]:
            raise UserError(f"--{name} is for language models; the dictionary is of a sentence encoder: leave it out.")
    if args.out is not None and args.out.suffix.lower() in PICTURES:
        raise UserError(
            "Heat maps are over the tokens of language models: of a sentence encoder, --out is .json or .html."
        )


@torch.no_grad()
def compare_texts(
    encoder: SentenceEncoder,
    prompts: Sequence[str],
    intervention: Intervention,
    texts: Sequence[str],
    settings: SentenceSettings,
    *,
    title: str,
    k: int,
) -> TextsView:
    """Embed prompts without and with an intervention, and compare them with texts; without any, with each other.

    Raises:
        UserError: see `steer_embeddings`; none of the latents fires, so that a mode that scales them changes nothing.
    """
    if k < 1:
        raise UserError(f"k must be a positive integer, got {k}.")
    if blank := [text for text in texts if not text.strip()]:
        raise UserError(f"The watched text {blank[0]!r} is blank: give at least a word.")
    prompts, texts = list(prompts), list(texts) or list(dict.fromkeys(prompts))
    options: dict[str, Any] = {"prompt": settings.prompt, "normalize": settings.normalize}
    moved = steer_embeddings(encoder, prompts, intervention, **options)
    before_Pn, after_Pn = _codes(encoder, prompts, intervention, options)
    silent = []
    if intervention.mode in SCALES and not intervention.drop_error:
        fires_n = (before_Pn != 0).any(0).tolist()
        silent = [number for number, fires in zip(intervention.features, fires_n, strict=True) if not fires]  # type: ignore[arg-type]
    if len(silent) == before_Pn.shape[1]:
        which = f"Latent {silent[0]} never fires" if len(silent) == 1 else f"None of latents {silent} ever fires"
        raise UserError(
            f"{which} in the prompts, so '{intervention.mode}' changes nothing: take prompts in which it fires, or use "
            "--mode set."
        )
    with_WD = torch.nn.functional.normalize(encoder.embed(texts, **options).float(), dim=-1)
    original_PW, modified_PW = (
        (torch.nn.functional.normalize(side_PD.float(), dim=-1) @ with_WD.t()).cpu().double().numpy()
        for side_PD in (moved.original_ND, moved.modified_ND)
    )
    return TextsView(
        title,
        intervention,
        prompts,
        texts,
        before_Pn,
        after_Pn,
        moved.cosine_N.cpu().double().numpy(),
        original_PW,
        modified_PW,
        k,
        silent,
    )


def _codes(
    encoder: SentenceEncoder, prompts: Sequence[str], one: Intervention, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """([P, n] codes of the latents in each prompt, [P, n] what the intervention makes of them), where it does most."""
    from dictionary_learning.activations.sentence_model import SENTENCE

    reads = one.hook_point if isinstance(one.hook_point, str) else one.hook_point[0]
    if reads == SENTENCE:
        states = [x_D[None] for x_D in encoder.embed(prompts, **options)]
    else:
        states = [found.acts[reads] for found in encoder.token_states(prompts, [reads], prompt=options["prompt"])]
    before, after = [], []
    for x_TD in states:
        f_Tn = one.dictionary.encode(as_the_dictionary(x_TD, one.dictionary))[:, list(one.features)]  # type: ignore[arg-type]
        new_Tn = one.codes(f_Tn)
        most_1n = (new_Tn - f_Tn).abs().argmax(0, keepdim=True)
        before.append(f_Tn.gather(0, most_1n)[0])
        after.append(new_Tn.gather(0, most_1n)[0])
    return torch.stack(before).float().cpu().numpy(), torch.stack(after).float().cpu().numpy()


# ---- to look at --------------------------------------------------------------------------------------------------


def print_view(view: TextsView) -> None:
    """To stdout."""
    steer_views.stdout().print(tables(view))


def tables(view: TextsView) -> RenderableType:
    """How far each prompt moved, and for each its similarity to other texts, those first where it changes most."""
    parts: list[RenderableType] = [Text(steer_views.shown(view.title), style="bold")]
    parts.append(Text(steer_views.in_words(view.intervention)))
    for number in view.silent:
        parts.append(Text(f"Latent {number} fires in none of the prompts: it is left as it is."))
    table = Table(title="how far embeddings move", title_justify="left")
    table.add_column("prompt", justify="right")
    table.add_column("text")
    for name in ("cosine to the original", *(f"latent {number}" for number in view.intervention.features)):  # type: ignore[union-attr]
        table.add_column(name, justify="right")
    for at, prompt in enumerate(view.prompts):
        codes = [steer_views.arrow(*pair) for pair in zip(view.before_Pn[at], view.after_Pn[at], strict=True)]
        table.add_row(str(at), _cut(prompt), f"{view.cosine_P[at]:.4f}", *codes)
    parts += [Text(), table]
    for at, prompt in enumerate(view.prompts):
        others = [place for place, text in enumerate(view.texts) if text != prompt]
        if not others:
            continue
        change_W = view.modified_PW[at] - view.original_PW[at]
        title = Text(f"similarity of prompt {at} to others")
        table = Table(title=title, title_justify="left")
        for name in ("text", "original", "modified", "change"):
            table.add_column(name, justify="left" if name == "text" else "right")
        for place in sorted(others, key=lambda place: -abs(change_W[place]))[: view.listed]:
            numbers = (f"{view.original_PW[at, place]:.4f}", f"{view.modified_PW[at, place]:.4f}")
            table.add_row(_cut(view.texts[place]), *numbers, f"{change_W[place]:+.4f}")
        parts += [Text(), table]
    return Group(*parts)


def _cut(text: str) -> Text:
    plain = steer_views.shown(text)
    return Text(plain if len(plain) <= TEXT_CHARACTERS else plain[: TEXT_CHARACTERS - 1] + "…")
