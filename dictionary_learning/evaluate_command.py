"""`sae-factory evaluate`: the metrics of trained dictionaries on any text.

In: a run, a dictionary in any format known here, or one on the Hub, and text. Out: the table that a training run ends
with, and a JSON file. Text, model, contexts and what is left out are those of the dictionaries' training unless said
otherwise, so that `--verify` measures again what a run has stored, and says whether it is the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from dictionary_learning import storage
from dictionary_learning.command_line import parse
from dictionary_learning.errors import UserError, did_you_mean, exit_code, instead_of_commit

if TYPE_CHECKING:
    from dictionary_learning.analysis.subjects import Subject, Subjects
    from dictionary_learning.metrics import EvalResult

DIFFERENT_EXIT = 1  # the metrics are not those that are stored
_SPLITS = ("heldout", "train", "all")
# Sums of fp32 products in another order differ in their last digits; more is another dictionary, model or text.
RELATIVE_TOLERANCE = 1e-3


@dataclass
class EvaluateArgs:
    """Measure dictionaries on text: L0, variance explained and, with a language model, the loss recovered."""

    source: tyro.conf.Positional[str]
    """A run, the folder of a dictionary (ours, or of SAELens, sparsify, Gemma Scope), or hf://user/repo."""
    corpus: str | None = None
    """Text: a file, a folder (.jsonl, .parquet, .txt, or raw medical QA records), hf://user/name, 'medical_qa' or
    'embedded'. Left out, that of the run."""
    split: str | None = None
    """Of the text: heldout, train or all (default: heldout of the run's own text, all of another)."""
    dictionaries: tuple[str, ...] = ()
    """Which to evaluate: names such as trainer_3, front (those of the best trade-offs), best. Left out, all."""
    model_name: str | None = None
    """A model on the Hub or a local folder, where the dictionary does not say it or another one is wanted."""
    hook_point: str | None = None
    """Where the dictionary reads, such as resid_post_layer_8, where it does not say it."""
    ctx_len: int | None = None
    """Tokens in a context (left out: as in training)."""
    tokens: int | None = None
    """Tokens to measure on (default: as the run did, or 20,000 outside of one)."""
    batch_contexts: int | None = None
    """Contexts (of a sentence encoder: texts) in one forward of the model (left out: as in training)."""
    device: str = "auto"
    """auto (cuda, mps, cpu: the first that is there), cpu, cuda, cuda:1, mps."""
    verify: bool = False
    """Compare with the eval_results.json beside each dictionary; exit code 1 where a metric differs by more than 0.1 %.
    """
    out: Path | None = None
    """JSON file to write the metrics to."""


@instead_of_commit("give another text as --corpus")
def run_command(args: EvaluateArgs) -> int:
    """Run parsed arguments: 0, or 1 where `--verify` found a difference.

    Raises:
        UserError: anything about the dictionaries, the model or the text that can't be.
    """
    from dictionary_learning.analysis.subjects import load_reader, load_subjects
    from dictionary_learning.devices import resolve_device
    from dictionary_learning.summary import sorted_along_front

    if args.tokens is not None and args.tokens < 1:
        raise UserError(f"tokens must be at least 1, got {args.tokens}.")
    if args.split not in (None, *_SPLITS):
        raise UserError(f"Unknown split '{args.split}': use {', '.join(_SPLITS)}.{did_you_mean(args.split, _SPLITS)}")
    if args.out is not None and args.out.expanduser().is_dir():
        raise UserError(f"--out '{args.out}' is a folder: give a file, such as {args.out / 'metrics.json'}.")
    device = resolve_device(args.device)
    subjects = load_subjects(
        args.source,
        chosen=args.dictionaries,
        model_name=args.model_name,
        hook_point=args.hook_point,
        ctx_len=args.ctx_len,
        batch_contexts=args.batch_contexts,
        device=device,
    )
    if not (args.corpus or subjects.config.corpus):
        raise UserError("A dictionary outside of a run has no corpus of its own: add --corpus.")
    if args.verify:
        if subjects.run is None:
            raise UserError(
                "--verify compares with the metrics of a run, and this dictionary is of none: leave it out."
            )
        for subject in subjects.dictionaries:
            if subject.results is None:
                raise UserError(f"{subject.name} has no eval_results.json to compare with: leave out --verify.")
    tokens = args.tokens or subjects.config.eval_tokens
    own = _is_own(args.corpus, subjects)
    if args.verify and not own:
        raise UserError(f"'{args.corpus}' is not the text of the run, whose metrics --verify compares: leave one out.")
    split = args.split or ("heldout" if own else "all")
    config = replace(subjects.config, corpus=args.corpus or subjects.config.corpus, eval_tokens=tokens)
    lm = load_reader(subjects, device)
    results = _measure(replace(subjects, config=config), lm, split, _commits(subjects))
    rows = []
    for subject, result in zip(subjects.dictionaries, results, strict=True):
        facts = subject.facts
        rows.append(
            {
                "trainer": subject.name,
                **{key: facts[key] for key in ("architecture", "hook_point")},
                "width": facts["dict_size"],
                "sparsity": " ".join(f"{name}={value:g}" for name, value in facts["sparsity"].items()),
                **result.to_dict(),
            }
        )
    part = "" if split == "all" else f", {split} part"
    _print(sorted_along_front(rows), f"On {rows[0]['tokens']:,} activations of {Path(config.corpus).name}{part}")
    if args.out is not None:
        try:
            storage.write_json(args.out.expanduser(), {row["trainer"]: row for row in rows})
        except OSError as error:
            raise UserError(
                f"'{args.out}' can't be written ({error.strerror or error}): give another --out."
            ) from error
        print(f"Written to {args.out}.")
    return _verify(subjects.dictionaries, rows) if args.verify else 0


def _is_own(corpus: str | None, subjects: Subjects) -> bool:
    """Whether a corpus is the one that the dictionaries were trained on, wherever it lies."""
    from dictionary_learning.corpus import open_corpus

    if corpus in (None, subjects.config.corpus):
        return True
    if subjects.run is None:
        return False
    recorded = storage.read_json(subjects.run / "run.json").get("corpus_fingerprint")
    return open_corpus(corpus, commits=_commits(subjects)).fingerprint == recorded


def _commits(subjects: Subjects) -> Mapping[str, str] | None:
    """At which commits the run read its corpus on the Hub: so does its evaluation."""
    from dictionary_learning.record import commits_of

    return None if subjects.run is None else commits_of(subjects.run, subjects.config).corpus


def _measure(subjects: Subjects, lm: Any, split: str, commits: Mapping[str, str] | None) -> list[EvalResult]:
    """The metrics of each dictionary, as a training run measures them at its end, on text of the Hub at `commits`."""
    from tqdm import tqdm

    from dictionary_learning import sentence_run
    from dictionary_learning.corpus import TextStream, open_corpus
    from dictionary_learning.evaluation import evaluate_dictionaries
    from dictionary_learning.packing import ContextPacker

    config = subjects.config
    corpus = open_corpus(config.corpus, commits=commits)
    texts = TextStream(corpus, split=split, heldout_fraction=config.heldout_fraction, seed=config.seed)
    with tqdm(total=config.eval_tokens, desc="evaluating", unit="row", unit_scale=True, disable=None) as bar:

        def progress(rows: int) -> None:
            bar.update(rows - bar.n)

        if config.sentence is not None:
            source = sentence_run.make_source(config, lm, texts, heldout=True)
            pairs = [(subject.reads, subject.dictionary) for subject in subjects.dictionaries]
            return sentence_run.evaluate_on_source(source, pairs, config.eval_tokens, progress)
        return evaluate_dictionaries(
            lm,
            ContextPacker(texts, lm.tokenizer, ctx_len=config.ctx_len, batch_contexts=config.eval_contexts),
            [(subject.site, subject.dictionary) for subject in subjects.dictionaries],
            max_tokens=config.eval_tokens,
            remove_special=config.remove_bos,
            max_activation_norm_multiple=config.max_activation_norm_multiple,
            progress=progress,
        )


def _print(rows: Sequence[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dictionary_learning.untrusted import shown

    numbers = {
        "L0": ("l0", ".1f"),
        "variance explained": ("frac_variance_explained", ".4f"),
        "loss recovered": ("frac_recovered", ".4f"),
        "KL": ("kl", ".4f"),
        "alive": ("frac_alive", ".3f"),
    }
    table = Table(title=escape(title), title_justify="left")
    for name in ("", "dictionary", "architecture", "sparsity", "width", "hook point"):
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    for row in rows:
        facts = (row[key] for key in ("trainer", "architecture", "sparsity", "width", "hook_point"))
        values = ("–" if row[key] is None else format(row[key], form) for key, form in numbers.values())
        table.add_row("*" if row["front"] else "", *(escape(shown(fact)) for fact in facts), *values)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _verify(subjects: Sequence[Subject], rows: Sequence[dict[str, Any]]) -> int:
    """Say whether what was measured is what is stored; the exit code."""
    different = 0
    for subject, row in zip(subjects, rows, strict=True):
        stored = subject.results or {}
        wrong = [name for name, value in stored.items() if not _same(value, row.get(name))]
        different += bool(wrong)
        shown = ", ".join(f"{name} {row.get(name)} where {stored[name]} is stored" for name in wrong)
        print(f"{subject.name}: {shown or f'its {len(stored)} stored metrics are confirmed'}.")
    return DIFFERENT_EXIT if different else 0


def _same(stored: Any, measured: Any) -> bool:
    if isinstance(stored, float) and isinstance(measured, float):
        return math.isclose(stored, measured, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-6)
    return stored == measured


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, 1 where `--verify` found a difference, 2 for what can be mended, 130 interrupted."""
    args = parse(EvaluateArgs, argv, "sae-factory evaluate")
    return exit_code(lambda: run_command(args))


if __name__ == "__main__":
    sys.exit(main())
