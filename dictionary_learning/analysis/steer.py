"""`sae-factory steer`: turn latents of a dictionary up, down or off, and see what the model predicts and writes.

In: a dictionary with its model and hook point (from its run or config), latents, prompts. Out: tables and coloured
tokens in the terminal, and a file where one is asked for: all numbers (.json), the terminal's view (.html), heat maps
(.png, .svg, .pdf). Of a sentence encoder, which predicts nothing, see `steer_texts.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dictionary_learning.command_line import parse
from dictionary_learning.errors import UserError, did_you_mean, exit_code

if TYPE_CHECKING:
    from dictionary_learning.analysis.generation import Continuation
    from dictionary_learning.analysis.interventions import Comparison, Intervention
    from dictionary_learning.analysis.prompts import Positions
    from dictionary_learning.analysis.steer_views import View
    from dictionary_learning.analysis.subjects import Subject, Subjects

PICTURES = (".png", ".svg", ".pdf")
FORMATS = (".json", ".html", *PICTURES)


@dataclass
class SteerArgs:
    """Change latents of a dictionary while its model reads prompts: predictions and continuations, original beside
    modified; of a sentence encoder embeddings, and what they are similar to."""

    dictionary: tyro.conf.Positional[str]
    """The folder of a dictionary (runs/first/trainer_3), one on the Hub (hf://user/repo/trainer_3), or a run, whose
    best dictionary is taken."""
    features: tuple[int, ...]
    """Numbers of the latents."""
    prompts: tuple[str, ...] = ()
    """Texts to begin with."""
    prompt_file: Path | None = None
    """A file with a prompt a line, besides or in place of --prompts."""
    mode: str = "amplify"
    """amplify (activation times value), suppress (divided by it), ablate (0), negate (its opposite), set (to value) or
    add (value to it)."""
    value: float | None = None
    """Factor of amplify and suppress (above 0; 1 changes nothing); activation of set and add."""
    relative: bool = False
    """Of set and add: value in multiples of each latent's largest activation, as the run's analysis has it."""
    positions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="P [P ...]")] = ("all",)
    """Tokens of the prompt to act on: all, last, numbers (0 the first, -1 the last), or a slice as --positions=-3:."""
    matching: str | None = None
    """Act on the tokens where this regular expression matches the prompt, in place of --positions."""
    drop_error: bool = False
    """Replace the activations there by the dictionary's reconstruction, instead of keeping what it does not explain."""
    k: int = 10
    """Next tokens listed; of a sentence encoder, texts."""
    watch: tuple[str, ...] = ()
    """Tokens whose probabilities to list, too, as ' aspirin'; of a sentence encoder, texts to compare prompts with."""
    at: int = -1
    """Token of the prompt behind which the next tokens are listed."""
    max_new_tokens: int = 40
    """Tokens to continue each prompt by; 0 for none."""
    scope: str = "both"
    """Where continuations are changed: prompt, generated (all tokens that the model writes), or both."""
    temperature: float = 0.0
    """Of continuations; 0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this probability together."""
    seed: int = 0
    """Of the draws, which are the same for both sides."""
    bos: bool = True
    """Put BOS, where the tokenizer has one, in front of every prompt, as training contexts have it."""
    model_name: str | None = None
    """A model on the Hub or a local folder, in place of the one that the dictionary names."""
    hook_point: str | None = None
    """Where the dictionary belongs, in place of what its config says."""
    device: str = "auto"
    """auto (cuda, mps, cpu: the first that is there), cpu, cuda, cuda:1, mps."""
    out: Path | None = None
    """File for the results: .json (everything), .html (as in the terminal), or .png, .svg, .pdf (heat maps)."""


def steer(args: SteerArgs) -> int:
    """The command; prints what it finds.

    Raises:
        UserError: see `Intervention`, `compare` and `generate`; a file that can't be read or written; or none of the
            latents fires, so that a mode that scales them changes nothing.
    """
    from dictionary_learning.analysis import steer_texts, steer_views
    from dictionary_learning.analysis.generation import generate
    from dictionary_learning.analysis.interventions import Intervention, compare
    from dictionary_learning.analysis.subjects import load_reader
    from dictionary_learning.devices import resolve_device

    prompts, positions = _prompts(args), _positions(args)
    _check(args)
    device = resolve_device(args.device)
    subjects = _load(args, device)
    subject = subjects.dictionaries[0]
    if subjects.config.sentence is not None:
        steer_texts.refuse_options_of_language_models(args)
    intervention = Intervention(
        subject.site,
        subject.dictionary,
        args.features,
        args.mode,
        args.value,
        positions,
        args.drop_error,
        _units(args, subjects, subject),
    )
    lm: Any = load_reader(subjects, device)
    title = f"{subject.name} at {subject.facts['hook_point']} of {subjects.config.model_name}"
    if subjects.config.sentence is not None:
        found = steer_texts.compare_texts(
            lm, prompts, intervention, args.watch, subjects.config.sentence, title=title, k=args.k
        )
        steer_texts.print_view(found)
        _write(args, found.to_dict, lambda: steer_views.page(steer_texts.tables(found)))
        return 0
    comparisons = compare(lm, prompts, intervention, k=args.k, watch=args.watch, bos=args.bos)
    for number, comparison in enumerate(comparisons):
        if not -len(comparison.tokens) <= args.at < len(comparison.tokens):
            raise UserError(f"--at {args.at} is outside prompt {number}, which has {len(comparison.tokens)} tokens.")
    continuations: list[Continuation] = []
    if args.max_new_tokens:
        continuations = generate(
            lm,
            prompts,
            intervention,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            scope=args.scope,
            bos=args.bos,
        )
    unchanged = all(one.original_ids == one.modified_ids for one in continuations)
    if unchanged and not any(one.changed_T.any() for one in comparisons):
        raise UserError(
            "Nothing is changed: all tokens of the prompts are special, and dictionaries don't act on those."
        )
    silent = _silent(intervention, comparisons)
    if unchanged and set(silent) == set(args.features):
        which = f"Latent {silent[0]} never fires" if len(silent) == 1 else f"None of latents {silent} ever fires"
        raise UserError(
            f"{which} at the chosen tokens, so '{args.mode}' changes nothing: take prompts in which it fires, or use "
            "--mode set."
        )
    view = steer_views.View(title, intervention, comparisons, continuations, args.at, silent)
    steer_views.print_view(view)
    settings = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "scope": args.scope}
    _write(args, lambda: view.to_dict() | {"generation": settings}, lambda: steer_views.html(view), view)
    return 0


def _load(args: SteerArgs, device: Any) -> Subjects:
    """The one dictionary that the command line names; of a run the best."""
    from dictionary_learning.analysis.subjects import BEST, load_subjects

    folder = Path(args.dictionary).expanduser()
    is_run = (folder / "run.json").is_file() and not (folder / "config.json").is_file()
    subjects = load_subjects(
        args.dictionary,
        chosen=[BEST] if is_run else [],
        model_name=args.model_name,
        hook_point=args.hook_point,
        device=device,
    )
    if len(subjects.dictionaries) > 1:
        names = ", ".join(subject.name for subject in subjects.dictionaries[:4])
        count = len(subjects.dictionaries)
        raise UserError(f"'{args.dictionary}' holds {count} dictionaries ({names}, ...): name one.")
    return subjects


def _check(args: SteerArgs) -> None:
    """What can be refused before anything is loaded."""
    from dictionary_learning.analysis.generation import check_settings

    if args.max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be 0 (no continuations) or a positive number, got {args.max_new_tokens}.")
    check_settings(max(1, args.max_new_tokens), args.temperature, args.top_p, args.seed, args.scope)
    if args.relative and args.mode not in ("set", "add"):
        raise UserError(f"--relative is for --mode set and add, not '{args.mode}'.")
    if args.out is None:
        return
    if args.out.suffix.lower() not in FORMATS:
        near = did_you_mean(args.out.suffix, FORMATS)
        raise UserError(f"--out '{args.out}' should end in one of {', '.join(FORMATS)}.{near}")
    if not args.out.expanduser().parent.is_dir():
        raise UserError(f"There is no folder '{args.out.parent}' to write --out to.")
    if args.out.suffix.lower() in PICTURES:
        from dictionary_learning.analysis.steer_views import require_matplotlib

        require_matplotlib()


def _prompts(args: SteerArgs) -> list[str]:
    prompts = list(args.prompts)
    if args.prompt_file is not None:
        try:
            lines = args.prompt_file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"The prompt file '{args.prompt_file}' can't be read: {reason}.") from None
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise UserError("There is no prompt: give --prompts 'A text' or --prompt_file FILE.")
    return prompts


def _positions(args: SteerArgs) -> Positions:
    """Positions as `Prompts.mask` takes them."""
    if args.matching is not None:
        if args.positions != ("all",):
            raise UserError("Give either --positions or --matching, not both.")
        try:
            return re.compile(args.matching)
        except re.error as error:
            raise UserError(f"--matching {args.matching!r} is no regular expression: {error}.") from None
    if len(args.positions) == 1:
        word = args.positions[0]
        if ends := re.fullmatch(r"(-?\d*):(-?\d*)", word):
            try:
                return slice(*(int(end) if end else None for end in ends.groups()))
            except ValueError:
                raise UserError(f"--positions {word} is no slice: write 2:5, 2: or --positions=-3:.") from None
        if not re.fullmatch(r"-?\d+", word):
            return word
    try:
        return [int(word) for word in args.positions]
    except ValueError:
        raise UserError(
            f"--positions takes 'all', 'last', numbers or one slice, got '{' '.join(args.positions)}'."
        ) from None


def _units(args: SteerArgs, subjects: Subjects, subject: Subject) -> float | list[float]:
    """The activations that value 1 stands for."""
    from dictionary_learning.analysis.effects import check_feature

    if not args.relative:
        return 1.0
    if subjects.run is None:
        raise UserError("--relative needs the analysis of a run, and this dictionary is of none: give --value alone.")
    from dictionary_learning.analysis.folder import AnalysisFolder

    folder = AnalysisFolder.open(subjects.run)
    analysed = {entry["name"]: entry.get("weights") for entry in folder.info["dictionaries"]}
    if analysed.get(subject.name) not in (None, subject.facts["weights"]):
        raise UserError(
            f"{subject.name} was trained on since it was analysed: make the analysis again with "
            f"`sae-factory analyze {subjects.run} --overwrite`, or give --value alone."
        )
    largest_F = folder.table(subject.name)["max"]
    units = [float(largest_F[check_feature(subject.dictionary, feature)]) for feature in args.features]
    for feature, unit in zip(args.features, units, strict=True):
        if not unit > 0:
            raise UserError(f"Latent {feature} never fired in the analysis, so it has no largest activation.")
    return units


def _silent(intervention: Intervention, comparisons: Sequence[Comparison]) -> list[int]:
    """Latents that a mode which scales activations leaves as they are, because they are 0 at all chosen tokens."""
    from dictionary_learning.analysis.interventions import SCALES

    if intervention.mode not in SCALES or intervention.drop_error:
        return []
    return [
        number
        for index, (_, number) in enumerate(comparisons[0].latents)
        if not any(one.before_Tn[one.changed_T, index].any() for one in comparisons)
    ]


def _write(args: SteerArgs, numbers: Callable[[], Any], page: Callable[[], str], view: View | None = None) -> None:
    """Write --out, if there is one, and say so. view: what there are pictures of."""
    from dictionary_learning.analysis import steer_views
    from dictionary_learning.storage import atomic_path, write_json

    if args.out is None:
        return
    path, kind = args.out.expanduser(), args.out.suffix.lower()
    try:
        if kind == ".json":
            write_json(path, numbers())
        else:
            with atomic_path(path) as temporary:
                if kind == ".html":
                    temporary.write_text(page(), encoding="utf-8")
                else:
                    assert view is not None
                    steer_views.draw(view, temporary, kind.removeprefix("."))
    except OSError as error:
        raise UserError(f"'{path}' can't be written: {error.strerror or error}.") from error
    print(f"Written to {args.out}.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, 2 for what the user can mend (one sentence), 130 for Ctrl-C."""
    args = parse(SteerArgs, argv, "sae-factory steer")
    return exit_code(lambda: steer(args))


if __name__ == "__main__":
    sys.exit(main())
