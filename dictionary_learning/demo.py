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
import datetime  # noqa: E402
import importlib.util  # noqa: E402
import subprocess  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import tyro  # noqa: E402

from dictionary_learning import __version__, storage  # noqa: E402
from dictionary_learning.config import (  # noqa: E402
    Preset,
    RunConfig,
    Sweep,
    changed_fields,
    config_from_dict,
    load_config,
    resolve,
)
from dictionary_learning.errors import USER_ERROR_EXIT, UserError, did_you_mean  # noqa: E402

if TYPE_CHECKING:
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.corpus import Corpus
    from dictionary_learning.training import TrainingRun

INCOMPLETE_EXIT = 3  # the stream ended before the run did
SHOWN_DICTIONARIES = 3  # in the progress bar and the log lines


@dataclass
class DemoArgs:
    """Train a sweep of dictionaries on one stream of a language model's activations."""

    save_dir: Path
    """Folder of the run: new, empty, or with --resume that of an interrupted run."""
    preset: str = "embedded"
    """Model, corpus and sizes that fit together, from demo_config.py: embedded, gpt2, gemma-2-2b."""
    config: Path | None = None
    """A .yaml, .json or run.json with a whole run configuration, in place of preset and sweep."""
    model_name: str | None = None
    """A model on the Hub or a local folder, in place of the preset's."""
    corpus: str | None = None
    """Text to train on: a file, a folder (.jsonl, .parquet, .txt, or raw medical QA records), hf://user/name,
    'medical_qa' (the six corpora on the Hub) or 'embedded'."""
    layers: tuple[int, ...] | None = None
    """Layers to train on."""
    site: str = "resid_post"
    """Where in a layer: resid_post, resid_pre, mlp_out, mlp_in, attn_out, attn_in."""
    hook_points: tuple[str, ...] | None = None
    """Hook points by name (mlp_out_layer_3) or module path (model.layers.3.mlp:out), in place of layers and site."""
    architectures: tuple[str, ...] | None = None
    """Architectures of the sweep to train."""
    widths: tuple[int, ...] | None = None
    """Latents of a dictionary."""
    seeds: tuple[int, ...] | None = None
    learning_rates: tuple[float, ...] | None = None
    """Peak learning rates; left out, a rule fits it to width and length."""
    num_tokens: int | None = None
    """Activations to train on."""
    batch_size: int | None = None
    """Activations in a training step."""
    ctx_len: int | None = None
    """Tokens in a context."""
    buffer_contexts: int | None = None
    """Contexts' worth of activations that the buffer mixes."""
    eval_tokens: int | None = None
    """Held-out activations to evaluate on."""
    dtype: str | None = None
    """Of the model: float32 or bfloat16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    seed: int | None = None
    """Of the order of the documents and the mixing of the buffer."""
    log_steps: int | None = None
    """Steps between log entries (default: 50 entries a run)."""
    save_checkpoints: bool = False
    """Keep checkpoints of every dictionary at four points, spaced as powers of ten."""
    state_every: int | None = None
    """Steps between saved states (default: a fifth of the run; 0: only when the run is stopped)."""
    use_wandb: bool = False
    """Log each dictionary as a run of Weights & Biases (WANDB_MODE=offline works without a network)."""
    wandb_project: str = "sae-factory"
    wandb_entity: str = ""
    dry_run: bool = False
    """Print the plan (sizes, and the time by a ten-second probe) and stop."""
    resume: bool = False
    """Go on with the interrupted run in save_dir."""
    overwrite: bool = False
    """Replace a run that save_dir holds."""


def resolve_config(args: DemoArgs) -> RunConfig:
    """The run's configuration from the command line, demo_config.py and --config.

    Raises:
        UserError: see `config.resolve`.
    """
    given = {
        name: getattr(args, name)
        for name in ("model_name", "corpus", "num_tokens", "batch_size", "ctx_len", "buffer_contexts", "eval_tokens", "dtype", "seed")
        if getattr(args, name) is not None
    }
    if args.config is not None:
        swept = [n for n in ("layers", "hook_points", "architectures", "widths", "seeds", "learning_rates") if getattr(args, n)]
        if swept:
            raise UserError(f"--config already says which dictionaries to train: leave out --{swept[0]} or --config.")
        return config_from_dict({**load_config(args.config).to_dict(), **given}, str(args.config))
    presets, sweep = load_demo_config()
    if args.preset not in presets:
        raise UserError(f"Unknown preset '{args.preset}': use one of {', '.join(presets)}.{did_you_mean(args.preset, presets)}")
    preset = presets[args.preset]
    if args.hook_points and args.layers:
        raise UserError("Give either --hook_points or --layers, not both.")
    points = args.hook_points or [f"{args.site}_layer_{layer}" for layer in args.layers or preset.layers]
    return resolve(
        preset, sweep, hook_points=points, architectures=args.architectures, widths=args.widths, seeds=args.seeds,
        learning_rates=args.learning_rates, **given,
    )


def load_demo_config() -> tuple[dict[str, Preset], Sweep]:
    """PRESETS and SWEEP of the demo_config.py in the working folder, or of the one that came with the project."""
    local = Path("demo_config.py")
    if local.is_file():
        spec = importlib.util.spec_from_file_location("demo_config", local)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(local.parent.resolve()))  # it may import what lies beside it
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"demo_config.py can't be read: {type(error).__name__}: {error}.") from error
        finally:
            sys.path.pop(0)
    else:
        import demo_config as module  # type: ignore[no-redef]
    try:
        return module.PRESETS, module.SWEEP
    except AttributeError as error:
        raise UserError(f"demo_config.py must define PRESETS and SWEEP: {error}.") from None


def resolve_device(name: str) -> Any:
    """The torch device of a name; "auto" takes the best one present.

    Raises:
        UserError: the device is absent.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device '{name}' is not available here ({str(error).splitlines()[0]}): use cpu or auto.") from error
    return device


def load_model(config: RunConfig, device: Any) -> TracedLM:
    """The run's language model."""
    from data_prep.embedded import MODEL_DIR
    from dictionary_learning.activations.language_model import TracedLM

    name = str(MODEL_DIR) if config.model_name == "embedded" else config.model_name
    lm = TracedLM.load(name, dtype=config.dtype, device=device)
    if lm.max_positions is not None and config.ctx_len > lm.max_positions:
        raise UserError(f"ctx_len {config.ctx_len} is longer than the {lm.max_positions} positions of {config.model_name}.")
    return lm


def make_packer(config: RunConfig, lm: TracedLM, corpus: Corpus, *, heldout: bool) -> Any:
    """Contexts of the held-out part (once), or of the training part (shuffled, repeated as often as needed)."""
    from dictionary_learning.corpus import TextStream
    from dictionary_learning.packing import ContextPacker

    stream = TextStream(
        corpus,
        epochs=1 if heldout else None,
        split="heldout" if heldout else "train",
        heldout_fraction=config.heldout_fraction,
        seed=config.seed,
    )
    contexts = config.eval_contexts if heldout else config.harvest_contexts
    return ContextPacker(stream, lm.tokenizer, ctx_len=config.ctx_len, batch_contexts=contexts)


def make_trainers(config: RunConfig, lm: TracedLM, device: Any) -> list[Any]:
    """A trainer for every dictionary of the run."""
    from dictionary_learning.trainers import trainer_class

    points = {point.name: point for point in lm.resolve(config.hook_points)}
    return [
        trainer_class(spec.architecture)(
            steps=config.steps,
            activation_dim=points[spec.hook_point].width,
            layer=points[spec.hook_point].layer,
            lm_name=config.model_name,
            device=device,
            **spec.trainer_arguments(),
        )
        for spec in config.dictionaries
    ]


def run_training(
    config: RunConfig,
    save_dir: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    save_checkpoints: bool = False,
    state_every: int | None = None,
    log_steps: int | None = None,
    use_wandb: bool = False,
    wandb_project: str = "sae-factory",
    wandb_entity: str = "",
) -> int:
    """Run a whole job: stream, train, evaluate, write. The exit code: 0, 3 where the stream ended early, 128 + signal.

    Raises:
        UserError: anything about the configuration, the model, the corpus or the folder that can't be.
    """
    from dictionary_learning.activations.language_model import LanguageModelActivations
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.corpus import open_corpus
    from dictionary_learning import planning
    from dictionary_learning.planning import plan_run, probe
    from dictionary_learning.tracking import ProgressSink, Sink, WandbSink
    from dictionary_learning.training import TrainingRun

    torch_device = resolve_device(device)
    if not dry_run:
        storage.check_run_folder(save_dir, resume=resume, overwrite=overwrite)
    corpus = open_corpus(config.corpus)
    lm = load_model(config, torch_device)
    save_steps = [max(1, int(config.steps * part)) for part in (0.01, 0.0316, 0.1, 0.316)] if save_checkpoints else []
    plan = plan_run(config, lm, len(save_steps))
    packer = make_packer(config, lm, corpus, heldout=False)
    if dry_run:
        source = LanguageModelActivations(lm, packer, config.hook_points, remove_special=config.remove_bos)
        print_plan(config, probe(plan, config, source, torch_device, planning.PROBE_SECONDS))
        return 0
    trainers = make_trainers(config, lm, torch_device)
    buffer = ActivationBuffer(
        packer.texts, lm, config.hook_points, n_ctxs=config.buffer_contexts, ctx_len=config.ctx_len,
        refresh_batch_size=config.harvest_contexts, out_batch_size=config.batch_size, device=torch_device,
        remove_bos=config.remove_bos, max_activation_norm_multiple=config.max_activation_norm_multiple, seed=config.seed,
    )
    next(iter(make_packer(config, lm, corpus, heldout=True)))  # an empty held-out part is found before the training

    storage.prepare_run_folder(save_dir, resume=resume, overwrite=overwrite, bytes_needed=plan.disk_bytes)
    record = run_record(config, lm, corpus)
    if resume:
        check_resumable(save_dir, config, record)
    else:
        storage.write_json(save_dir / "run.json", record)
    sinks: list[Sink] = [ProgressSink(plan.tokens, shown_trainers(config))]
    if use_wandb:
        sinks.append(WandbSink(project=wandb_project, entity=wandb_entity, group=save_dir.name, directory=save_dir))
    run = TrainingRun(
        buffer, trainers, config.steps, save_dir=save_dir, save_steps=save_steps,
        state_every=max(1, config.steps // 5) if state_every is None else state_every or None,
        log_steps=log_steps or max(1, config.steps // 50), sinks=sinks,
        normalize_activations=config.normalize_activations,
    )
    if resume:
        step, state = storage.load_newest_state(save_dir / "state")
        run.load_state_dict(state)
        print(f"Resuming at step {step:,} of {config.steps:,}.")
    print_plan(config, plan)
    run.run()
    print_stream_facts(run, buffer)
    status = "complete" if not run.stopped else f"stopped: {run.stopped}"
    storage.write_json(save_dir / "run.json", record | {"status": status, "steps_done": run.step, "tokens_done": run.tokens})
    if run.stopped in ("SIGINT", "SIGTERM"):
        print(f"Stopped by {run.stopped} after step {run.step:,}; its state is saved. Go on with:\n  {resume_command()}")
        return 130 if run.stopped == "SIGINT" else 143
    evaluate_run(config, lm, corpus, run, save_dir)
    return INCOMPLETE_EXIT if run.stopped else 0


def evaluate_run(config: RunConfig, lm: TracedLM, corpus: Corpus, run: TrainingRun, save_dir: Path) -> None:
    """Evaluate the trained dictionaries on held-out text; write and print the results."""
    from tqdm import tqdm

    from dictionary_learning.evaluation import evaluate_dictionaries, sorted_along_front, write_summary

    dictionaries = list(zip((spec.hook_point for spec in config.dictionaries), run.dictionaries(), strict=True))
    with tqdm(total=config.eval_tokens, desc="evaluating", unit="tok", unit_scale=True, disable=None) as bar:
        results = evaluate_dictionaries(
            lm,
            make_packer(config, lm, corpus, heldout=True),
            dictionaries,
            max_tokens=config.eval_tokens,
            remove_special=config.remove_bos,
            max_activation_norm_multiple=config.max_activation_norm_multiple,
            progress=lambda tokens: bar.update(tokens - bar.n) and None,
        )
    rows = []
    for name, spec, trainer, result in zip(run.names, config.dictionaries, run.trainers, results, strict=True):
        storage.write_json(save_dir / name / "eval_results.json", result.to_dict())
        sparsity = " ".join(f"{key}={value:g}" for key, value in spec.sparsity.items())
        rows.append({
            "trainer": name, "architecture": spec.architecture, "hook_point": spec.hook_point, "width": spec.width,
            "sparsity": sparsity, "lr": trainer.lr, "seed": spec.seed, **result.to_dict(),
        })
    rows = sorted_along_front(rows)
    write_summary(save_dir / "summary.csv", rows)
    print_summary(rows, save_dir)


# ----------------------------------------------------------------------------------------------- the record of a run


def run_record(config: RunConfig, lm: TracedLM, corpus: Corpus) -> dict[str, Any]:
    """What run.json says: the configuration, and what it ran on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"sae-factory": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "nnsight", "transformers", "datasets", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "status": "running",
        "config": config.to_dict(),
        "corpus_fingerprint": corpus.fingerprint,
        "model": storage.finite(lm.config),
        "versions": versions,
        "git_revision": git_revision(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def git_revision() -> str | None:
    """The commit of the checkout that this file lies in, or None."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def check_resumable(save_dir: Path, config: RunConfig, record: dict[str, Any]) -> None:
    """Refuse to go on with another configuration, corpus or model than the run began with.

    Raises:
        UserError: names what differs.
    """
    old = storage.read_json(save_dir / "run.json")
    differing = changed_fields(config_from_dict(old["config"], str(save_dir / "run.json")), config)
    if differing:
        raise UserError(f"The run in '{save_dir}' began with other settings ({', '.join(differing)}): resume it with the same.")
    if old["corpus_fingerprint"] != record["corpus_fingerprint"]:
        raise UserError(f"The corpus '{config.corpus}' has changed since the run in '{save_dir}' began: restore it, or start anew.")


def resume_command() -> str:
    """The command line that goes on with this run."""
    import shlex

    given = [argument for argument in sys.argv if argument not in ("--overwrite", "--no-overwrite", "--resume")]
    start = ["python", given[0]] if given[0].endswith(".py") else [given[0]]
    return shlex.join([*start, *given[1:], "--resume"])


# ----------------------------------------------------------------------------------------------- what is printed


def shown_trainers(config: RunConfig) -> list[str]:
    """A few dictionaries for the log: the middle one of each architecture."""
    by_architecture: dict[str, list[int]] = {}
    for index, spec in enumerate(config.dictionaries):
        by_architecture.setdefault(spec.architecture, []).append(index)
    return [f"trainer_{which[len(which) // 2]}" for which in by_architecture.values()][:SHOWN_DICTIONARIES]


def print_plan(config: RunConfig, plan: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="The plan", show_header=False, title_justify="left")
    rows = [("model", config.model_name), ("corpus", config.corpus), ("hook points", ", ".join(config.hook_points))]
    for name, value in [*rows, *plan.lines()]:
        table.add_row(name, escape(value))
    Console().print(table)


def print_stream_facts(run: TrainingRun, buffer: Any) -> None:
    """How the stream went: the buffer's mixing, the rows that the norm filter dropped, passes over the corpus."""
    mixing = buffer.mixing()
    texts = buffer.source.contexts.texts
    facts = [f"{run.tokens:,} activations, {texts.epoch + 1} pass(es) over the corpus begun"]
    if mixing:
        facts.append(f"{mixing['rows_per_context']:.2f} rows a context in the last batch ({mixing['rows_alone']:.0%} stand alone)")
    facts.append(f"{buffer.source.rows_dropped_by_norm:,} of {buffer.source.rows_seen:,} rows dropped for their norm")
    print("Stream: " + "; ".join(facts) + ".")


def print_summary(rows: Sequence[dict[str, Any]], save_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    columns = (
        ("L0", "l0", ".1f"), ("variance explained", "frac_variance_explained", ".4f"),
        ("loss recovered", "frac_recovered", ".4f"), ("KL", "kl", ".4f"), ("alive", "frac_alive", ".3f"),
    )
    table = Table(title="Held-out results, by hook point and L0 (* on the front)", title_justify="left")
    for name in ("", "dictionary", "architecture", "sparsity", "width", "hook point"):
        table.add_column(name)
    for name, _, _ in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            "*" if row["front"] else "", row["trainer"], row["architecture"], row["sparsity"], str(row["width"]),
            row["hook_point"], *(number(row[key], form) for _, key, form in columns),
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    print(f"Written to {save_dir}: summary.csv, metrics.jsonl, and a folder for each dictionary.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, 2 for what the user can mend (one sentence), 3 for an incomplete run, 130 or 143 when stopped."""
    args = tyro.cli(DemoArgs, args=argv, use_underscores=True)
    return run_command(args)


def run_command(args: DemoArgs) -> int:
    """Run parsed arguments; errors that the user can mend become one sentence."""
    import torch.multiprocessing as multiprocessing

    multiprocessing.set_start_method("spawn", force=True)
    passed_on = {f.name for f in dataclasses.fields(DemoArgs)} & set(run_training.__kwdefaults__)
    try:
        return run_training(resolve_config(args), args.save_dir, **{name: getattr(args, name) for name in passed_on})
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
