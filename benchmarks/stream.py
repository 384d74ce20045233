"""End to end: the model's forward, the buffer and the dictionaries, beside the bare harvest and the peers' streams.

All streams run in turns on the same model shape (random weights; speed does not depend on them) and the same texts:
ours in fp32 and with bf16 harvest and encoder; dictionary-learning's buffer with its `trainSAE`; SAELens's multi-SAE
runner. A turn covers whole refills of every buffer, so that none is favoured by where it stands.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.plots import bars
from benchmarks.results import Report, Table, skipped_remarks
from benchmarks.turns import Entry, Workers, rate, rate_ratio, take_turns

HARVEST = "ours, harvest only"
BUFFER_BATCHES = {"ours": 8, "dictionary-learning": 8, "sae-lens": 10}
"""Batches that a buffer holds. The peers refill by halves: with these sizes both do so every five batches."""
TURN_BATCHES = 5


@dataclass
class Options:
    """Model, sizes and repetitions of the stream benchmark."""

    layer: int = 8
    m: int = 6144
    k: int = 32
    batch: int = 2048
    ctx_len: int = 128
    contexts: int = 16
    """Contexts a forward."""
    dictionaries: list[int] = field(default_factory=lambda: [1, 4, 16])
    peer_dictionaries: list[int] = field(default_factory=lambda: [1, 4])
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    device: str = "cpu"
    shape: dict[str, int] = field(default_factory=dict)
    """Fields of GPT-2 small's configuration to change, such as n_layer."""
    peers: list[str] = field(default_factory=lambda: ["dictionary-learning", "sae-lens"])
    rounds: int = 4
    refills: int = 2
    """Of the peers' buffers in a turn."""

    def quick(self) -> Options:
        return Options(**vars(self) | {"rounds": 1, "refills": 1})


def write_texts(folder: str, options: Options) -> tuple[str, str]:
    """(tokenizer folder, file of texts): the embedded corpus cut into pieces a little longer than a context, so that
    those who truncate a text to a context tokenise as little as those who pack."""
    from transformers import AutoTokenizer

    from data_prep.embedded import MODEL_DIR
    from dictionary_learning.corpus import TextStream, open_corpus

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    ids: list[int] = []
    for text in TextStream(open_corpus("embedded"), epochs=1, seed=0):
        ids += tokenizer(text.text, verbose=False)["input_ids"]
        if len(ids) > 400 * options.ctx_len:
            break
    length = options.ctx_len + 12
    pieces = [tokenizer.decode(ids[at : at + length]) for at in range(0, len(ids) - length, length)]
    path = Path(folder) / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return str(MODEL_DIR), str(path)


def measure(options: Options, threads: int | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        entries = contestants(options, *write_texts(folder, options))
        with Workers(threads) as workers:
            return {"entries": take_turns(workers, entries, options.rounds, first=TURN_BATCHES, warm=0)}


def contestants(options: Options, tokenizer: str, texts: str) -> list[Entry]:
    common: dict[str, Any] = {"tokenizer": tokenizer, "texts": texts, "device": options.device, "shape": options.shape}
    for name in ("m", "k", "batch", "contexts", "ctx_len", "layer"):
        common[name] = getattr(options, name)
    entries = []
    for dtype in options.dtypes:
        for who in ("ours", *options.peers):
            counts: list[int | None] = [None, *options.dictionaries] if who == "ours" else [*options.peer_dictionaries]
            for count in counts:
                given = common | {"dictionaries": count, "dtype": dtype}
                given["buffer_contexts"] = BUFFER_BATCHES[who] * options.batch // options.ctx_len
                if who == "ours" and dtype == "bfloat16" and count is not None:
                    given["encoder_dtype"] = "bf16"
                name = name_of(who, count, dtype)
                entries.append(Entry(name, who, "stream", given, TURN_BATCHES * options.refills))
    return entries


def name_of(who: str, dictionaries: int | None, dtype: str) -> str:
    what = "harvest only" if dictionaries is None else f"{dictionaries} TopK" if dictionaries else "buffer only"
    return f"{who}, {what}" + (", bf16" if dtype == "bfloat16" else "")


def report(data: dict[str, Any], options: dict[str, Any]) -> Report:
    measured = {entry["name"]: entry for entry in data["entries"] if not entry.get("skipped")}
    peers = options["peers"]
    rows = []
    for name, entry in measured.items():
        dtype, count = entry["options"]["dtype"], entry["options"]["dictionaries"]
        bare = measured.get(name_of("ours", None, dtype))
        cells = [name, f"{rate(entry):,.0f}", f"{rate_ratio(entry, bare):.3f}" if bare else "–"]
        for peer in peers:
            beside = [measured.get(name_of(peer, count, kind)) for kind in ("float32", dtype)]
            if entry["who"] != "ours" or not count or beside[0] is None:
                cells.append("–")
                continue
            same = f" ({rate_ratio(entry, beside[1]):.2f}x its bf16)" if dtype != "float32" and beside[1] else ""
            cells.append(f"{rate_ratio(entry, beside[0]):.2f}x{same}")
        rows.append(cells)
    shape = {"n_layer": 12, "n_embd": 768} | options["shape"]
    title = (
        f"GPT-2 shape ({shape['n_layer']} layers, d = {shape['n_embd']}), random weights, layer {options['layer']}, "
        f"m = {options['m']:,}, k = {options['k']}, B = {options['batch']:,}, context {options['ctx_len']}, "
        f"{options['device']}. bf16: of ours the model and the encoder's product, of dictionary-learning the model, "
        "of sae-lens its autocast of the model."
    )
    columns = [
        "stream",
        "activations/s",
        "of our harvest alone",
        *(f"times {peer} with as many (fp32)" for peer in peers),
    ]
    return Report(
        "The stream, end to end", [Table(title, columns, rows)], skipped_remarks(data["entries"]), ["stream.svg"]
    )


def plot(data: dict[str, Any], folder: Path) -> None:
    groups: dict[str, dict[str, float]] = {}
    for entry in data["entries"]:
        if not entry.get("skipped"):
            groups.setdefault(entry["options"]["dtype"], {})[entry["name"]] = rate(entry)
    bars(folder / "stream.svg", groups, "activations/s")
