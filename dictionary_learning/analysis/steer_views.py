"""What `sae-factory steer` shows: tables and coloured tokens for the terminal and HTML, heat maps as pictures.

In: comparisons and continuations of prompts. Out: text that any terminal can take, an HTML page, a picture. Prompts and
tokens are hostile text: control characters and direction marks are shown as escapes, markup of rich and of matplotlib
is not read. Colours run from white to orange, and from blue over white to orange, which colour-blind readers can tell
apart; the numbers stand beside them.
"""

from __future__ import annotations

import io
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dictionary_learning.analysis.generation import Continuation
from dictionary_learning.analysis.interventions import Comparison, Intervention
from dictionary_learning.errors import UserError

ORANGE, BLUE = (230, 97, 1), (49, 119, 196)
LARGEST_CHANGES = 5  # positions listed beside the coloured tokens
TOKENS_A_ROW, ROWS_AT_MOST, DPI = 32, 200, 150  # of a picture
PAGE_COLUMNS, PIPE_COLUMNS = 120, 150


@dataclass(frozen=True)
class View:
    """What there is to show. at: the token behind which next tokens are listed. silent: latents that never fire."""

    title: str
    intervention: Intervention
    comparisons: list[Comparison]
    continuations: list[Continuation]
    at: int
    silent: list[int]

    @property
    def doing(self) -> str:
        """The intervention in words."""
        return in_words(self.intervention)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        prompts = [comparison.to_dict() for comparison in self.comparisons]
        for prompt, found in zip(prompts, self.continuations, strict=False):
            prompt["continuation"] = {"original": found.original, "modified": found.modified}
        return {
            "dictionary": self.title,
            "intervention": as_json(self.intervention),
            "never_fires": self.silent,
            "prompts": prompts,
        }


def in_words(one: Intervention) -> str:
    """What an intervention does."""
    features = ", ".join(map(str, one.features))  # type: ignore[arg-type]
    value = "" if one.value is None else f" {one.value:g}"
    multiples = " x its largest activation" if set(one.unit) != {1.0} else ""  # type: ignore[arg-type]
    return f"{one.mode}{value}{multiples}, latent {features}" + (", error dropped" if one.drop_error else "")


def as_json(one: Intervention) -> dict[str, Any]:
    """An intervention as JSON can hold it."""
    return {
        "features": list(one.features),  # type: ignore[arg-type]
        "mode": one.mode,
        "value": one.value,
        "unit": list(one.unit),  # type: ignore[arg-type]
        "drop_error": one.drop_error,
    }


def shown(text: str, *, spaces: bool = False) -> str:
    """Text that changes nothing where it is printed: what is not printable as escapes, a line break as an arrow.

    Args:
        spaces: show spaces, too, which matter in a token.
    """
    plain = "".join(
        char if char.isprintable() else "↵" if char == "\n" else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
    return plain.replace(" ", "·") if spaces else plain


# ---- terminal and HTML -------------------------------------------------------------------------------------------


def stdout() -> Console:
    """As wide as the terminal, or as wide as tables need where the output goes elsewhere."""
    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)


def print_view(view: View) -> None:
    """To stdout, with colours where that is a terminal."""
    console = stdout()
    console.print(_renderable(view, coloured=console.color_system is not None))


def html(view: View) -> str:
    """The same as a page of its own."""
    return page(_renderable(view, coloured=True))


def page(parts: RenderableType) -> str:
    """What a terminal would show as HTML."""
    console = Console(
        record=True,
        file=io.StringIO(),
        width=PAGE_COLUMNS,
        color_system="truecolor",
        force_terminal=True,
        highlight=False,
        legacy_windows=False,
    )
    console.print(parts)
    return console.export_html(inline_styles=True)


def _renderable(view: View, coloured: bool) -> RenderableType:
    """Everything; the heat maps, which say nothing without colours, only with them."""
    parts: list[RenderableType] = [Text(shown(view.title), style="bold"), Text(view.doing)]
    for number in view.silent:
        parts.append(Text(f"Latent {number} fires at none of the chosen tokens: it is left as it is."))
    for number, one in enumerate(view.comparisons):
        parts += [Text(), Text(f"Prompt {number}: ", style="bold").append(shown(one.prompt), style="not bold")]
        if not one.changed_T.any():
            why = "all its tokens are special" if view.intervention.positions == "all" else "the pattern is not in it"
            parts.append(Text(f"Nothing is changed at the prompt's tokens: {why}."))
        elif not one.kl_T.any():
            parts.append(Text("No prediction changes."))
        else:
            parts += [*([_heat_map(one)] if coloured else []), _changes(one)]
        parts.append(_next(one, view.at))
        if one.watched:
            parts.append(_watched(one, view.at))
        if view.continuations:
            parts.append(_continuation(view.continuations[number]))
    return Group(*parts)


def _heat_map(one: Comparison) -> Table:
    """The prompt's tokens coloured by the KL divergence of what follows, and by the change of each latent."""
    rows = [("KL", np.asarray(one.kl_T, dtype=float))]
    changes_Tn = one.after_Tn - one.before_Tn
    rows += [(f"latent {number}", changes_Tn[:, index]) for index, (_, number) in enumerate(one.latents)]
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value_T in rows:
        scale = max(float(np.abs(value_T).max()), 1e-12)
        text = Text()
        for token, value in zip(one.tokens, value_T.tolist(), strict=True):
            red, green, blue = _colour(value / scale)
            text.append(shown(token), style=f"rgb(0,0,0) on rgb({red},{green},{blue})")
        table.add_row(Text(f"{name} (to {value_T[np.abs(value_T).argmax()]:.3g})"), text)
    return table


def _colour(share: float) -> tuple[int, int, int]:
    """-1 blue, 0 white, 1 orange."""
    end = ORANGE if share > 0 else BLUE
    red, green, blue = (round(255 + (value - 255) * min(1.0, abs(share))) for value in end)
    return red, green, blue


def _changes(one: Comparison) -> Table:
    """The tokens behind which predictions change most, with the latents there."""
    table = Table(title="where predictions change most", title_justify="left")
    for name in ("position", "token", "KL (nats)", *(f"latent {number}" for _, number in one.latents)):
        table.add_column(name, justify="left" if name == "token" else "right")
    for position in np.argsort(-one.kl_T, kind="stable")[:LARGEST_CHANGES].tolist():
        if not one.kl_T[position]:
            break
        codes = [
            arrow(before, after) for before, after in zip(one.before_Tn[position], one.after_Tn[position], strict=True)
        ]
        table.add_row(str(position), _token(one.tokens[position]), f"{one.kl_T[position]:.4f}", *codes)
    return table


def _next(one: Comparison, position: int) -> Table:
    """The likeliest next tokens, original beside modified."""
    title = Text("next token after ").append(shown(one.tokens[position], spaces=True), style="bold")
    table = Table(title=title, title_justify="left")
    for name in ("original", "p", "modified", "p "):
        table.add_column(name, justify="right" if name.startswith("p") else "left")
    both = one.table(position)
    for (old, p), (new, q) in zip(both["original"], both["modified"], strict=True):
        table.add_row(_token(old), f"{p:.4f}", _token(new), f"{q:.4f}")
    return table


def _watched(one: Comparison, position: int) -> Table:
    table = Table(title="watched tokens", title_justify="left")
    for name in ("token", "original p", "modified p"):
        table.add_column(name, justify="left" if name == "token" else "right")
    rows = zip(one.watched, one.original_Tw[position], one.modified_Tw[position], strict=True)
    for token, p, q in rows:
        table.add_row(_token(token), f"{p:.4g}", f"{q:.4g}")
    return table


def _continuation(found: Continuation) -> Table:
    table = Table(title="continuation", title_justify="left")
    for name in ("original", "modified"):
        table.add_column(name, ratio=1)
    table.add_row(Text(shown(found.original)), Text(shown(found.modified)))
    return table


def arrow(before: float, after: float) -> str:
    """A code before and after, without the sign of a negative zero."""
    return f"{before + 0.0:.3g} → {after + 0.0:.3g}"


def _token(token: str) -> Text:
    return Text(shown(token, spaces=True))


# ---- pictures ----------------------------------------------------------------------------------------------------


def require_matplotlib() -> None:
    """Raises UserError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("Pictures need the package matplotlib: pip install 'sae-factory[report]'.") from None


def draw(view: View, path: Path, kind: str) -> None:
    """Heat maps over the tokens of each prompt: KL divergence, and the change of each latent.

    Raises:
        UserError: more tokens than a picture can hold.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    parts = [
        (number, one, slice(start, start + TOKENS_A_ROW))
        for number, one in enumerate(view.comparisons)
        for start in range(0, len(one.tokens), TOKENS_A_ROW)
    ]
    if len(parts) > ROWS_AT_MOST:
        raise UserError(
            f"A picture holds {ROWS_AT_MOST} rows of {TOKENS_A_ROW} tokens, and these prompts need {len(parts)}: give "
            "fewer, or --out as .json or .html."
        )
    latents = len(view.comparisons[0].latents)
    colours = LinearSegmentedColormap.from_list(
        "change", [tuple(v / 255 for v in c) for c in (BLUE, (255,) * 3, ORANGE)]
    )
    figure = Figure(figsize=(12, len(parts) * (1.3 + 0.3 * latents) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{shown(view.title)}\n{view.doing}", fontsize=10, parse_math=False)
    grid = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    for axes, (number, one, part) in zip(grid, parts, strict=True):
        rows_RT = np.concatenate([one.kl_T[None], (one.after_Tn - one.before_Tn).T])
        largest_R = np.maximum(np.abs(rows_RT).max(1, keepdims=True), 1e-12)
        axes.imshow((rows_RT / largest_R)[:, part], cmap=colours, vmin=-1, vmax=1, aspect="auto")
        tokens = [shown(token, spaces=True) for token in one.tokens[part]]
        axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=7, parse_math=False)
        axes.set_xlim(-0.5, min(TOKENS_A_ROW, len(one.tokens)) - 0.5)
        signed = [row[np.abs(row).argmax()] for row in rows_RT]
        names = ["KL", *(f"latent {latent}" for _, latent in one.latents)]
        labels = [f"{name} (to {value:.3g})" for name, value in zip(names, signed, strict=True)]
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set_title(f"prompt {number}, from token {part.start}", fontsize=8, loc="left")
    with warnings.catch_warnings():  # of characters that the font has no picture for: they become boxes
        warnings.filterwarnings("ignore", message=r"Glyph .* missing", category=UserWarning)
        figure.savefig(path, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
