"""`sae-factory analyze`: the command line of the analysis, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dictionary_learning.analysis.folder import COMPLETE, INFO, AnalysisFolder
from dictionary_learning.command_line import parse
from dictionary_learning.errors import UserError, did_you_mean, exit_code, instead_of_commit

INTERRUPTED = "Interrupted: the same command goes on from the last saved state."
ANOTHER_TEXT = "give another text as --corpus (and --overwrite, where there is an analysis of the old one)"
_SPLITS = ("all", "train", "heldout")


@dataclass
class AnalyzeArgs:
    """Measure on text what each latent of a run's dictionaries, or of one dictionary, fires on and does.

    The same command goes on after an interruption.
    """

    source: tyro.conf.Positional[str]
    """A run, the folder of a dictionary (ours, or of SAELens, sparsify, Gemma Scope), or hf://user/repo."""
    corpus: tuple[str, ...] = ()
    """Text: files, folders (.jsonl, .parquet, .txt, or raw medical QA records), hf://user/name, 'medical_qa' or
    'embedded'; or NAME=one of these, to count all its text under that name. Left out, that of the run."""
    against: tuple[str, ...] = ()
    """Text to compare with, in the same forms; each is counted under one name."""
    dictionaries: tuple[str, ...] = ()
    """Which to analyse: names such as trainer_3, front (those of the best trade-offs), best. Left out, all."""
    model_name: str | None = None
    """A model on the Hub or a local folder, where the dictionary does not say it or another one is wanted."""
    hook_point: str | None = None
    """Where the dictionary reads, such as resid_post_layer_8, where it does not say it."""
    ctx_len: int | None = None
    """Tokens in a context (left out: as in training)."""
    tokens: int | Literal["all"] = 200_000
    """Tokens to see (of a sentence encoder's embeddings: texts); all: every text once. Several corpora give about the
    same number of characters each, until one is used up."""
    split: str = "all"
    """Of the text: all, or the train or heldout part of the run."""
    top: int = 10
    """Examples of highest activation to keep of each latent."""
    samples: int = 20
    """Examples to keep of each latent that are drawn from all its activations."""
    window: int = 64
    """Tokens of text around an example."""
    coactive: int = 256
    """The most active latents, of which is counted how often each two fire together."""
    seed: int = 0
    """Of the order of the texts and of the drawn examples."""
    batch_contexts: int | None = None
    """Contexts (of a sentence encoder: texts) in one forward of the model (left out: as in training)."""
    effects: bool = True
    """Read decoder directions as tokens through the model's unembedding."""
    ablate: int = 32
    """Ablate so many of the most active latents, to see what their absence does to the loss; 0: none."""
    device: str = "auto"
    """auto (cuda, mps, cpu: the first that is there), cpu, cuda, cuda:1, mps."""
    out: Path | None = None
    """Folder to write to (left out: RUN/analysis)."""
    overwrite: bool = False
    """Replace an analysis of other settings that is there. Descriptions of latents that did not change are kept."""
    state_every: int | None = None
    """Batches between saved states (default: a fifth of the pass; 0: only when stopped)."""
    dry_run: bool = False
    """Print what would be done, with the memory and disk space that it takes, and stop."""


@instead_of_commit(ANOTHER_TEXT)
def run_command(args: AnalyzeArgs) -> int:
    """Run parsed arguments: 0, 130 or 143 when stopped. Raises UserError."""
    from dictionary_learning import record
    from dictionary_learning.analysis.job import Stopped, analyze
    from dictionary_learning.analysis.one_pass import Measures
    from dictionary_learning.stopping import EXIT_CODES

    if args.split not in _SPLITS:
        raise UserError(f"Unknown split '{args.split}': use {', '.join(_SPLITS)}.{did_you_mean(args.split, _SPLITS)}")
    measures = Measures(
        tokens=None if args.tokens == "all" else args.tokens,
        split=args.split,
        top=args.top,
        samples=args.samples,
        window=args.window,
        coactive=args.coactive,
        seed=args.seed,
        effects=args.effects,
        ablate=args.ablate,
    )
    try:
        folder = analyze(
            args.source,
            corpus=args.corpus,
            against=args.against,
            measures=measures,
            dictionaries=args.dictionaries,
            model_name=args.model_name,
            hook_point=args.hook_point,
            ctx_len=args.ctx_len,
            batch_contexts=args.batch_contexts,
            device=args.device,
            out=args.out,
            overwrite=args.overwrite,
            state_every=args.state_every,
            dry_run=args.dry_run,
        )
    except Stopped as stop:
        print(f"Stopped by {stop.reason} after {stop.seen}; the state is saved. Go on with:")
        print(f"  {record.resume_command().removesuffix(' --resume')}")
        return EXIT_CODES[stop.reason]
    there = not args.overwrite and (folder.path / INFO).is_file() and folder.info["status"] == COMPLETE
    if there or not args.dry_run:
        print_analysis(folder)
    return 0


def print_analysis(folder: AnalysisFolder) -> None:
    """How many latents of each dictionary are alive, dense, or of one corpus, and where the files are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dictionary_learning.analysis.concepts import concepts, print_concepts
    from dictionary_learning.untrusted import shown

    info = folder.info
    several = len(info["corpora"]) > 1
    table = Table(title=f"Latents on {info['rows']:,} {info['unit']}s of {info['documents']:,} documents")
    table.title_justify = "left"
    for column in ("dictionary", "architecture", "hook point"):
        table.add_column(column)
    for column in ("L0", "latents", "dead", "dense", *(["of one corpus"] if several else [])):
        table.add_column(column, justify="right")
    against = info["settings"].get("against") or ()
    told = {}  # name -> how much the ten most telling latents tell
    for entry in info["dictionaries"]:
        columns = folder.table(entry["name"])
        specific = [f"{(columns['corpus'] != '').sum():,}"] if several else []
        if entry["alive"]:
            found = concepts(columns, int(info["documents"]), against=against, limit=10)
            told[entry["name"]] = sum(concept.score for concept in found)
        table.add_row(
            *(escape(shown(entry[key])) for key in ("name", "architecture", "hook_point")),
            f"{entry['l0']:.1f}",
            *(f"{entry[key]:,}" for key in ("dict_size", "dead", "dense")),
            *specific,
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if told:  # one is enough to look at here
        print_concepts(folder, max(told, key=told.__getitem__))
    print(f"Written to {folder.path}: analysis.json, and a folder for each dictionary.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, 2 for what can be mended (one sentence), 130 or 143 when stopped."""
    args = parse(AnalyzeArgs, argv, "sae-factory analyze")
    return exit_code(lambda: run_command(args), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
