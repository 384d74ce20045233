"""The main job: medical text in, many trained dictionaries out, in one run.

`python dictionary_learning/demo.py --save_dir runs/first` trains every dictionary of `demo_config.py` on one stream,
evaluates them on held-out text, and leaves a folder with all of it. `sae-factory train` is the same command.

As the demo that people know does, it asks CUDA's allocator for expandable segments (less fragmentation beside a large
model) and starts processes by spawning (forking breaks CUDA and tokenizer threads).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: sys.path[0] is this folder, the packages are one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import itertools  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from importlib.metadata import version  # noqa: E402
from typing import TYPE_CHECKING, Any, cast  # noqa: E402

import tyro  # noqa: E402

from dictionary_learning import storage  # noqa: E402
from dictionary_learning.config import RunConfig  # noqa: E402
from dictionary_learning.demo_args import DemoArgs, resolve_config  # noqa: E402
from dictionary_learning.distributed import Ranks, rank_exit_code  # noqa: E402
from dictionary_learning.errors import UserError  # noqa: E402
from dictionary_learning.hub_client import check_push  # noqa: E402

if TYPE_CHECKING:
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.activations.sentence_encoder import SentenceActivations, SentenceEncoder
    from dictionary_learning.activations.types import ActivationSource
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.corpus import Corpus, TextStream
    from dictionary_learning.packing import ContextPacker
    from dictionary_learning.training import TrainingRun

INCOMPLETE_EXIT = 3  # the stream ended before the run did
CHECKPOINTS = (0.01, 0.0316, 0.1, 0.316)  # of the run, with --save_checkpoints


def load_model(config: RunConfig, device: Any) -> TracedLM:
    """The run's language model."""
    from data_prep.embedded import MODEL_DIR
    from dictionary_learning.activations.fitting import FittingLM

    name = str(MODEL_DIR) if config.model_name == "embedded" else config.model_name
    lm = FittingLM.load(name, dtype=config.dtype, device=device)
    if lm.max_positions is not None and config.ctx_len > lm.max_positions:
        raise UserError(
            f"ctx_len {config.ctx_len} is longer than the {lm.max_positions} positions of {config.model_name}."
        )
    return lm


def make_stream(config: RunConfig, corpus: Corpus, *, heldout: bool) -> TextStream:
    """The held-out texts (once), or the training texts (shuffled, repeated as often as needed)."""
    from dictionary_learning.corpus import TextStream

    return TextStream(
        corpus,
        epochs=1 if heldout else None,
        split="heldout" if heldout else "train",
        heldout_fraction=config.heldout_fraction,
        seed=config.seed,
    )


def make_contexts(config: RunConfig, lm: TracedLM, corpus: Corpus, *, heldout: bool) -> ContextPacker:
    """Token contexts of those texts, in batches that fit one forward of the evaluation or of the harvest."""
    from dictionary_learning.packing import ContextPacker

    contexts = config.eval_contexts if heldout else config.harvest_contexts
    stream = make_stream(config, corpus, heldout=heldout)
    return ContextPacker(stream, lm.tokenizer, ctx_len=config.ctx_len, batch_contexts=contexts)


def make_trainers(
    config: RunConfig,
    lm: TracedLM | SentenceEncoder,
    device: Any,
    began: Sequence[Any] = (),
    numbers: Sequence[int] | None = None,
    shards: Ranks | None = None,
) -> list[Any]:
    """A trainer for every dictionary of the run, or for those of some `numbers`, split over the ranks of `shards`;
    `began` are the settings that those of a resumed run began with."""
    from dictionary_learning.planning import build_trainer

    points = {point.name: point for point in lm.resolve(config.hook_points)}
    specs = list(itertools.zip_longest(config.dictionaries, began[: len(config.dictionaries)]))
    return [
        build_trainer(config, s, points[s.hook_point].width, points[s.hook_point].layer, device, settings, shards)
        for s, settings in (specs if numbers is None else (specs[number] for number in numbers))
    ]


def make_source(config: RunConfig, lm: Any, corpus: Corpus) -> ActivationSource:
    """The activations to train on, unmixed."""
    from dictionary_learning import sentence_run
    from dictionary_learning.activations.language_model import LanguageModelActivations

    if config.sentence is not None:
        return sentence_run.make_source(config, lm, make_stream(config, corpus, heldout=False), heldout=False)
    return LanguageModelActivations(
        lm,
        make_contexts(config, lm, corpus, heldout=False),
        config.hook_points,
        remove_special=config.remove_bos,
        max_activation_norm_multiple=config.max_activation_norm_multiple,
    )


def make_buffer(
    config: RunConfig, lm: Any, corpus: Corpus, ranks: Ranks, wanted: Sequence[Any], read_ahead: int | None = None
) -> ActivationBuffer:
    """The buffer that mixes them, of the hook points that each rank wants."""
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.distributed.harvest import RankedBuffer

    shared: dict[str, Any] = {
        "n_ctxs": config.buffer_contexts,
        "ctx_len": config.rows_per_context,
        "refresh_batch_size": config.harvest_contexts,
        "out_batch_size": config.batch_size,
        "device": ranks.device,
        "seed": config.seed,
    }
    if config.sentence is not None:
        return ActivationBuffer(None, make_source(config, lm, corpus), **shared, read_ahead=read_ahead)
    return RankedBuffer(
        make_stream(config, corpus, heldout=False),
        lm,
        config.hook_points,
        remove_bos=config.remove_bos,
        max_activation_norm_multiple=config.max_activation_norm_multiple,
        read_ahead=read_ahead,
        ranks=ranks,
        wanted=wanted,
        **shared,
    )


def run_training(
    config: RunConfig,
    save_dir: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    override: bool = False,
    overwrite: bool = False,
    read_ahead: int | None = None,
    dry_run: bool = False,
    save_checkpoints: bool = False,
    profile: bool = False,
    report: bool = True,
    state_every: int | None = None,
    log_steps: int | None = None,
    use_wandb: bool = False,
    wandb_project: str = "sae-factory",
    wandb_entity: str = "",
    hf_repo_id: str | None = None,
    hf_private: bool = False,
    shard_latents: bool = False,
    max_temperature: float | None = None,
    resume_temperature: float | None = None,
) -> int:
    """Run a whole job: stream, train, evaluate, write, push. The exit code: 0, 3 where the stream ended early, 4 where
    all is on the disk but the push failed, 128 + signal.

    Raises:
        UserError: anything about the configuration, the model, the corpus or the folder that can't be.
    """
    from dictionary_learning import console, hub, planning, record, sentence_run
    from dictionary_learning.corpus import open_corpus
    from dictionary_learning.device_guard import device_guard
    from dictionary_learning.distributed import job, join
    from dictionary_learning.profiling import StepProfile
    from dictionary_learning.run_report import report_run
    from dictionary_learning.stopping import EXIT_CODES, sigterm_interrupts
    from dictionary_learning.tracking import ProgressSink, Sink, WandbSink
    from dictionary_learning.training import TrainingRun

    if override and not resume:
        raise UserError("--override is about going on with a run: it needs --resume.")
    if hf_private and not hf_repo_id:
        raise UserError("--hf_private is about the Hub repository: it needs --hf_repo_id.")
    if hf_repo_id:
        check_push(hf_repo_id, "--hf_repo_id")
    ranks, resume = join(device), resume or job.restarted(save_dir)
    options = {"resume": resume, "state_every": state_every, "log_steps": log_steps, "shard_latents": shard_latents}
    job.check_same_run(ranks, config, save_dir, options)
    with ranks.together():
        guards = device_guard(ranks.device, max_temperature, resume_temperature)
        if ranks.first and not dry_run:
            storage.check_run_folder(save_dir, resume=resume, overwrite=overwrite)
        corpus = open_corpus(config.corpus)
        load = load_model if config.sentence is None else sentence_run.load_encoder
        lm: Any = load(config, ranks.device)
        save_steps = sorted({max(1, int(config.steps * part)) for part in CHECKPOINTS}) if save_checkpoints else []
        plan = planning.plan_run(config, lm, len(save_steps))
        next(make_stream(config, corpus, heldout=True))  # an empty held-out part is found before the training
        if dry_run and ranks.first:
            source = make_source(config, lm, corpus)
            console.print_plan(config, planning.probe(plan, config, source, ranks.device, planning.PROBE_SECONDS))
        if dry_run:
            return 0
        facts = record.run_record(config, lm, corpus, ranks.device) | job.of_record(ranks)
        if config.sentence is not None:
            facts["versions"]["sentence-transformers"] = version("sentence-transformers")
            facts["evaluation"] = sentence_run.EVALUATION
        warnings = record.check_resumable(save_dir, config, facts, override) if resume and ranks.first else []
        there = resume and ranks.first and storage.saved_states(save_dir / "state")
        state = storage.load_newest_state(save_dir / "state")[1] if there else None
    began = ranks.of_first(None if state is None else state["settings"])
    with ranks.together():
        shares = job.assignment(config, lm, ranks, shard_latents)
        wanted, own, shards = job.wanted(config, shares), shares[ranks.rank], ranks if shard_latents else None
        trainers = make_trainers(config, lm, ranks.device, began or [], own, shards)
        buffer = make_buffer(config, lm, corpus, ranks, wanted, read_ahead)
    sinks: list[Sink] = [ProgressSink(plan.tokens, console.shown_trainers(config))]
    if use_wandb:
        sinks.append(
            WandbSink(project=wandb_project, entity=wandb_entity, group=save_dir.resolve().name, directory=save_dir)
        )
    run = TrainingRun(
        buffer,
        trainers,
        config.steps,
        save_dir=save_dir,
        save_steps=save_steps,
        state_every=max(1, config.steps // 5) if state_every is None else state_every or None,
        final_state=True,  # from which a broken evaluation is taken up, and a run made longer
        log_steps=max(1, config.steps // 50) if log_steps is None else log_steps,
        sinks=sinks,
        normalize_activations=config.normalize_activations,
        callbacks=[*([StepProfile(folder=save_dir / "profile")] if profile and ranks.first else []), *guards],
        ranks=ranks,
        shares=shares,
    )
    # What can be refused was refused: from here on files change.
    with ranks.together():
        if ranks.first:
            storage.prepare_run_folder(save_dir, resume=resume, overwrite=overwrite, bytes_needed=plan.disk_bytes)
    job.check_same_files(ranks, save_dir, facts)
    if began is not None:
        state = job.handed_out(ranks, shares, wanted, state)
        with ranks.together():
            run.load_state_dict(state, override)
        print(f"Resuming at step {run.step:,} of {config.steps:,}.")
        state = None  # as large as the buffer
    elif resume:
        print("The run was interrupted before its first saved state: it begins anew.")
    for warning in warnings:
        print(f"Warning: {warning}")
    write_json = storage.write_json if ranks.first else job.write_nothing
    write_json(save_dir / "run.json", facts)
    console.print_plan(config, plan)
    began_at = time.monotonic()
    try:
        run.run()
    except Exception as error:
        with contextlib.suppress(OSError):
            write_json(save_dir / "run.json", facts | {"status": f"failed: {error}"[:500]})
        raise
    facts |= record.outcome(run, time.monotonic() - began_at)
    if config.sentence is None:
        console.print_stream_facts(run, buffer)
    else:
        sentence_run.print_stream_facts(run, cast("SentenceActivations", buffer.source))
    if run.stopped in EXIT_CODES:
        run.tracker.close()
        write_json(save_dir / "run.json", facts | {"status": f"stopped: {run.stopped}"})
        print(f"Stopped by {run.stopped} after step {run.step:,}; {record.kept_state(run)}. Go on with:")
        print(f"  {record.resume_command()}")
        return EXIT_CODES[run.stopped]
    with sigterm_interrupts() as request:
        try:
            evaluate_run(config, lm, corpus, run, save_dir)
        except KeyboardInterrupt:
            why = request.reason or "SIGINT"
            write_json(save_dir / "run.json", facts | {"status": f"stopped: {why} in the evaluation"})
            print("Stopped in the evaluation; the dictionaries are trained and saved. Go on with:")
            print(f"  {record.resume_command()}")
            return EXIT_CODES[why]
    run.tracker.close()
    write_json(save_dir / "run.json", facts | {"status": f"stopped: {run.stopped}" if run.stopped else "complete"})
    if report and ranks.first:
        report_run(config, save_dir, lm, str(ranks.device))
    if hf_repo_id and ranks.first and not hub.push_finished_run(save_dir, hf_repo_id, hf_private):
        return hub.PUSH_FAILED_EXIT
    return INCOMPLETE_EXIT if run.stopped else 0


def evaluate_run(config: RunConfig, lm: Any, corpus: Corpus, run: TrainingRun, save_dir: Path) -> None:
    """Evaluate the trained dictionaries on held-out text; write and print the results."""
    import torch
    from tqdm import tqdm

    from dictionary_learning import console, sentence_run
    from dictionary_learning.distributed import job
    from dictionary_learning.evaluation import evaluate_dictionaries, sorted_along_front, write_summary

    share, trained = job.evaluation_share(run), run.dictionaries()
    specs = [config.dictionaries[run.numbers[index]] for index in share]
    dictionaries = [(spec.hook_point, trained[index]) for spec, index in zip(specs, share, strict=True)]
    with tqdm(total=config.eval_tokens, desc="evaluating", unit="tok", unit_scale=True, disable=None) as bar:

        def progress(rows: int) -> None:
            bar.update(rows - bar.n)

        if config.sentence is not None:
            texts = make_stream(config, corpus, heldout=True)
            source = sentence_run.make_source(config, lm, texts, heldout=True)
            results = sentence_run.evaluate_on_source(source, dictionaries, config.eval_tokens, progress)
        else:
            try:
                results = evaluate_dictionaries(
                    lm,
                    make_contexts(config, lm, corpus, heldout=True),
                    dictionaries,
                    max_tokens=config.eval_tokens,
                    remove_special=config.remove_bos,
                    max_activation_norm_multiple=config.max_activation_norm_multiple,
                    progress=progress,
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"The memory of {lm.device} does not suffice to evaluate on {config.eval_contexts} contexts at "
                    f"once: set eval_contexts to {max(1, config.eval_contexts // 2)} and go on with --resume "
                    "--override; the dictionaries are trained and saved."
                ) from error
    own, stopped = {}, run.ranks.merged(run.stopped_dictionaries)
    for index, spec, result in zip(share, specs, results, strict=True):
        name, trainer = run.names[index], run.trainers[index]
        storage.write_json(save_dir / name / "eval_results.json", result.to_dict())
        sparsity = " ".join(f"{key}={value:g}" for key, value in spec.sparsity.items())
        own[name] = {
            "trainer": name,
            "architecture": spec.architecture,
            "hook_point": spec.hook_point,
            "width": spec.width,
            "sparsity": sparsity,
            "lr": trainer.lr,
            "seed": spec.seed,
            **result.to_dict(),
            **({"stopped": stopped.get(name, "")} if stopped else {}),
        }
    rows = sorted_along_front(list(run.ranks.merged(own).values()))
    if run.ranks.first:
        write_summary(save_dir / "summary.csv", rows)
        console.print_summary(rows, save_dir)
    for name, why in stopped.items():
        print(f"Warning: {name} ended early, {why}: what is saved and measured are its weights of the step before.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, 2 for what the user can mend (one sentence), 3 for an incomplete run, 4 for a failed push,
    130 or 143 when stopped."""
    prog = None if argv is None else "sae-factory train"  # which hands its arguments on
    args = tyro.cli(DemoArgs, args=argv, prog=prog, use_underscores=True)
    return run_command(args)


def run_command(args: DemoArgs) -> int:
    """Run parsed arguments; errors that the user can mend become one sentence."""
    import torch.multiprocessing as multiprocessing

    multiprocessing.set_start_method("spawn", force=True)
    passed_on = {f.name for f in dataclasses.fields(DemoArgs)} & set(run_training.__kwdefaults__ or ())
    options = {name: getattr(args, name) for name in passed_on}

    def job() -> int:
        with storage.disk_faults_said(args.save_dir):
            return run_training(resolve_config(args), args.save_dir, **options)

    return rank_exit_code(job)


if __name__ == "__main__":
    sys.exit(main())
