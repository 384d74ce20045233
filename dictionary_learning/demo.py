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

import dataclasses  # noqa: E402
import itertools  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from dictionary_learning import storage  # noqa: E402
from dictionary_learning.command_line import parse  # noqa: E402
from dictionary_learning.config import RunConfig  # noqa: E402
from dictionary_learning.demo_args import DemoArgs, resolve_config  # noqa: E402
from dictionary_learning.distributed import Ranks, join, rank_exit_code  # noqa: E402
from dictionary_learning.errors import UserError  # noqa: E402
from dictionary_learning.stopping import end_process  # noqa: E402

if TYPE_CHECKING:
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.activations.sentence_encoder import SentenceEncoder
    from dictionary_learning.activations.types import ActivationSource
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.corpus import Corpus, TextStream
    from dictionary_learning.packing import ContextPacker
    from dictionary_learning.record import Commits


def load_model(config: RunConfig, device: Any, revision: str | None = None) -> TracedLM:
    """The run's language model, from the Hub at a revision."""
    from dictionary_learning.activations.fitting import FittingLM

    lm = FittingLM.load(config.model_name, dtype=config.dtype, device=device, revision=revision)
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
    from dictionary_learning.distributed.harvest import RankedBuffer

    shared: dict[str, Any] = {
        "n_ctxs": config.buffer_contexts,
        "ctx_len": config.rows_per_context,
        "refresh_batch_size": config.harvest_contexts,
        "out_batch_size": config.batch_size,
        "device": ranks.device,
        "seed": config.seed,
        "read_ahead": read_ahead,
        "ranks": ranks,
        "wanted": wanted,
    }
    if config.sentence is not None:
        return RankedBuffer(None, make_source(config, lm, corpus), None, **shared)
    return RankedBuffer(
        make_stream(config, corpus, heldout=False),
        lm,
        config.hook_points,
        remove_bos=config.remove_bos,
        max_activation_norm_multiple=config.max_activation_norm_multiple,
        **shared,
    )


def open_inputs(config: RunConfig, device: Any, commits: Commits) -> tuple[Any, Corpus]:
    """The model and the corpus, whose held-out part is looked at now and not behind days of training."""
    from dictionary_learning import sentence_run
    from dictionary_learning.corpus import open_corpus

    corpus = open_corpus(config.corpus, commits=commits.corpus)
    lm = (load_model if config.sentence is None else sentence_run.load_encoder)(config, device, commits.model)
    next(make_stream(config, corpus, heldout=True))
    return lm, corpus


def make_heldout(config: RunConfig, lm: Any, corpus: Corpus) -> Any:
    """What the dictionaries are evaluated on: contexts, or of a sentence encoder the activations themselves."""
    from dictionary_learning import sentence_run

    if config.sentence is None:
        return make_contexts(config, lm, corpus, heldout=True)
    return sentence_run.make_source(config, lm, make_stream(config, corpus, heldout=True), heldout=True)


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
    from dictionary_learning import console, planning, record
    from dictionary_learning import job as main_job
    from dictionary_learning.device_guard import device_guard
    from dictionary_learning.distributed import job as ranked
    from dictionary_learning.profiling import StepProfile
    from dictionary_learning.training import TrainingRun

    main_job.check_options(resume, override, hf_repo_id, hf_private)
    ranks, resume = join(device), resume or ranked.restarted(save_dir)
    options = {"resume": resume, "state_every": state_every, "log_steps": log_steps, "shard_latents": shard_latents}
    ranked.check_same_run(ranks, config, save_dir, options)
    with ranks.together():
        guards = device_guard(ranks.device, max_temperature, resume_temperature)
        if ranks.first and not dry_run:
            storage.check_run_folder(save_dir, resume=resume, overwrite=overwrite)
        commits = record.commits_of(save_dir, config) if resume and not override else record.Commits()
        lm, corpus = open_inputs(config, ranks.device, commits)
        save_steps = main_job.checkpoint_steps(config, save_checkpoints)
        plan = planning.plan_run(config, lm, len(save_steps))
        if dry_run and ranks.first:
            source = make_source(config, lm, corpus)
            console.print_plan(config, planning.probe(plan, config, source, ranks.device, planning.PROBE_SECONDS))
        if dry_run:
            return 0
        job = main_job.Job(config, save_dir, ranks, lm, corpus, plan)
        if resume:
            job.look_back(override)
    began = job.settings()
    with ranks.together():
        shares = ranked.assignment(config, lm, ranks, shard_latents)
        wanted, own, shards = ranked.wanted(config, shares), shares[ranks.rank], ranks if shard_latents else None
        trainers = make_trainers(config, lm, ranks.device, began or [], own, shards)
        run = TrainingRun(
            make_buffer(config, lm, corpus, ranks, wanted, read_ahead),
            trainers,
            config.steps,
            save_dir=save_dir,
            save_steps=save_steps,
            state_every=max(1, config.steps // 5) if state_every is None else state_every or None,
            final_state=True,  # from which a broken evaluation is taken up, and a run made longer
            log_steps=max(1, config.steps // 50) if log_steps is None else log_steps,
            sinks=main_job.make_sinks(config, save_dir, plan.tokens, use_wandb, wandb_project, wandb_entity),
            normalize_activations=config.normalize_activations,
            callbacks=[*([StepProfile(folder=save_dir / "profile")] if profile and ranks.first else []), *guards],
            ranks=ranks,
            shares=shares,
        )
    job.begin(run, wanted, resume=resume, override=override, overwrite=overwrite)  # from here on files change
    code = job.train(run)
    if code is None:
        code = job.evaluate(run, lambda: make_heldout(config, lm, corpus))
    ranks.part()
    return job.publish(run, report, hf_repo_id, hf_private) if code is None else code


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, 2 for what the user can mend (one sentence), 3 for an incomplete run, 4 for a failed push,
    130 or 143 when stopped."""
    prog = None if argv is None else "sae-factory train"  # which hands its arguments on
    args = parse(DemoArgs, argv, prog)
    return run_command(args)


def run_command(args: DemoArgs) -> int:
    """Run parsed arguments; errors that the user can mend become one sentence."""
    import torch.multiprocessing as multiprocessing

    from dictionary_learning.job import memory_faults_said

    multiprocessing.set_start_method("spawn", force=True)
    passed_on = {f.name for f in dataclasses.fields(DemoArgs)} & set(run_training.__kwdefaults__ or ())
    options = {name: getattr(args, name) for name in passed_on}

    def job() -> int:
        config = resolve_config(args)
        with storage.disk_faults_said(args.save_dir), memory_faults_said(config):
            return run_training(config, args.save_dir, **options)

    return rank_exit_code(job)


if __name__ == "__main__":
    end_process(main)
