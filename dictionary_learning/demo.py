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
from collections.abc import Sequence  # noqa: E402
from importlib.metadata import version  # noqa: E402
from typing import TYPE_CHECKING, Any, cast  # noqa: E402

import tyro  # noqa: E402

from dictionary_learning import storage  # noqa: E402
from dictionary_learning.config import RunConfig  # noqa: E402
from dictionary_learning.demo_args import DemoArgs, resolve_config  # noqa: E402
from dictionary_learning.errors import UserError, exit_code  # noqa: E402
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
    from dictionary_learning.activations.language_model import TracedLM

    name = str(MODEL_DIR) if config.model_name == "embedded" else config.model_name
    lm = TracedLM.load(name, dtype=config.dtype, device=device)
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


def make_trainers(config: RunConfig, lm: TracedLM | SentenceEncoder, device: Any) -> list[Any]:
    """A trainer for every dictionary of the run."""
    from dictionary_learning.planning import build_trainer

    points = {point.name: point for point in lm.resolve(config.hook_points)}
    return [
        build_trainer(config, spec, points[spec.hook_point].width, points[spec.hook_point].layer, device)
        for spec in config.dictionaries
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


def make_buffer(config: RunConfig, lm: Any, corpus: Corpus, device: Any) -> ActivationBuffer:
    """The buffer that mixes them."""
    from dictionary_learning.buffer import ActivationBuffer

    shared: dict[str, Any] = {
        "n_ctxs": config.buffer_contexts,
        "ctx_len": config.rows_per_context,
        "refresh_batch_size": config.harvest_contexts,
        "out_batch_size": config.batch_size,
        "device": device,
        "seed": config.seed,
    }
    if config.sentence is not None:
        return ActivationBuffer(None, make_source(config, lm, corpus), **shared)
    return ActivationBuffer(
        make_stream(config, corpus, heldout=False),
        lm,
        config.hook_points,
        remove_bos=config.remove_bos,
        max_activation_norm_multiple=config.max_activation_norm_multiple,
        **shared,
    )


def run_training(
    config: RunConfig,
    save_dir: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    save_checkpoints: bool = False,
    profile: bool = False,
    state_every: int | None = None,
    log_steps: int | None = None,
    use_wandb: bool = False,
    wandb_project: str = "sae-factory",
    wandb_entity: str = "",
    hf_repo_id: str | None = None,
    hf_private: bool = False,
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
    from dictionary_learning.devices import resolve_device
    from dictionary_learning.profiling import StepProfile
    from dictionary_learning.tracking import ProgressSink, Sink, WandbSink
    from dictionary_learning.training import TrainingRun

    if hf_private and not hf_repo_id:
        raise UserError("--hf_private is about the Hub repository: it needs --hf_repo_id.")
    if hf_repo_id:
        check_push(hf_repo_id, "--hf_repo_id")
    torch_device = resolve_device(device)
    guards = device_guard(torch_device, max_temperature, resume_temperature)
    if not dry_run:
        storage.check_run_folder(save_dir, resume=resume, overwrite=overwrite)
    corpus = open_corpus(config.corpus)
    load = load_model if config.sentence is None else sentence_run.load_encoder
    lm: Any = load(config, torch_device)
    save_steps = sorted({max(1, int(config.steps * part)) for part in CHECKPOINTS}) if save_checkpoints else []
    plan = planning.plan_run(config, lm, len(save_steps))
    next(make_stream(config, corpus, heldout=True))  # an empty held-out part is found before the training
    if dry_run:
        source = make_source(config, lm, corpus)
        console.print_plan(config, planning.probe(plan, config, source, torch_device, planning.PROBE_SECONDS))
        return 0
    trainers = make_trainers(config, lm, torch_device)
    buffer = make_buffer(config, lm, corpus, torch_device)
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
        log_steps=max(1, config.steps // 50) if log_steps is None else log_steps,
        sinks=sinks,
        normalize_activations=config.normalize_activations,
        callbacks=[*([StepProfile(folder=save_dir / "profile")] if profile else []), *guards],
    )
    # What can be refused was refused: from here on files change.
    storage.prepare_run_folder(save_dir, resume=resume, overwrite=overwrite, bytes_needed=plan.disk_bytes)
    facts = record.run_record(config, lm, corpus)
    if config.sentence is not None:
        facts["versions"]["sentence-transformers"] = version("sentence-transformers")
        facts["evaluation"] = sentence_run.EVALUATION
    if resume:
        record.check_resumable(save_dir, config, facts)
    storage.write_json(save_dir / "run.json", facts)
    if resume and not storage.saved_states(save_dir / "state"):
        print("The run was interrupted before its first saved state: it begins anew.")
    elif resume:
        step, state = storage.load_newest_state(save_dir / "state")
        run.load_state_dict(state)
        print(f"Resuming at step {step:,} of {config.steps:,}.")
    console.print_plan(config, plan)
    began_at = run.step
    run.run()
    if config.sentence is None:
        console.print_stream_facts(run, buffer)
    else:
        sentence_run.print_stream_facts(run, cast("SentenceActivations", buffer.source))
    facts |= {"steps_done": run.step, "tokens_done": run.tokens}
    if run.stopped in ("SIGINT", "SIGTERM"):
        run.tracker.close()
        storage.write_json(save_dir / "run.json", facts | {"status": f"stopped: {run.stopped}"})
        print(f"Stopped by {run.stopped} after step {run.step:,}; its state is saved. Go on with:")
        print(f"  {record.resume_command()}")
        return 130 if run.stopped == "SIGINT" else 143
    if began_at < run.step == run.steps:
        run.save_state()  # so that an evaluation that breaks off can be taken up without training again
    try:
        evaluate_run(config, lm, corpus, run, save_dir)
    except KeyboardInterrupt:
        storage.write_json(save_dir / "run.json", facts | {"status": "stopped: SIGINT in the evaluation"})
        print("Stopped in the evaluation; the dictionaries are trained and saved. Go on with:")
        print(f"  {record.resume_command()}")
        return 130
    run.tracker.close()
    storage.write_json(
        save_dir / "run.json", facts | {"status": f"stopped: {run.stopped}" if run.stopped else "complete"}
    )
    if hf_repo_id and not hub.push_finished_run(save_dir, hf_repo_id, hf_private):
        return hub.PUSH_FAILED_EXIT
    return INCOMPLETE_EXIT if run.stopped else 0


def evaluate_run(config: RunConfig, lm: Any, corpus: Corpus, run: TrainingRun, save_dir: Path) -> None:
    """Evaluate the trained dictionaries on held-out text; write and print the results."""
    from tqdm import tqdm

    from dictionary_learning import console, sentence_run
    from dictionary_learning.evaluation import evaluate_dictionaries, sorted_along_front, write_summary

    dictionaries = list(zip((spec.hook_point for spec in config.dictionaries), run.dictionaries(), strict=True))
    with tqdm(total=config.eval_tokens, desc="evaluating", unit="tok", unit_scale=True, disable=None) as bar:

        def progress(rows: int) -> None:
            bar.update(rows - bar.n)

        if config.sentence is not None:
            texts = make_stream(config, corpus, heldout=True)
            source = sentence_run.make_source(config, lm, texts, heldout=True)
            results = sentence_run.evaluate_on_source(source, dictionaries, config.eval_tokens, progress)
        else:
            results = evaluate_dictionaries(
                lm,
                make_contexts(config, lm, corpus, heldout=True),
                dictionaries,
                max_tokens=config.eval_tokens,
                remove_special=config.remove_bos,
                max_activation_norm_multiple=config.max_activation_norm_multiple,
                progress=progress,
            )
    rows = []
    for name, spec, trainer, result in zip(run.names, config.dictionaries, run.trainers, results, strict=True):
        storage.write_json(save_dir / name / "eval_results.json", result.to_dict())
        sparsity = " ".join(f"{key}={value:g}" for key, value in spec.sparsity.items())
        rows.append(
            {
                "trainer": name,
                "architecture": spec.architecture,
                "hook_point": spec.hook_point,
                "width": spec.width,
                "sparsity": sparsity,
                "lr": trainer.lr,
                "seed": spec.seed,
                **result.to_dict(),
            }
        )
    rows = sorted_along_front(rows)
    write_summary(save_dir / "summary.csv", rows)
    console.print_summary(rows, save_dir)


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
    return exit_code(lambda: run_training(resolve_config(args), args.save_dir, **options))


if __name__ == "__main__":
    sys.exit(main())
