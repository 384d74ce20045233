"""`sae-factory fit config.yaml --activations acts.pt`: one sparse autoencoder from saved activations.

In: a `config.yaml` (see `sae_config.py`) and activations as `SavedActivations` reads them. Out: a folder as any run's:
`trainer_0/` with weights, config.json and eval_results.json, `metrics.jsonl` with the held-out loss, `run.json`,
`config.yaml`, states; and a table of held-out metrics.

A part of the activations is never trained on. Activations that fit into memory are split by rows, equal rows to one
side, and each epoch has an order of its own. Larger ones are split by blocks of neighbouring rows, read a block at a
time and mixed by the `ActivationBuffer`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dictionary_learning import storage
from dictionary_learning.command_line import parse
from dictionary_learning.errors import UserError, exit_code
from dictionary_learning.sae_config import SAEConfig, load_sae_config

if TYPE_CHECKING:
    from torch import Tensor

    from dictionary_learning.activations.saved import SavedActivations
    from dictionary_learning.callbacks import Callback
    from dictionary_learning.training import TrainingRun

IN_MEMORY_MB = 4096  # of activations: more are read from their files
BUFFER_MB = 512  # of the buffer that mixes those
MOST_HELDOUT_ROWS = 100_000  # that are measured on, where the activations are not in memory
LOOKS = 20  # at the held-out loss in a run whose config doesn't say eval_steps
INCOMPLETE_EXIT = 3
LENGTH = ("epochs", "num_steps")  # more of them make a run longer
UNBOUND = ("path", "device")  # may differ between a run and its resume


@dataclass
class FitArgs:
    """Train the sparse autoencoder of a config.yaml on saved activations, and measure it on held-out ones."""

    config: tyro.conf.Positional[Path]
    """The config.yaml: input_dims, n_features, k or beta_l1, and what else docs/training.md lists."""
    activations: str
    """A .pt, .npy, .npz or .safetensors file, a folder of shards, or hf://user/name."""
    save_dir: Path | None = None
    """Folder of the run (default: runs/ and the name of the config file)."""
    hook_point: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Which tensor of the activations, where they hold several."""
    device: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """auto, cpu, cuda, cuda:1, mps, in place of the config's."""
    drop_non_finite: bool = False
    """Leave out rows with a NaN or an infinity, which are refused otherwise."""
    max_temperature: float | None = None
    """Pause between steps while the GPU is hotter than this (degrees Celsius, told by NVML)."""
    resume_temperature: float | None = None
    """Until it is below this (default: 10 degrees less)."""
    resume: bool = False
    """Go on with the interrupted run in save_dir; with more epochs or num_steps, make a run longer."""
    override: bool = False
    """With --resume: allow other settings than the run began with."""
    overwrite: bool = False
    """Replace a run that save_dir holds."""


def fit(
    config: SAEConfig,
    activations: str,
    save_dir: Path,
    *,
    hook_point: str | None = None,
    device: str | None = None,
    drop_non_finite: bool = False,
    max_temperature: float | None = None,
    resume_temperature: float | None = None,
    resume: bool = False,
    override: bool = False,
    overwrite: bool = False,
) -> int:
    """The command; prints the table. The exit code: 0, 3 where the activations ended early, 128 + signal.

    Raises:
        UserError: anything about the config, the activations, the device or the folder that can't be.
    """
    from dictionary_learning.activations.saved import SavedActivations
    from dictionary_learning.console import warnings_said
    from dictionary_learning.device_guard import device_guard
    from dictionary_learning.devices import resolve_device
    from dictionary_learning.heldout import HeldOut
    from dictionary_learning.record import kept_state, resume_command
    from dictionary_learning.resume import carried_settings
    from dictionary_learning.stopping import EXIT_CODES
    from dictionary_learning.tracking import ProgressSink
    from dictionary_learning.trainers.sparse_autoencoder import SparseAutoencoderTrainer
    from dictionary_learning.training import TrainingRun

    if override and not resume:
        raise UserError("--override is about going on with a run: it needs --resume.")
    torch_device = resolve_device(config.device if device is None else device)
    guards = device_guard(torch_device, max_temperature, resume_temperature)
    storage.check_run_folder(save_dir, resume=resume, overwrite=overwrite)
    source = SavedActivations(activations, non_finite="drop" if drop_non_finite else "error")
    name = _hook_point(source, hook_point, activations, config.input_dims)
    data, heldout, rows = _split(source, name, config, torch_device)
    steps = config.steps(rows)
    facts = _record(config, activations, name, rows, len(heldout))
    changed = _check_same(save_dir, facts, override) if resume else []
    state = None
    if resume and storage.saved_states(save_dir / "state"):
        with warnings_said():
            state = storage.load_newest_state(save_dir / "state")[1]
    began = next(iter(state.get("settings", [])), None) if state is not None and not changed else None
    carried = carried_settings(began, SparseAutoencoderTrainer)
    trainer = config.trainer(steps, device=torch_device, submodule_name=name, **carried)
    watch = HeldOut(heldout, config.eval_steps or max(1, steps // LOOKS), save_best_only=config.save_best_only)
    callbacks: list[Callback] = [watch, *guards]
    run = TrainingRun(
        data,
        [trainer],
        steps,
        save_dir=save_dir,
        state_every=max(1, steps // 5),
        log_steps=max(1, steps // 50),
        sinks=[ProgressSink(None, ["trainer_0"])],
        normalize_activations=True,
        callbacks=callbacks,
    )
    # What can be refused was refused: from here on files change.
    storage.prepare_run_folder(save_dir, resume=resume, overwrite=overwrite)
    if state is not None:
        run.load_state_dict(state, override)
        print(f"Resuming at step {run.step:,} of {steps:,}.")
    elif resume:
        print("The run was interrupted before its first saved state: it begins anew.")
    for change in changed:
        print(f"Warning: {change}: from here on it is not the run that began.")
    storage.write_json(save_dir / "run.json", facts | {"status": "running"})
    config.save(save_dir / "config.yaml")
    print(
        f"{config.input_dims} -> {config.n_features} latents on {torch_device}: {steps:,} steps of {config.batch_size} "
        f"rows, {rows:,} to train on, {len(heldout):,} held out."
    )
    run.run()
    if run.stopped in EXIT_CODES:
        run.tracker.close()
        storage.write_json(save_dir / "run.json", facts | {"status": f"stopped: {run.stopped}"})
        print(f"Stopped by {run.stopped} after step {run.step:,}; {kept_state(run)}. Go on with:")
        print(f"  {resume_command()}")
        return EXIT_CODES[run.stopped]
    _finish(run, watch, heldout, save_dir)
    run.tracker.close()
    status = f"stopped: {run.stopped}" if run.stopped else "complete"
    storage.write_json(save_dir / "run.json", facts | {"status": status})
    return INCOMPLETE_EXIT if run.stopped else 0


def _hook_point(source: SavedActivations, asked: str | None, where: str, width: int) -> str:
    """The tensor to train on, of the width that the config says."""
    from dictionary_learning.errors import did_you_mean

    names = list(source.widths)
    if asked is None and len(names) > 1:
        raise UserError(f"The activations '{where}' hold {', '.join(names)}: choose one with --hook_point.")
    name = names[0] if asked is None else asked
    if name not in names:
        raise UserError(
            f"The activations '{where}' hold no '{name}', but {', '.join(names)}.{did_you_mean(name, names)}"
        )
    if source.widths[name] != width:
        raise UserError(
            f"The config says input_dims {width}, but the activations '{where}' are {source.widths[name]} wide."
        )
    return name


def _split(source: SavedActivations, name: str, config: SAEConfig, device: Any) -> tuple[Any, Tensor, int]:
    """(data to train on, held-out rows, rows to train on)."""
    from dictionary_learning.activations.in_memory import InMemoryActivations, split_rows
    from dictionary_learning.buffer import ActivationBuffer

    row_mb = sum(source.widths.values()) * source.dtype.itemsize / 1e6
    seed = config.random_seed
    if source.rows * row_mb <= IN_MEMORY_MB:
        train, heldout = split_rows(_read(source, name), config.heldout_fraction, seed=seed)
        batches = InMemoryActivations(train, config.batch_size, epochs=config.passes, seed=seed, device=device)
        return batches, heldout, len(train)
    parts = source.split({"train": 1 - config.heldout_fraction, "heldout": config.heldout_fraction}, seed=seed)
    train_part = parts["train"]
    train_part.epochs, train_part.seed = config.passes, seed
    capacity = max(train_part.max_rows + config.batch_size, min(train_part.rows, int(BUFFER_MB / row_mb)))
    buffer = ActivationBuffer(
        None, train_part, n_ctxs=capacity, ctx_len=1, out_batch_size=config.batch_size, device=device, seed=seed
    )
    return buffer, _read(parts["heldout"], name, MOST_HELDOUT_ROWS), train_part.rows


def _read(source: Iterable[Any], name: str, most: float = math.inf) -> Tensor:
    """The rows of a source, or the first so many of them."""
    import torch

    parts: list[Tensor] = []
    for batch in source:
        parts.append(batch.acts[name].clone())
        if sum(map(len, parts)) >= most:
            break
    rows = torch.cat(parts)
    return rows if len(rows) <= most else rows[: int(most)]


def _record(config: SAEConfig, activations: str, name: str, rows: int, heldout: int) -> dict[str, Any]:
    """What run.json says."""
    from dictionary_learning.record import git_revision, package_versions

    return {
        "command": "fit",
        "sae_config": config.to_dict(),
        "activations": {"path": activations, "hook_point": name, "rows": rows, "heldout_rows": heldout},
        "versions": package_versions(),
        "git_revision": git_revision(),
    }


def _check_same(save_dir: Path, facts: dict[str, Any], override: bool) -> list[str]:
    """Refuse to go on with other settings or activations than the run began with, but for more steps; what differs,
    where `override` allows it. It is entered into `facts`."""
    from dictionary_learning.resume import differences, refuse

    old = storage.read_json(save_dir / "run.json")
    if not isinstance(old, dict) or old.get("command") != "fit":
        raise UserError(f"The run in '{save_dir}' was not made by 'sae-factory fit': resume it with its own command.")
    began, now = (
        {key: value for part in parts if isinstance(part, dict) for key, value in part.items() if key not in UNBOUND}
        for parts in ((record.get("sae_config"), record.get("activations")) for record in (old, facts))
    )
    found = [d for d in differences(began, now) if not (d.field in LENGTH and d.old and d.new and d.new > d.old)]
    changed = refuse(f"The run in '{save_dir}'", found, override)
    before_this = old.get("resumed")
    facts["resumed"] = [*(before_this if isinstance(before_this, list) else []), {"changed": changed}]
    return changed


def _finish(run: TrainingRun, watch: Any, heldout: Tensor, save_dir: Path) -> None:
    """Measure the result on the held-out activations; write and print that."""
    from rich.console import Console
    from rich.table import Table

    from dictionary_learning.evaluation import PooledMetrics

    pooled = PooledMetrics(run.dictionary(0))
    for rows in heldout.split(4096):
        pooled.update(rows)
    best = watch.best.get(0)
    result = pooled.result().to_dict() | ({} if best is None else best.facts)
    storage.write_json(save_dir / "trainer_0" / "eval_results.json", storage.finite(result))
    table = Table(title="Held-out metrics", show_header=False, title_justify="left")
    shown = (
        ("L0", "l0", ".2f"),
        ("variance explained", "frac_variance_explained", ".4f"),
        ("mean squared error an element", "mse", ".4g"),
        ("cosine", "cossim", ".4f"),
        ("alive", "frac_alive", ".4f"),
        ("best step", "best_step", ",d"),
        ("its held-out loss", "best_heldout_loss", ".4g"),
    )
    for label, key, form in shown:
        if key in result:
            table.add_row(label, "–" if result[key] is None else format(result[key], form))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(f"Written to {save_dir}: trainer_0/, metrics.jsonl, config.yaml.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, 2 for what the user can mend (one sentence), 3 for an incomplete run, 130 or 143 when stopped."""
    args = parse(FitArgs, argv, "sae-factory fit")
    save_dir = args.save_dir or Path("runs") / args.config.stem

    def job() -> int:
        with storage.disk_faults_said(save_dir):
            return fit(
                load_sae_config(args.config),
                args.activations,
                save_dir,
                hook_point=args.hook_point,
                device=args.device,
                drop_non_finite=args.drop_non_finite,
                max_temperature=args.max_temperature,
                resume_temperature=args.resume_temperature,
                resume=args.resume,
                override=args.override,
                overwrite=args.overwrite,
            )

    return exit_code(job)
