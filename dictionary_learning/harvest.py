"""`sae-factory harvest`: text in, a folder of activations out, for those who want files.

Training needs none: it takes the activations as they come. Files are for looking at them, for sharing them, and for
training again without the model. The texts, contexts and rows are those that `sae-factory train` would take with the
same settings, once through the corpus, in the same order; `SavedActivations` gives them back as the same batches.

The same command goes on with a harvest that was interrupted, and pushes one that is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dictionary_learning import storage
from dictionary_learning.activations.shards import COMPLETE, FORMAT, MANIFEST, VERSION, read_manifest
from dictionary_learning.command_line import parse
from dictionary_learning.corpus import Text, TextStream
from dictionary_learning.demo_args import load_demo_config, names_sentence_encoder
from dictionary_learning.errors import UserError, did_you_mean, exit_code, instead_of_commit, print_error

if TYPE_CHECKING:
    from dictionary_learning.activations.language_model import LanguageModelActivations, TracedLM
    from dictionary_learning.config import RunConfig
    from dictionary_learning.corpus import Corpus

INCOMPLETE_EXIT = 3  # the corpus held fewer activations than were asked for
HELDOUT_FRACTION = 0.05  # that of a training run
SAMPLED_DOCUMENTS = 64  # whose mean length says how large a harvest of --num_samples documents will be


@dataclass
class HarvestArgs:
    """Save a language model's activations as shards with a manifest. The same command goes on after an interruption."""

    out: Path
    """Folder of the shards: new, empty, or that of the same harvest, interrupted."""
    preset: str = "embedded"
    """Model, corpus and sizes that fit together, from demo_config.py: embedded, gpt2, gemma-2-2b."""
    model_name: str | None = None
    """A model on the Hub or a local folder, in place of the preset's."""
    corpus: str | None = None
    """Text: a file, a folder (.jsonl, .parquet, .txt, or raw medical QA records), hf://user/name, 'medical_qa' (the six
    corpora on the Hub) or 'embedded'."""
    layers: tuple[int, ...] | None = None
    """Layers to harvest."""
    site: str = "resid_post"
    """Where in a layer: resid_post, resid_pre, mlp_out, mlp_in, attn_out, attn_in."""
    hook_points: tuple[str, ...] | None = None
    """Hook points by name (mlp_out_layer_3) or module path (model.layers.3.mlp:out), in place of layers and site."""
    num_tokens: int | None = None
    """Activations to save (default: the preset's number, or with --num_samples no limit); at most one pass over the
    corpus."""
    num_samples: int | None = None
    """Documents to take."""
    split: str = "train"
    """Texts to take: train, heldout (the five in a hundred that a run evaluates on) or all."""
    ctx_len: int | None = None
    """Tokens in a context."""
    harvest_contexts: int | None = None
    """Contexts in one forward of the model."""
    dtype: str | None = None
    """Of the model and the files: float32 or bfloat16."""
    remove_bos: bool = True
    """Leave out special tokens."""
    max_activation_norm_multiple: float | None = 10.0
    """Leave out rows whose norm is above this multiple of the median at any of the hook points (None: keep all)."""
    seed: int = 0
    """Of the order of the documents."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    shard_mb: float = 512.0
    """Megabytes of activations in a shard; as much memory is needed."""
    push_to: str | None = None
    """Dataset repository on the Hub to upload the folder to when it is complete (user/name)."""
    private: bool = False
    """Make that repository private."""
    licence: str | None = None
    """Of the texts, for the dataset card, as an identifier such as cc-by-4.0 (default: that of the medical corpora)."""


@dataclass(frozen=True)
class HarvestConfig:
    """Everything that decides which rows are saved. `num_tokens` and `num_samples` limit them, None does not."""

    model_name: str
    corpus: str
    hook_points: tuple[str, ...]
    num_tokens: int | None
    num_samples: int | None
    ctx_len: int
    harvest_contexts: int
    dtype: str
    split: str = "train"
    remove_bos: bool = True
    max_activation_norm_multiple: float | None = 10.0
    seed: int = 0
    shard_mb: float = 512.0

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_samples", "ctx_len", "harvest_contexts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be positive, got {value}.")
        if not 0 < self.shard_mb < float("inf"):
            raise UserError(f"shard_mb must be positive, got {self.shard_mb}.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"A seed must be at least 0 and below 2^63, got {self.seed}.")


def resolve_harvest(args: HarvestArgs) -> HarvestConfig:
    """The configuration from the command line and demo_config.py. Raises UserError for what can't be."""
    presets, _ = load_demo_config()
    if args.preset not in presets:
        raise UserError(
            f"Unknown preset '{args.preset}': use one of {', '.join(presets)}.{did_you_mean(args.preset, presets)}"
        )
    preset = presets[args.preset]
    if preset.sentence is not None or names_sentence_encoder(args.model_name):
        raise UserError(
            "harvest saves the activations of language models: a sentence encoder's are trained on by `sae-factory "
            "train --preset sentence`, and given in Python by SentenceActivations."
        )
    if args.hook_points and (args.layers or args.site != HarvestArgs.site):
        raise UserError(f"Give either --hook_points or --{'layers' if args.layers else 'site'}, not both.")
    points = args.hook_points or [f"{args.site}_layer_{layer}" for layer in args.layers or preset.layers]
    limited = args.num_tokens is not None or args.num_samples is not None
    return HarvestConfig(
        model_name=args.model_name or preset.model_name,
        corpus=preset.corpus if args.corpus is None else args.corpus,
        hook_points=tuple(dict.fromkeys(points)),
        num_tokens=args.num_tokens if limited else preset.num_tokens,
        num_samples=args.num_samples,
        ctx_len=preset.ctx_len if args.ctx_len is None else args.ctx_len,
        harvest_contexts=preset.harvest_contexts if args.harvest_contexts is None else args.harvest_contexts,
        dtype=args.dtype or preset.dtype,
        split=args.split,
        remove_bos=args.remove_bos,
        max_activation_norm_multiple=args.max_activation_norm_multiple,
        seed=args.seed,
        shard_mb=args.shard_mb,
    )


def run_harvest(config: HarvestConfig, out: Path, *, device: str = "auto") -> dict[str, Any]:
    """Harvest into `out`, or go on with the harvest that is there; the manifest of the complete one.

    Raises:
        UserError: anything about the configuration, the model, the corpus, the folder or the disk that can't be.
    """
    from tqdm import tqdm

    from dictionary_learning.activations.types import ActivationBatch, Provenance
    from dictionary_learning.activations.writer import ShardWriter, check_files, said_of
    from dictionary_learning.corpus import open_corpus
    from dictionary_learning.demo import load_model
    from dictionary_learning.devices import resolve_device

    begun = check_folder(out)
    torch_device = resolve_device(device)
    pinned = None if begun is None else begun["corpus"].get("commits", {})  # on the Hub, a harvest reads one commit
    corpus = open_corpus(config.corpus, commits=pinned if isinstance(pinned, dict | None) else {})
    lm = load_model(cast("RunConfig", config), torch_device)  # reads model_name, dtype and ctx_len
    source = make_source(config, lm, corpus)
    header = make_header(config, lm, corpus, source)
    if begun is not None:
        check_same(out, begun, header)
        check_files(out, begun)
        if begun["status"] == COMPLETE:
            print(f"The harvest in '{out}' is complete: {begun['rows']:,} rows.")
            return begun
    expected = expected_rows(config, lm, corpus)
    saved = begun["rows"] if begun else 0
    check_disk(out, expected, saved, row_bytes(source))
    with said_of(out):
        out.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(out, header, header["settings"]["shard_rows"], begun)
    if writer.state is not None:
        source.load_state_dict(writer.state)
        print(f"Going on after {writer.rows:,} saved rows.")
    with tqdm(total=expected, initial=saved, desc="harvesting", unit="row", unit_scale=True, disable=None) as bar:
        while config.num_tokens is None or writer.rows < config.num_tokens:
            batch = next(source, None)
            if batch is None:
                break
            if config.num_tokens is not None:
                room = config.num_tokens - writer.rows
                acts = {name: rows[:room] for name, rows in batch.acts.items()}
                assert batch.provenance is not None
                batch = ActivationBatch(acts, Provenance(*(column[:room] for column in batch.provenance)))
            before = writer.rows
            writer.add(batch)
            if writer.full:
                writer.flush(source.state_dict())
            bar.update(writer.rows - before)
    if not writer.rows:
        raise UserError(
            f"The corpus '{config.corpus}' gave no row: every token was left out as special or by its norm."
        )
    return writer.finish(source.state_dict(), source.contexts.corpora)


def make_source(config: HarvestConfig, lm: TracedLM, corpus: Corpus) -> LanguageModelActivations:
    """The activations to save, as a stream."""
    from dictionary_learning.activations.language_model import LanguageModelActivations
    from dictionary_learning.packing import ContextPacker

    contexts = ContextPacker(
        make_texts(config, corpus), lm.tokenizer, ctx_len=config.ctx_len, batch_contexts=config.harvest_contexts
    )
    return LanguageModelActivations(
        lm,
        contexts,
        config.hook_points,
        remove_special=config.remove_bos,
        max_activation_norm_multiple=config.max_activation_norm_multiple,
        provenance=True,
    )


class FirstTexts(TextStream):
    """The first `limit` texts of a stream."""

    def __init__(self, corpus: Corpus, limit: int, **settings: Any) -> None:
        super().__init__(corpus, **settings)
        self.limit, self.given = limit, 0

    def __next__(self) -> Text:
        if self.given >= self.limit:
            raise StopIteration
        text = super().__next__()
        self.given += 1
        return text

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.given = state["given"]


def make_texts(config: HarvestConfig, corpus: Corpus) -> TextStream:
    """The texts of the harvest: those of a training run's first epoch, at most `num_samples`."""
    settings: dict[str, Any] = {"split": config.split, "heldout_fraction": HELDOUT_FRACTION, "seed": config.seed}
    if config.num_samples is not None:
        return FirstTexts(corpus, config.num_samples, **settings)
    return TextStream(corpus, **settings)


def make_header(
    config: HarvestConfig, lm: TracedLM, corpus: Corpus, source: LanguageModelActivations
) -> dict[str, Any]:
    """What the manifest says before the first row: nothing of this machine, no path, no time."""
    described = {name: value for name, value in lm.config.items() if name not in ("name", "revision")}
    digest = hashlib.sha256(json.dumps(storage.finite(described), sort_keys=True).encode()).hexdigest()
    name = "embedded" if config.model_name == "embedded" else lm.name
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {**storage.finite(lm.config), "name": name, "digest": digest},
        "hook_points": {
            point.name: {"width": point.width, "layer": point.layer, "path": point.path, "io": point.io}
            for point in source.hook_points
        },
        "dtype": str(source.dtype).removeprefix("torch."),
        "max_rows": source.max_rows,
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, "split": config.split}
        | ({"commits": dict(corpus.commits)} if corpus.commits else {}),
        "settings": {
            "ctx_len": config.ctx_len,
            "harvest_contexts": config.harvest_contexts,
            "num_tokens": config.num_tokens,
            "num_samples": config.num_samples,
            "remove_bos": config.remove_bos,
            "max_activation_norm_multiple": config.max_activation_norm_multiple,
            "heldout_fraction": HELDOUT_FRACTION,
            "seed": config.seed,
            "shard_rows": max(1, int(config.shard_mb * 1e6) // row_bytes(source)),
        },
    }


def row_bytes(source: LanguageModelActivations) -> int:
    """Bytes of one row at all hook points in the shards, without its provenance."""
    return sum(source.widths.values()) * source.dtype.itemsize


def check_folder(out: Path) -> dict[str, Any] | None:
    """The manifest of the harvest that `out` holds, None where it is new or empty.

    Raises:
        UserError: a file, or a folder that holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out '{out}' is a file: give a folder.")
    if not out.is_dir():
        return None
    manifest = read_manifest(out)
    foreign = [path.name for path in out.iterdir() if not path.name.startswith(f".{MANIFEST}.")]
    if manifest is None and foreign:
        raise UserError(f"--out '{out}' holds something else ({min(foreign)}): give a new or empty folder.")
    return manifest


def check_same(out: Path, begun: dict[str, Any], header: dict[str, Any]) -> None:
    """Refuse to go on with a harvest of another model, corpus or setting. Raises UserError, which names it."""
    old, new = begun["model"], header["model"]
    if old.get("digest") != new["digest"]:
        raise UserError(
            f"The harvest in '{out}' is of the model '{old.get('name')}' ({str(old.get('digest'))[:12]}), not of "
            f"'{new['name']}' ({new['digest'][:12]}): give the same model, or a new folder."
        )
    if begun["corpus"].get("fingerprint") != header["corpus"]["fingerprint"]:
        raise UserError(f"The harvest in '{out}' is of another corpus, or its corpus has changed: give a new folder.")
    parts = [(begun["corpus"], header["corpus"], ("split",)), (begun["settings"], header["settings"], None)]
    differing = [key for before, now, keys in parts for key in keys or now if before.get(key) != now[key]]
    differing += [key for key in ("hook_points", "dtype", "max_rows") if begun[key] != header[key]]
    if differing:
        raise UserError(
            f"The harvest in '{out}' began with other settings ({', '.join(differing)}): give the same or a new folder."
        )


def expected_rows(config: HarvestConfig, lm: TracedLM, corpus: Corpus) -> int | None:
    """About how many rows there will be at most, None where only the whole corpus would tell."""
    if config.num_samples is None:
        return config.num_tokens
    texts = [text.text for text, _ in zip(make_texts(config, corpus), range(SAMPLED_DOCUMENTS), strict=False)]
    encoded = lm.tokenizer([t.encode("utf-8", "replace").decode() for t in texts], verbose=False)["input_ids"]
    documents = config.num_samples if len(texts) == SAMPLED_DOCUMENTS else min(config.num_samples, len(texts))
    about = -(-documents * sum(map(len, encoded)) // max(1, len(texts)))
    return about if config.num_tokens is None else min(about, config.num_tokens)


def check_disk(out: Path, expected: int | None, saved: int, bytes_per_row: int) -> None:
    """Raises UserError where the rows that are still to come will not fit on the disk of `out`."""
    from dictionary_learning.activations.writer import BYTES_OF_PROVENANCE, said_of

    with said_of(out):
        existing = next(path for path in (out, *out.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
    needed = max(0, (expected or 0) - saved) * (bytes_per_row + BYTES_OF_PROVENANCE)
    if needed > free:
        raise UserError(
            f"The disk of '{out}' has {free / 1e9:.1f} GB left, but the harvest needs about {needed / 1e9:.1f} GB: "
            "free some space, or lower --num_tokens or --num_samples."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, 2 for what can be mended, 3 where the corpus ended early, 4 where only the push failed, 130."""
    args = parse(HarvestArgs, argv, "sae-factory harvest")
    return exit_code(lambda: run_command(args), "Interrupted: the same command goes on with this harvest.")


@instead_of_commit("a new folder as --out takes the newest")
def run_command(args: HarvestArgs) -> int:
    """Run parsed arguments. Raises UserError."""
    from dictionary_learning.activations.publish import card, check_licence, push_harvest
    from dictionary_learning.hub import PUSH_FAILED_EXIT

    check_licence(args.licence)
    if args.push_to is not None:
        from dictionary_learning.hub_client import check_push

        check_push(args.push_to)
    elif args.private:
        raise UserError("--private is of a repository: add --push_to user/name.")
    manifest = run_harvest(resolve_harvest(args), args.out, device=args.device)
    text = card(manifest, args.licence, args.push_to)
    for leftover in args.out.glob(".README.md.*"):  # of a process that was killed while it wrote
        leftover.unlink()
    with storage.atomic_file(args.out / "README.md") as handle:
        handle.write(text)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(
        f"Saved {manifest['rows']:,} rows of {manifest['documents']:,} documents at "
        f"{', '.join(manifest['hook_points'])} in {len(manifest['shards']):,} shards ({size / 1e6:,.1f} MB): {args.out}"
    )
    if args.push_to is not None:
        try:
            print("Pushed to " + push_harvest(args.out, manifest, args.push_to, private=args.private))
        except UserError as error:
            print_error(error)
            return PUSH_FAILED_EXIT
    if args.num_tokens is not None and args.num_samples is None and manifest["rows"] < args.num_tokens:
        print(f"The corpus ended after {manifest['rows']:,} of {args.num_tokens:,} activations.", file=sys.stderr)
        return INCOMPLETE_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
