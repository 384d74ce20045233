"""The command line of the main job, and the run configuration that it gives with demo_config.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from dictionary_learning.config import Preset, RunConfig, Sweep, config_from_dict, load_config, resolve
from dictionary_learning.distributed.ranks import silent
from dictionary_learning.errors import UserError, did_you_mean

ENCODERS = ("language_model", "sentence")
_SENTENCE = ("encoder", "level", "prompt", "normalize_embeddings")
_SWEPT = ("layers", "site", "hook_points", "architectures", "widths", "seeds", "learning_rates")


@dataclass(kw_only=True)
class Model:
    """What to read activations from: the boxes of the help are named as these classes are."""

    model_name: str | None = None
    """A model on the Hub or a local folder, in place of the preset's."""
    encoder: str | None = None
    """What the model is: language_model, or sentence (a sentence-transformers model). Left out, it follows from the
    preset, a model_name below sentence-transformers/, or a folder with a modules.json."""
    level: str | None = None
    """Of a sentence encoder: text (one embedding a text, the default) or token (the states of its tokens)."""
    prompt: str | None = None
    """Of a sentence encoder: what to put before every text (left out, the model's own default)."""
    normalize_embeddings: bool = False
    """Of a sentence encoder: scale embeddings to unit length, whether or not the model does."""
    dtype: str | None = None
    """Of the model: float32 or bfloat16."""
    layers: tuple[int, ...] | None = None
    """Layers to train on."""
    site: str = "resid_post"
    """Where in a layer: resid_post, resid_pre, mlp_out, mlp_in, attn_out, attn_in."""
    hook_points: tuple[str, ...] | None = None
    """Hook points by name (mlp_out_layer_3) or module path (model.layers.3.mlp:out), in place of layers and site."""


@dataclass(kw_only=True)
class Data:
    """What is read, and in which order."""

    corpus: str | None = None
    """Text to train on: a file, a folder (.jsonl, .parquet, .txt, or raw medical QA records), hf://user/name,
    'medical_qa' (the six corpora on the Hub) or 'embedded'."""
    num_tokens: int | None = None
    """Activations to train on: tokens, or embeddings of texts."""
    ctx_len: int | None = None
    """Tokens in a context; of a sentence encoder, those at which a text is cut."""
    buffer_contexts: int | None = None
    """Contexts' worth of activations that the buffer mixes."""
    seed: int | None = None
    """Of the order of the documents and the mixing of the buffer."""
    read_ahead: int | None = None
    """Batches of contexts that a thread tokenises ahead (default: 2 on CUDA, else 0); the results are the same."""


@dataclass(kw_only=True)
class Dictionary:
    """What to train at each hook point."""

    architectures: tuple[str, ...] | None = None
    """Architectures of the sweep to train."""
    widths: tuple[int, ...] | None = None
    """Latents of a dictionary."""
    seeds: tuple[int, ...] | None = None
    """Of the initial weights; every dictionary of the sweep is trained once with each."""
    learning_rates: tuple[float, ...] | None = None
    """Peak learning rates; left out, a rule fits it to width and length."""


@dataclass(kw_only=True)
class Training:
    """How to train, and where."""

    batch_size: int | None = None
    """Activations in a training step."""
    encoder_dtype: str | None = None
    """Of the dictionaries' encoder product in sparse steps, whose codes stay exact: fp32, tf32 (CUDA) or bf16."""
    device: str = "auto"
    """auto (cuda, mps, cpu: the first that is there), cpu, cuda, cuda:1, mps."""
    shard_latents: bool = False
    """On several ranks (torchrun): split the latents of every dictionary over them, in place of whole dictionaries."""
    max_temperature: float | None = None
    """Pause between steps while the GPU is hotter than this (degrees Celsius, told by NVML)."""
    resume_temperature: float | None = None
    """Until it is below this (default: 10 degrees less)."""
    profile: bool = False
    """Tell where ten steps spend their time; with a trace in SAVE_DIR/profile."""


@dataclass(kw_only=True)
class Evaluation:
    """What is found out about the trained dictionaries."""

    eval_tokens: int | None = None
    """Held-out activations to evaluate on."""
    report: bool = True
    """Analyse the dictionaries worth reading (of each architecture the sparsest that is hardly worse than its best),
    and make report.html."""


@dataclass(kw_only=True)
class Saving:
    """What is kept to go on from."""

    save_checkpoints: bool = False
    """Keep checkpoints of every dictionary at four points, spaced as powers of ten."""
    state_every: int | None = None
    """Steps between saved states (default: a fifth of the run; 0: only when the run ends or is stopped)."""
    resume: bool = False
    """Go on with the interrupted run in save_dir, whose settings need not be given again; with more --num_tokens, make
    a run longer."""
    override: bool = False
    """With --resume: allow other settings, another corpus or other weights of the model than the run began with."""


@dataclass(kw_only=True)
class Logging:
    """What is told while it trains."""

    log_steps: int | None = None
    """Steps between log entries (default: 50 entries a run)."""
    use_wandb: bool = False
    """Log each dictionary as a run of Weights & Biases (WANDB_MODE=offline works without a network)."""
    wandb_project: str = "sae-factory"
    """Project of Weights & Biases."""
    wandb_entity: str = ""
    """User or team there (default: your own)."""


@dataclass(kw_only=True)
class Hub:
    """Where the finished run goes."""

    hf_repo_id: str | None = None
    """Repository on the Hugging Face Hub (user/name) to push the finished run to; made if it does not exist."""
    hf_private: bool = False
    """Make that repository private."""


@dataclass
class DemoArgs(Model, Data, Dictionary, Training, Evaluation, Saving, Logging, Hub):
    """Train a sweep of dictionaries on one stream of a language model's or a sentence encoder's activations."""

    save_dir: Path
    """Folder of the run: new, empty, or with --resume that of an interrupted run."""
    preset: str = "embedded"
    """Model, corpus and sizes that fit together, from demo_config.py: embedded, gpt2, gemma-2-2b, sentence."""
    config: Path | None = None
    """A .yaml, .json or run.json with a whole run configuration, in place of preset and sweep."""
    dry_run: bool = False
    """Print the plan (sizes, and the time by a ten-second probe) and stop."""
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
            "encoder_dtype",
            "seed",
        )
        if getattr(args, name) is not None
    }
    if args.resume and not _describes(args) and (args.save_dir / "run.json").is_file():
        if not silent():
            print(f"Going on with the settings of {args.save_dir / 'run.json'}.")
        return config_from_dict({**load_config(args.save_dir / "run.json").to_dict(), **given}, "run.json")
    if args.config is not None:
        swept = [n for n in (*_SWEPT, *_SENTENCE) if getattr(args, n) not in (None, (), False, DemoArgs.site)]
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
    preset = with_encoder(args, presets)
    if args.hook_points and (args.layers or args.site != DemoArgs.site):
        raise UserError(f"Give either --hook_points or --{'layers' if args.layers else 'site'}, not both.")
    points = args.hook_points or [f"{args.site}_layer_{layer}" for layer in args.layers or preset.layers]
    if preset.sentence is not None and not points:
        if args.site != DemoArgs.site:
            raise UserError(f"--site {args.site} is a place in a layer: add --layers.")
        points = ["sentence_embedding" if preset.sentence.level == "text" else "token_embeddings"]
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


def _describes(args: DemoArgs) -> bool:
    """Whether the command line says what the run is to be, but for its length."""
    what = [f.name for group in (Model, Data, Dictionary) for f in fields(group)]
    what += ["batch_size", "encoder_dtype", "eval_tokens", "preset", "config"]
    return any(
        getattr(args, name) != getattr(DemoArgs, name) for name in what if name not in ("num_tokens", "read_ahead")
    )


def with_encoder(args: DemoArgs, presets: Mapping[str, Preset]) -> Preset:
    """The preset of the command line, with what it says about a sentence encoder.

    Raises:
        UserError: an unknown encoder, a preset of the other kind, an option of a sentence encoder without one.
    """
    preset = presets[args.preset]
    found = "sentence" if preset.sentence is not None or names_sentence_encoder(args.model_name) else ENCODERS[0]
    encoder = args.encoder or found
    if encoder not in ENCODERS:
        raise UserError(
            f"Unknown encoder '{encoder}': use one of {', '.join(ENCODERS)}.{did_you_mean(encoder, ENCODERS)}"
        )
    if encoder == "language_model":
        if preset.sentence is not None:
            raise UserError(f"The preset '{args.preset}' is of a sentence encoder: leave out --encoder language_model.")
        given = [name for name in _SENTENCE[1:] if getattr(args, name) not in (None, False)]
        if given:
            raise UserError(f"--{given[0]} is of a sentence encoder: add --preset sentence or --encoder sentence.")
        return preset
    if preset.sentence is None:
        if args.preset != DemoArgs.preset or "sentence" not in presets:
            raise UserError(
                f"The preset '{args.preset}' is of a language model: for a sentence encoder give one that has sentence "
                "settings in demo_config.py, such as --preset sentence."
            )
        preset = presets["sentence"]
    settings = preset.sentence
    assert settings is not None
    if args.prompt is not None:
        settings = replace(settings, prompt=args.prompt)
    return replace(
        preset,
        sentence=replace(
            settings, level=args.level or settings.level, normalize=args.normalize_embeddings or settings.normalize
        ),
    )


def names_sentence_encoder(model_name: str | None) -> bool:
    """Whether a model is known as a sentence encoder by its name, or by what its folder holds."""
    if model_name is None:
        return False
    return model_name.startswith("sentence-transformers/") or (Path(model_name) / "modules.json").is_file()


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
