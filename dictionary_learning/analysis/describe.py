"""`sae-factory describe`: ask a language model what latents mean, and see how well its descriptions predict them.

In: an analysis, and an OpenAI-compatible address that the user names; nothing is sent without one, or anywhere else.
Out: descriptions.json of a dictionary, which grows as answers come, and a table on the console.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from dictionary_learning.analysis.concepts import telling_features
from dictionary_learning.analysis.description_prompts import Material
from dictionary_learning.analysis.descriptions import Outcome, describe_features, estimate, whole_prompt
from dictionary_learning.analysis.endpoint import ChatEndpoint
from dictionary_learning.analysis.folder import DESCRIPTIONS, AnalysisFolder
from dictionary_learning.analysis.subjects import trained_on
from dictionary_learning.command_line import parse
from dictionary_learning.errors import UserError, exit_code

SAVE_SECONDS = 2.0  # between two writings of the file, which may be large
SHOWN = 30  # rows of the table on the console
INTERRUPTED = "Interrupted: what was answered is saved; the same command goes on."


@dataclass
class DescribeArgs:
    """Describe latents with a language model, and score the descriptions on held-out examples.

    Prompts with texts of the corpus go to the endpoint; its key is taken from SAE_FACTORY_API_KEY or OPENAI_API_KEY.
    The same command goes on after an interruption: latents that this model has described are not asked for again.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """A run that was analysed, or the folder of an analysis."""
    endpoint: str | None = None
    """Address of the model, OpenAI-compatible: http://localhost:8000/v1, https://api.openai.com/v1."""
    model: str | None = None
    """Its name there."""
    dictionary: str | None = None
    """Which to describe, as trainer_3; may be left out where one was analysed."""
    features: tuple[int, ...] = ()
    """Latents to describe, in place of the most telling ones."""
    top_features: int = 50
    """How many of the most telling latents to describe."""
    score: bool = True
    """Judge each description on held-out examples, which takes a second request."""
    parallel: int = 4
    """Requests at a time."""
    timeout: float = 60.0
    """Seconds without an answer after which a request is tried again."""
    answer_tokens: int = 1024
    """An answer has at most so many; models that think aloud need more."""
    seed: int = 0
    """Of the drawn texts that descriptions are judged by."""
    dry_run: bool = False
    """Print one prompt and what the whole would take, and send nothing."""


def run_command(args: DescribeArgs) -> int:
    """Run parsed arguments. Raises UserError."""
    _check(args)
    folder = AnalysisFolder.open(args.source)
    name = _dictionary(folder, args.dictionary)
    run = folder.path.parent
    own = [entry for entry in folder.info["dictionaries"] if entry["name"] == name]
    if (run / "run.json").is_file() and trained_on(run, own):
        raise UserError(
            f"{name} was trained on since it was analysed: make the analysis again with "
            f"`sae-factory analyze {run} --overwrite`."
        )
    material = Material(folder, name, args.seed)
    features = _features(folder, name, material, args)
    if args.dry_run:
        requests, tokens = estimate(material, features, args.score)
        print(whole_prompt(material, features[0]))
        print(f"\n{len(features)} latents of {name}: {requests:,} requests, about {tokens:,} tokens of prompts.")
        return 0
    if args.endpoint is None or args.model is None:
        raise UserError("Nothing is sent without --endpoint and --model: give both, or --dry_run to see a prompt.")
    if args.score and material.probes is None:
        raise UserError(
            f"The analysis in '{folder.path}' kept no texts in which latents are silent, which a score needs: make it "
            "again with --overwrite, or add --no-score."
        )
    endpoint = ChatEndpoint(args.endpoint, args.model, answer_tokens=args.answer_tokens, timeout=args.timeout)
    outcome = describe(folder, name, material, features, endpoint, score=args.score, parallel=args.parallel)
    _print(folder, name, features, outcome)
    failed = {feature: record["reason"] for feature, record in outcome.records.items() if "reason" in record}
    if failed and len(failed) == len(outcome.records):
        raise UserError(f"No latent could be described and scored: {next(iter(failed.values()))}.")
    return 0


def describe(
    folder: AnalysisFolder,
    name: str,
    material: Material,
    features: Sequence[int],
    endpoint: ChatEndpoint,
    *,
    score: bool = True,
    parallel: int = 4,
) -> Outcome:
    """Describe latents of dictionary `name` and keep the records in its descriptions.json as they come.

    Raises:
        UserError: see `describe_features`; what was answered until then is kept.
    """
    from tqdm import tqdm

    records = {at: record for at, record in folder.descriptions(name).items() if isinstance(record, dict)}
    known = dict(records)
    written = time.monotonic()
    with tqdm(total=len(features), desc="describing", unit="latent", disable=None) as bar:

        def made(feature: int, record: dict[str, Any]) -> None:
            nonlocal written
            old = records.get(feature, {})
            if record["description"] is not None or old.get("description") is None:
                records[feature] = record  # a failure does not take the place of a description
            bar.update()
            if time.monotonic() - written > SAVE_SECONDS:
                folder.write_descriptions(name, records)
                written = time.monotonic()

        try:
            return describe_features(material, features, endpoint, known, score=score, parallel=parallel, made=made)
        finally:
            if records != known:
                folder.write_descriptions(name, records)


def _check(args: DescribeArgs) -> None:
    for flag, value, least in (
        ("top_features", args.top_features, 1),
        ("parallel", args.parallel, 1),
        ("answer_tokens", args.answer_tokens, 1),
        ("seed", args.seed, 0),
    ):
        if value < least:
            raise UserError(f"--{flag} must be at least {least}, got {value}.")
    if not 0 < args.timeout < float("inf"):
        raise UserError(f"--timeout must be a number of seconds above 0, got {args.timeout}.")


def _dictionary(folder: AnalysisFolder, name: str | None) -> str:
    if name is None and len(folder.names) != 1:
        raise UserError(f"Several dictionaries were analysed: choose one with --dictionary: {', '.join(folder.names)}.")
    chosen = name or folder.names[0]
    folder.folder(chosen)  # says it if there is no such
    return chosen


def _features(folder: AnalysisFolder, name: str, material: Material, args: DescribeArgs) -> list[int]:
    """The latents to describe: those asked for, or the most telling first and then those whose labels hold best."""
    table = material.table
    latents = len(table["density"])
    if args.features:
        for feature in args.features:
            if not 0 <= feature < latents:
                raise UserError(f"There is no latent {feature} in {name}: they are numbered 0 to {latents - 1}.")
            if not material.has_examples(feature):
                raise UserError(f"Latent {feature} of {name} fired nowhere in the analysed text: leave it out.")
        return list(dict.fromkeys(args.features))
    telling = [concept.feature for concept in telling_features(folder, name)]
    status = table["status"]
    rest = np.lexsort((np.arange(latents), -table["label_share"], status == "dense")).tolist()
    chosen = [feature for feature in dict.fromkeys([*telling, *rest]) if material.has_examples(feature)]
    if not chosen:
        raise UserError(f"No latent of {name} fired in the analysed text: there is nothing to describe.")
    return chosen[: args.top_features]


def _print(folder: AnalysisFolder, name: str, features: Sequence[int], outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    records = folder.descriptions(name)
    table = Table(title=f"Latents of {name}", title_justify="left")
    table.add_column("latent", justify="right")
    table.add_column("score", justify="right")
    table.add_column("95 %")
    table.add_column("description")
    for feature in features[:SHOWN]:
        record = records[feature]
        judged = record["score"] is not None
        table.add_row(
            str(feature),
            f"{record['score']:.2f}" if judged else "–",
            "–".join(f"{end:.2f}" for end in record["score_interval"]) if judged else "–",
            Text(record["description"] or record["reason"]),
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    made = outcome.records.values()
    tokens = sum(record["usage"]["prompt_tokens"] + record["usage"]["completion_tokens"] for record in made)
    requests = sum(record["usage"]["requests"] for record in made)
    print(
        f"{len(outcome.records)} asked for now, {len(outcome.skipped)} described before; {requests:,} requests, "
        f"{tokens:,} tokens. Written to {folder.folder(name) / DESCRIPTIONS}."
    )
    for feature, record in sorted(outcome.records.items()):
        if "reason" in record:
            print(f"Latent {feature}: {record['reason']}.", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0; 2 for what can be mended (one sentence); 130 after Ctrl-C."""
    args = parse(DescribeArgs, argv, "sae-factory describe")
    return exit_code(lambda: run_command(args), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
