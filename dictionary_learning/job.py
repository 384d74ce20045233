"""The main job beside its computation: the folder that it goes on in, what it says, and how it ends.

In: the run that `demo.py` has made. Out: `run.json` at every turn, the evaluation's files, an exit code. What a resume
goes on from is found before anything is changed; from `begin` on files change.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm

from dictionary_learning import console, evaluation, record, sentence_run, storage
from dictionary_learning.activations.fitting import ran_out
from dictionary_learning.config import RunConfig
from dictionary_learning.distributed import Ranks
from dictionary_learning.distributed import job as ranked
from dictionary_learning.errors import UserError
from dictionary_learning.hub_client import check_push
from dictionary_learning.stopping import EXIT_CODES, sigterm_interrupts
from dictionary_learning.tracking import ProgressSink, Sink, WandbSink

if TYPE_CHECKING:
    from dictionary_learning.activations.sentence_encoder import SentenceActivations
    from dictionary_learning.corpus import Corpus
    from dictionary_learning.dictionary import Dictionary
    from dictionary_learning.evaluation import EvalResult
    from dictionary_learning.planning import Plan
    from dictionary_learning.training import TrainingRun

INCOMPLETE_EXIT = 3  # the stream ended before the run did, or no dictionary could go on
CHECKPOINTS = (0.01, 0.0316, 0.1, 0.316)  # of the run, with --save_checkpoints


def check_options(resume: bool, override: bool, hf_repo_id: str | None, hf_private: bool) -> None:
    """See that options go together, and that the finished run can be pushed. Raises UserError where they don't."""
    if override and not resume:
        raise UserError("--override is about going on with a run: it needs --resume.")
    if hf_private and not hf_repo_id:
        raise UserError("--hf_private is about the Hub repository: it needs --hf_repo_id.")
    if hf_repo_id:
        check_push(hf_repo_id, "--hf_repo_id")


def checkpoint_steps(config: RunConfig, wanted: bool) -> list[int]:
    """The steps behind which a checkpoint of every dictionary is kept, where they are wanted."""
    return sorted({max(1, int(config.steps * part)) for part in CHECKPOINTS}) if wanted else []


def make_sinks(
    config: RunConfig, save_dir: Path, tokens: int, use_wandb: bool, wandb_project: str, wandb_entity: str
) -> list[Sink]:
    """Where the log goes besides metrics.jsonl: the terminal, and W&B where it is wanted."""
    sinks: list[Sink] = [ProgressSink(tokens, console.shown_trainers(config))]
    if use_wandb:
        group = save_dir.resolve().name
        sinks.append(WandbSink(project=wandb_project, entity=wandb_entity, group=group, directory=save_dir))
    return sinks


@contextlib.contextmanager
def memory_faults_said(config: RunConfig) -> Iterator[None]:
    """Turn memory that runs out inside the block, but for the places that say it themselves (a forward, a step, the
    evaluation), into one sentence that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise UserError(
            "The memory of the device does not suffice for this run: set buffer_contexts to "
            f"{max(1, config.buffer_contexts // 2):,} or batch_size to {max(1, config.batch_size // 2):,}, or train "
            "fewer or narrower dictionaries at once (--dry_run prints how much each takes)."
        ) from error


class Job:
    """One main job in its folder. With several ranks each has one, and the first writes and speaks.

    Attributes:
        facts: what run.json says besides the status.
        state: what a resume goes on from, on the first rank; None where the run begins.
    """

    def __init__(self, config: RunConfig, save_dir: Path, ranks: Ranks, lm: Any, corpus: Corpus, plan: Plan) -> None:
        self.config, self.save_dir, self.ranks, self.lm, self.plan = config, save_dir, ranks, lm, plan
        self.facts = record.run_record(config, lm, corpus, ranks.device) | ranked.of_record(ranks)
        if config.sentence is not None:
            self.facts["versions"]["sentence-transformers"] = version("sentence-transformers")
            self.facts["evaluation"] = sentence_run.EVALUATION
        self.state: Any = None
        self._write_json = storage.write_json if ranks.first else ranked.write_nothing
        self._warnings: list[str] = []
        self._goes_on = False

    def note(self, status: str) -> None:
        """Say in run.json how the run stands."""
        self._write_json(self.save_dir / "run.json", self.facts | {"status": status})

    def look_back(self, override: bool) -> None:
        """Find what the run left, on the first rank. Raises UserError where going on would be another run, or not."""
        if self.ranks.first:
            self._warnings = record.check_resumable(self.save_dir, self.config, self.facts, override)
            if storage.saved_states(self.save_dir / "state"):
                with console.warnings_said():
                    self.state = storage.load_newest_state(self.save_dir / "state")[1]

    def settings(self) -> Sequence[Any] | None:
        """The settings that the trainers of a run that goes on began with, on every rank; None where it begins."""
        settings = self.ranks.of_first(None if self.state is None else self.state.get("settings", []))
        self._goes_on = settings is not None
        return settings

    def begin(
        self, run: TrainingRun, wanted: list[list[str]], *, resume: bool, override: bool, overwrite: bool
    ) -> None:
        """Change the folder into that of this run, and take up the state that was found. All that could be refused
        from outside of the folder was refused before."""
        with self.ranks.together():
            if self.ranks.first:
                space = self.plan.disk_bytes
                storage.prepare_run_folder(self.save_dir, resume=resume, overwrite=overwrite, bytes_needed=space)
        ranked.check_same_files(self.ranks, self.save_dir, self.facts)
        if self._goes_on:
            state = ranked.handed_out(self.ranks, run.shares, wanted, self.state)
            with self.ranks.together():
                run.load_state_dict(state, override)
            self.state = None  # as large as the buffer
            print(f"Resuming at step {run.step:,} of {self.config.steps:,}.")
        elif resume:
            print("The run was interrupted before its first saved state: it begins anew.")
        for warning in self._warnings:
            print(f"Warning: {warning}")
        self.note("running")
        console.print_plan(self.config, self.plan)

    def train(self, run: TrainingRun) -> int | None:
        """Run it; an exit code where a signal ended it."""
        began_at = time.monotonic()
        try:
            run.run()
        except KeyboardInterrupt:
            print(f"Left at once, in step {run.step + 1:,}; {record.kept_state(run)}. Go on with:")
            print(f"  {record.resume_command()}")
            raise
        except Exception as error:
            with contextlib.suppress(OSError):
                self.note(f"failed: {error}"[:500])
            raise
        self.facts |= record.outcome(run, time.monotonic() - began_at)
        if self.config.sentence is None:
            console.print_stream_facts(run, run.data)
        else:
            sentence_run.print_stream_facts(run, cast("SentenceActivations", cast("Any", run.data).source))
        if run.stopped not in EXIT_CODES:
            return None
        self.note(f"stopped: {run.stopped}")
        print(f"Stopped by {run.stopped} after step {run.step:,}; {record.kept_state(run)}. Go on with:")
        print(f"  {record.resume_command()}", flush=True)
        run.tracker.close()  # which may wait for a server
        return EXIT_CODES[run.stopped]

    def evaluate(self, run: TrainingRun, heldout: Callable[[], Any]) -> int | None:
        """Measure the trained dictionaries; an exit code where a signal ended it.

        Args:
            heldout: gives the activations, or of a language model the contexts, to evaluate on.
        """
        with sigterm_interrupts() as request:
            try:
                self._evaluate(run, heldout())
            except KeyboardInterrupt:
                why = request.reason or "SIGINT"
                self.note(f"stopped: {why} in the evaluation")
                print("Stopped in the evaluation; the dictionaries are trained and saved. Go on with:")
                print(f"  {record.resume_command()}")
                return EXIT_CODES[why]
        run.tracker.close()
        self.note(f"stopped: {run.stopped}" if run.stopped else "complete")
        return None

    def publish(self, run: TrainingRun, report: bool, hf_repo_id: str | None, hf_private: bool) -> int:
        """What is done with a run that was evaluated: its report, and the push. The exit code of the whole."""
        from dictionary_learning import hub
        from dictionary_learning.report import FILE as REPORT
        from dictionary_learning.run_report import again, report_run

        if report and self.ranks.first:
            if ranked.on_one_machine():
                if stopped := report_run(self.config, self.save_dir, self.lm, str(self.ranks.device)):
                    if hf_repo_id:
                        print(f"It was not pushed:\n  {hub.push_command(self.save_dir, hf_repo_id, hf_private)}")
                    return EXIT_CODES[stopped]
            else:  # the launchers of the other machines would wait for it, and call the run a failed one
                print(f"Analysis and report are made on one machine: {again(self.save_dir)}")
        elif self.ranks.first and (self.save_dir / REPORT).is_file():
            print(f"{self.save_dir / REPORT} was made before this: {again(self.save_dir)}")
        if hf_repo_id and self.ranks.first and not hub.push_finished_run(self.save_dir, hf_repo_id, hf_private):
            return hub.PUSH_FAILED_EXIT
        return INCOMPLETE_EXIT if run.stopped else 0

    # ------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, run: TrainingRun, heldout: Any) -> None:
        """Measure the dictionaries, each on one rank; write and print the results."""
        share, trained = ranked.evaluation_share(run), run.dictionaries()
        specs = [self.config.dictionaries[run.numbers[index]] for index in share]
        results = self._measured(
            heldout, [(spec.hook_point, trained[index]) for spec, index in zip(specs, share, strict=True)]
        )
        own, stopped = {}, run.ranks.merged(run.stopped_dictionaries)
        for index, spec, result in zip(share, specs, results, strict=True):
            name = run.names[index]
            storage.write_json(self.save_dir / name / "eval_results.json", result.to_dict())
            own[name] = {
                "trainer": name,
                "architecture": spec.architecture,
                "hook_point": spec.hook_point,
                "width": spec.width,
                "sparsity": " ".join(f"{key}={value:g}" for key, value in spec.sparsity.items()),
                "lr": run.trainers[index].lr,
                "seed": spec.seed,
                **result.to_dict(),
                **({"stopped": stopped.get(name, "")} if stopped else {}),
            }
        rows = evaluation.sorted_along_front(list(run.ranks.merged(own).values()))
        if run.ranks.first:
            evaluation.write_summary(self.save_dir / "summary.csv", rows)
            console.print_summary(rows, self.save_dir)
        for name, why in stopped.items():
            print(f"Warning: {name} ended early, {why}: what is saved and measured are its weights of the step before.")

    def _measured(self, heldout: Any, dictionaries: Sequence[tuple[str, Dictionary]]) -> list[EvalResult]:
        """The results of dictionaries at their hook points, beside a progress bar."""
        config = self.config
        with tqdm(total=config.eval_tokens, desc="evaluating", unit="tok", unit_scale=True, disable=None) as bar:

            def progress(rows: int) -> None:
                bar.update(rows - bar.n)

            if config.sentence is not None:
                return sentence_run.evaluate_on_source(heldout, dictionaries, config.eval_tokens, progress)
            try:
                return evaluation.evaluate_dictionaries(
                    self.lm,
                    heldout,
                    dictionaries,
                    max_tokens=config.eval_tokens,
                    remove_special=config.remove_bos,
                    max_activation_norm_multiple=config.max_activation_norm_multiple,
                    progress=progress,
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"The memory of {self.lm.device} does not suffice to evaluate on {config.eval_contexts} contexts "
                    f"at once: set eval_contexts to {max(1, config.eval_contexts // 2)} and go on with --resume "
                    "--override; the dictionaries are trained and saved."
                ) from error
