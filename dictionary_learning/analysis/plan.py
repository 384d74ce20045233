"""What an analysis will read, and what it takes: shown by `sae-factory analyze --dry_run`, and warned of before a pass.

In: a pass that has not begun. Out: rows of a table, in bytes that follow from the sizes of dictionaries and examples
alone, so that they hold for any text. Files are estimated: how well strings and columns compress, the text decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dictionary_learning.analysis.effects import ELEMENTS
from dictionary_learning.analysis.examples import bytes_of_examples
from dictionary_learning.analysis.probes import bytes_of_probes
from dictionary_learning.storage import STATES_KEPT
from dictionary_learning.untrusted import listed

if TYPE_CHECKING:
    from dictionary_learning.analysis.one_pass import Measures, OnePass
    from dictionary_learning.config import RunConfig

SMALLER = "--dictionaries front, or smaller --window, --samples and --top, take less"
_EXAMPLE_BYTES, _TOKEN_BYTES = 20, 8  # of an example and of a token of its window in examples.safetensors
_SHOWN_EXAMPLE_BYTES, _SHOWN_TOKEN_BYTES = 150, 10  # of the same in top_activations_*.json, about
_ROW_BYTES = 700  # of a latent in the table and the sums, about
_WORD_BYTES = 24  # of a token of an example while words are counted; measured 20
_EFFECTS_BYTES = 6 * 4 * ELEMENTS  # logits or codes with and without a latent, and what `encode` takes; measured 5


def print_plan(one_pass: OnePass, config: RunConfig, lm: Any, folder: Path) -> None:
    """Print what would be done, and what that takes."""
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="The plan", title_justify="left", show_header=False)
    for name, value in _lines(one_pass, config, lm, folder):
        table.add_row(name, Text(value))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _lines(one_pass: OnePass, config: RunConfig, lm: Any, folder: Path) -> list[tuple[str, str]]:
    state, work = one_pass.state_bytes, one_pass.bytes_needed - one_pass.state_bytes
    unit, subjects, free = one_pass.unit, one_pass.subjects, free_bytes(one_pass)
    sizes = sorted({subject.dictionary.dict_size for subject in subjects})
    points = dict.fromkeys(str(subject.facts["hook_point"]) for subject in subjects)
    limit = one_pass.measures.tokens
    rows = f"every text once, in {unit}s" if limit is None else f"up to {limit:,} {unit}s"
    files = sum(_file_bytes(subject.dictionary.dict_size, one_pass) for subject in subjects)
    disk = size(files) + (" and the texts of examples" if unit == "text" else "")
    return [
        ("model", f"{config.model_name}, on {lm.device}"),
        ("dictionaries", f"{len(subjects)} of {' and '.join(f'{size:,}' for size in sizes)} latents"),
        ("hook points", listed(list(points))),
        ("text", f"{rows}, of {listed([entry.name for entry in one_pass.texts.corpora])}"),
        ("one forward", f"at most {one_pass.source.max_rows:,} {unit}s"),
        ("memory", f"at most {size(state + work)} beside model and dictionaries, {size(state)} of it all the time"),
        *([("free memory", size(free))] if free is not None else []),
        ("files", f"about {disk}, in {folder}"),
        ("saved states", f"{size(STATES_KEPT * state)} on the same disk until the analysis is complete"),
    ]


def too_much(one_pass: OnePass) -> str | None:
    """A sentence where the analysis may not fit into the memory that is free; None where they do, or nobody knows."""
    free = free_bytes(one_pass)
    if free is None or one_pass.bytes_needed <= free:
        return None
    return f"this may need {size(one_pass.bytes_needed)}, and {size(free)} are free: {SMALLER}."


def bytes_of_writing(dict_size: int, unit: str, measures: Measures) -> int:
    """Bytes that one dictionary's labels, effects and files take for a moment, a copy of its examples among them."""
    window = 0 if unit == "text" else measures.window
    examples = sum(bytes_of_examples(dict_size, number, window) for number in (measures.top, measures.samples))
    words = _WORD_BYTES * dict_size * (measures.top + measures.samples) * window
    return examples + max(words, _EFFECTS_BYTES)


def free_bytes(one_pass: OnePass) -> int | None:
    """Of the device on which the statistics are kept; None: unknown."""
    import torch

    from dictionary_learning.diagnosis import free_memory

    device = next(iter(one_pass.passes.values())).device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def _file_bytes(dict_size: int, one_pass: OnePass) -> int:
    measures = one_pass.measures
    window = 0 if one_pass.unit == "text" else measures.window
    examples = (measures.top + measures.samples) * (_EXAMPLE_BYTES + _TOKEN_BYTES * window)
    shown = measures.top * (_SHOWN_EXAMPLE_BYTES + _SHOWN_TOKEN_BYTES * window)
    return dict_size * (examples + shown + _ROW_BYTES) + bytes_of_probes(dict_size)


def size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 1):,.0f} MB"
