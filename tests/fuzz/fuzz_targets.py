"""Every reader of files from elsewhere, as a function of a folder in which one file is hostile.

Out: `TARGETS`. The file is one of a valid folder (fuzz_seeds.py); where checksums or sizes guard it, a target renews
them, so that the reader behind is reached. What comes out is used as a command would use it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz_seeds as seeds
import torch
from fuzz_handmade import HANDMADE
from fuzz_oracle import Finding, Target
from fuzz_reports import REPORT_TARGETS

from dictionary_learning import storage

# ---------------------------------------------------------------------------------------------- configurations


def _config_yaml(folder: Path) -> None:
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(seeds.run_config().to_dict()))


def _sae_config(folder: Path) -> None:
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(seeds.SAE_CONFIG))


def _use(config: Any) -> None:
    """What a run does with its configuration before anything else."""
    json.dumps(config.to_dict(), allow_nan=False)
    for spec in config.dictionaries:
        repr((spec.trainer_arguments(), spec.label))
    repr((config.steps, config.hook_points, config.rows_per_context, float(config.num_tokens) / 1e9))


def config_yaml(folder: Path) -> None:
    from dictionary_learning.config import load_config

    _use(load_config(folder / "config.yaml"))


def run_json(folder: Path) -> None:
    from dictionary_learning.config import load_config
    from dictionary_learning.record import check_resumable, commits_of

    model = {"weights": seeds.DIGEST, "tokenizer": seeds.DIGEST}
    record: dict[str, Any] = {"model": model, "corpus_fingerprint": seeds.DIGEST, "versions": {}}
    record |= {"device": "cpu", "git_revision": None, "started": ""}
    _use(load_config(folder / "run.json"))
    commits_of(folder, seeds.run_config())
    check_resumable(folder, seeds.run_config(), record)


def demo_config(folder: Path) -> None:
    from dictionary_learning.demo_args import DemoArgs, resolve_config

    _use(resolve_config(DemoArgs(folder / "new", config=folder / "config.yaml", num_tokens=10_000)))


def sae_config(folder: Path) -> None:
    from dictionary_learning.sae_config import load_sae_config

    config = load_sae_config(folder / "config.yaml")
    config.save(folder / "out" / "config.yaml")
    config.trainer_config(config.steps(1000))


# ---------------------------------------------------------------------------------------------- a run's folder


def wandb_json(folder: Path) -> None:
    from dictionary_learning.weights_and_biases import WandbRuns

    runs = WandbRuns(None, project=None, entity=None, group="run", folder=folder)
    for name in (*runs.known(), "trainer_0"):
        runs.unsent(name)


def metrics_jsonl(folder: Path) -> None:
    from dictionary_learning.sync import _names
    from dictionary_learning.tracking import JsonlSink
    from dictionary_learning.weights_and_biases import read_rows

    for row in read_rows(folder / "metrics.jsonl"):
        repr((row["trainer"], row["step"] > 3))
    list(_names(folder))
    JsonlSink(folder / "metrics.jsonl").start(7, {})


def summary_csv(folder: Path) -> None:
    from dictionary_learning.summary import best_of, read_summary

    best_of(read_summary(folder / "summary.csv"))


def hub_checksums(folder: Path) -> None:
    from dictionary_learning import hub_load

    def download(reference: Any, revision: Any, name: str, *_: Any, optional: bool = False, **__: Any) -> Path | None:
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise Finding(f"path: {name!r} leaves the repository")
        return None if optional and not file.is_file() else file

    with (
        mock.patch.object(hub_load, "_download", download),
        mock.patch.object(hub_load, "_unreachable", lambda: None),
    ):
        for name in ("hf://user/repo", "hf://user/repo/trainer_0"):
            hub_load.pull_dictionary(hub_load.parse_reference(name))


STATE = "state/step_000000010"


def _state(folder: Path, *renewed: str) -> None:
    """Read the newest state, with the checksums of `renewed` files as they should be."""
    path = folder / STATE
    if renewed:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in renewed:
            manifest["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
        (path / "manifest.json").write_text(json.dumps(manifest))
    storage.load_newest_state(folder / "state")


def state_manifest(folder: Path) -> None:
    _state(folder)


def state_json(folder: Path) -> None:
    _state(folder, "state.json")


def state_tensors(folder: Path) -> None:
    _state(folder, "state.safetensors")


# ---------------------------------------------------------------------------------------------- dictionaries


def _used(loaded: tuple[Any, Any]) -> None:
    """Encode with a dictionary, and write it again: what its config names may lead nowhere else."""
    from dictionary_learning.formats.files import save_ours

    dictionary, config = loaded
    if dictionary.activation_dim * dictionary.dict_size <= 100_000:
        dictionary(torch.ones(2, dictionary.activation_dim))
    save_ours(dictionary, storage.finite(config), Path("inner") / "out")


def load_dictionary(folder: Path) -> None:
    from dictionary_learning.utils import load_dictionary

    _used(load_dictionary(folder))


def read_format(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from dictionary_learning import formats

        dictionary, config = formats.read(folder, name)
        _used((dictionary, config))
        formats.write(dictionary, config, folder / "out" / "again", name)

    return read


def in_format(name: str) -> Callable[[Path], None]:
    return lambda folder: seeds.dictionary(folder, name)


def _ours(folder: Path) -> None:
    seeds.run(folder / "run")
    for file in (folder / "run" / "trainer_0").iterdir():
        shutil.copy(file, folder)
    shutil.rmtree(folder / "run")


# ---------------------------------------------------------------------------------------------- activations


def _read_rows(path: Path) -> None:
    """All that training reads of saved activations, but for what repeats."""
    from dictionary_learning.activations.saved import SavedActivations

    source = SavedActivations(path, non_finite="drop", seed=1)
    source.state_dict()
    for batch in itertools.islice(source, 20):
        for rows in batch.acts.values():
            rows.float().sum()
    list(itertools.islice(SavedActivations(path, non_finite="drop", epochs=1).loader(3), 20))


def saved(file: str) -> Callable[[Path], None]:
    return lambda folder: _read_rows(folder / file)


def harvest_manifest(folder: Path) -> None:
    from dictionary_learning.activations.shards import read_manifest
    from dictionary_learning.activations.writer import ShardWriter, check_files

    if (manifest := read_manifest(folder)) is not None and manifest["state"] is not None:
        check_files(folder, manifest)
        ShardWriter(folder, {}, 100, manifest)
        return
    _read_rows(folder)


def _unfinished(folder: Path) -> None:
    seeds.harvest(folder)
    (folder / "unfinished.json").rename(folder / "manifest.json")


def harvest_shard(name: str, *keys: str) -> Callable[[Path], None]:
    """A harvest's file, whose size and checksum are put right in the manifest."""

    def read(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        data = (folder / name).read_bytes()
        entry = manifest["shards"][0]
        for key in keys:
            entry = entry[key]
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        _read_rows(folder)

    return read


def zscores(folder: Path) -> None:
    from dictionary_learning.activations.statistics import load_zscores

    for zscore in load_zscores(folder / "zscores.safetensors").values():
        zscore.apply(torch.ones(2, len(zscore.mean_D)))


def _zscores(folder: Path) -> None:
    from dictionary_learning.activations.statistics import ZScore, save_zscores

    save_zscores(folder / "zscores.safetensors", {seeds.POINT: ZScore(torch.zeros(3), torch.ones(3))})


# ---------------------------------------------------------------------------------------------- text


def corpus(file: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from dictionary_learning.corpus import TextStream, open_corpus

        found = open_corpus(folder / file)
        for text in itertools.islice(TextStream(found, seed=0), 2000):
            text.text.encode(), text.corpus.encode()  # a tokenizer takes, and a file holds, what UTF-8 can spell

    return read


def zst(folder: Path) -> None:
    from dictionary_learning.utils import zst_to_generator

    for text in itertools.islice(zst_to_generator(folder / "texts.jsonl.zst"), 2000):
        text.encode()


def records(name: str, suffix: str) -> Callable[[Path], None]:
    """Raw records of a corpus, through the reader, the formatter of that corpus, and the key of the question."""

    def read(folder: Path) -> None:
        from data_prep.sources import looks_like_raw_records, stream_texts

        looks_like_raw_records(folder)
        for row in itertools.islice(stream_texts(folder, [name], skipped=lambda _: None), 2000):
            json.dumps(row, ensure_ascii=False).encode()

    return read


def _records(name: str, suffix: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        found = seeds.records()[name]
        (folder / name).mkdir()
        if suffix == "jsonl":
            (folder / name / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
            return
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(found), folder / name / "train.parquet")

    return prepare


SHARD = "shard-00000.safetensors"
CORPORA = ("medqa", "medmcqa", "pubmedqa", "mmlu_college_medicine", "mmlu_clinical_knowledge")
_TABLE: list[tuple[str, str, str, Callable[[Path], Any], Callable[[Path], Any]]] = [
    ("config_yaml", "config.yaml", "yaml", _config_yaml, config_yaml),
    ("demo_config", "config.yaml", "yaml", _config_yaml, demo_config),
    ("sae_config", "config.yaml", "yaml", _sae_config, sae_config),
    ("run_json", "run.json", "json", seeds.run, run_json),
    ("wandb_json", "wandb.json", "json", seeds.run, wandb_json),
    ("metrics_jsonl", "metrics.jsonl", "jsonl", seeds.run, metrics_jsonl),
    ("summary_csv", "summary.csv", "csv", seeds.run, summary_csv),
    ("hub_checksums", "checksums.json", "json", seeds.run, hub_checksums),
    ("state_manifest", f"{STATE}/manifest.json", "json", seeds.run, state_manifest),
    ("state_json", f"{STATE}/state.json", "json", seeds.run, state_json),
    ("state_tensors", f"{STATE}/state.safetensors", "safetensors", seeds.run, state_tensors),
    ("dictionary_config", "config.json", "json", _ours, load_dictionary),
    ("dictionary_tensors", "ae.safetensors", "safetensors", _ours, load_dictionary),
    ("dictionary_pickle", "ae.pt", "zip", in_format("dictionary_learning"), load_dictionary),
    ("matryoshka_tensors", "ae.safetensors", "safetensors", seeds.matryoshka, load_dictionary),
    ("saelens_config", "cfg.json", "json", in_format("saelens"), read_format("saelens")),
    ("saelens_tensors", "sae_weights.safetensors", "safetensors", in_format("saelens"), read_format("saelens")),
    ("sparsify_config", "cfg.json", "json", in_format("sparsify"), read_format("sparsify")),
    ("sparsify_tensors", "sae.safetensors", "safetensors", in_format("sparsify"), read_format("sparsify")),
    ("gemma_scope_config", "config.json", "json", in_format("gemma_scope"), read_format("gemma_scope")),
    ("gemma_scope_npz", "params.npz", "zip", in_format("gemma_scope"), read_format("gemma_scope")),
    ("package_config", "config.json", "json", in_format("dictionary_learning"), read_format("dictionary_learning")),
    ("package_pickle", "ae.pt", "zip", in_format("dictionary_learning"), read_format("dictionary_learning")),
    ("activations_npy", "acts.npy", "npy", seeds.activations, saved("acts.npy")),
    ("activations_npz", "acts.npz", "zip", seeds.activations, saved("acts.npz")),
    ("activations_pickle", "acts.pt", "zip", seeds.activations, saved("acts.pt")),
    ("activations_tensors", "acts.safetensors", "safetensors", seeds.activations, saved("acts.safetensors")),
    ("harvest_manifest", "manifest.json", "json", seeds.harvest, harvest_manifest),
    ("harvest_unfinished", "manifest.json", "json", _unfinished, harvest_manifest),
    ("harvest_shard", SHARD, "safetensors", seeds.harvest, harvest_shard(SHARD)),
    ("harvest_tokens", f"tokens/{SHARD}", "safetensors", seeds.harvest, harvest_shard(f"tokens/{SHARD}", "tokens")),
    ("zscores", "zscores.safetensors", "safetensors", _zscores, zscores),
    ("corpus_jsonl", "texts.jsonl", "jsonl", seeds.corpora, corpus("texts.jsonl")),
    ("corpus_gzip", "texts.jsonl.gz", "gzip", seeds.corpora, corpus("texts.jsonl.gz")),
    ("corpus_zst", "texts.jsonl.zst", "zst", seeds.corpora, zst),
    ("corpus_txt", "texts.txt", "text", seeds.corpora, corpus("texts.txt")),
    ("corpus_parquet", "texts.parquet", "parquet", seeds.corpora, corpus("texts.parquet")),
    *((f"records_{n}", f"{n}/train.jsonl", "jsonl", _records(n, "jsonl"), records(n, "jsonl")) for n in CORPORA[:4]),
    ("records_parquet", "medqa/train.parquet", "parquet", _records("medqa", "parquet"), records("medqa", "parquet")),
    *REPORT_TARGETS,
]
TARGETS = {row[0]: Target(*row, handmade=HANDMADE.get(row[0], list)) for row in _TABLE}
