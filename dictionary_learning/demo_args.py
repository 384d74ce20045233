"""The command line of the main job, and the run configuration that it gives with demo_config.py."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from dictionary_learning.config import Preset, RunConfig, Sweep, config_from_dict, load_config, resolve
from dictionary_learning.errors import UserError, did_you_mean


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
    hf_repo_id: str | None = None
    """Repository on the Hugging Face Hub (user/name) to push the finished run to; made if it does not exist."""
    hf_private: bool = False
    """Make that repository private."""
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
        for name in (
            "model_name",
            "corpus",
            "num_tokens",
            "batch_size",
            "ctx_len",
            "buffer_contexts",
            "eval_tokens",
            "dtype",
            "seed",
        )
        if getattr(args, name) is not None
    }
    if args.config is not None:
        swept = [
            n
            for n in ("layers", "site", "hook_points", "architectures", "widths", "seeds", "learning_rates")
            if getattr(args, n) not in (None, (), DemoArgs.site)
        ]
        if swept:
            raise UserError(f"--config already says which dictionaries to train: leave out --{swept[0]} or --config.")
        if args.preset != DemoArgs.preset:
            raise UserError("--config is a whole configuration: leave out --preset or --config.")
        return config_from_dict({**load_config(args.config).to_dict(), **given}, str(args.config))
    presets, sweep = load_demo_config()
    if args.preset not in presets:
        raise UserError(
            f"Unknown preset '{args.preset}': use one of {', '.join(presets)}.{did_you_mean(args.preset, presets)}"
        )
    preset = presets[args.preset]
    if args.hook_points and (args.layers or args.site != DemoArgs.site):
        raise UserError(f"Give either --hook_points or --{'layers' if args.layers else 'site'}, not both.")
    points = args.hook_points or [f"{args.site}_layer_{layer}" for layer in args.layers or preset.layers]
    return resolve(
        preset,
        sweep,
        hook_points=points,
        architectures=args.architectures,
        widths=args.widths,
        seeds=args.seeds,
        learning_rates=args.learning_rates,
        **given,
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
        import demo_config as module
    try:
        return module.PRESETS, module.SWEEP
    except AttributeError as error:
        raise UserError(f"demo_config.py must define PRESETS and SWEEP: {error}.") from None
