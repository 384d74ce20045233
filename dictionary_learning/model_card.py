"""The README.md of a pushed run, for a reader who has never seen the run; and the picture in it.

In: run.json, the rows of summary.csv, what is pushed. Out: Markdown with the YAML header that the Hub reads, and a PNG.
The same run gives the same bytes. Names of corpora, models and hook points can hold anything, so each is escaped for
the place where it stands.
"""

from __future__ import annotations

import inspect
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dictionary_learning.config import RunConfig
from dictionary_learning.dictionary import AutoEncoderGroupMax, Dictionary

TEXT_CHARACTERS = 200  # of a name from outside; longer ones are cut
MAX_PANELS = 6  # hook points in the picture
IMAGE = "front.png"
COLUMNS = (  # of the table of results: heading, name in summary.csv, format
    ("L0", "l0", ".1f"),
    ("variance explained", "frac_variance_explained", ".4f"),
    ("loss recovered", "frac_recovered", ".4f"),
    ("KL", "kl", ".4f"),
    ("alive", "frac_alive", ".3f"),
)
LIMITS = """\
For research on what language models compute. A latent is a direction in the activations of one model at one place. That
it fires on text about a disease or a drug makes it neither a definition nor a detector of it, and says nothing about a
patient: do not use these dictionaries, or descriptions of their latents, for diagnosis, treatment or any other clinical
decision, nor to screen people or records.

- {corpus}Frequent conditions have many latents, rare ones few or none; biases of the corpus and of the model are in the
  latents too.
- The results are from held-out text of the same corpus. On other text, expect less.
- A reconstruction loses part of what the model uses: see *loss recovered* and *KL*. What it loses, no latent shows.
- Another seed or width finds other latents. Check a finding on more than one dictionary, and by intervention.
- A latent can still show phrases of the corpus through the texts that it fires on."""

MEDICAL = ("embedded", "medical_qa")  # corpora of the project
EXAMINATIONS = "The corpus is English examination and research questions, not clinical notes. "
OURS = {  # what comes with the project, by its name in the settings
    "model_name": "SAE Factory's embedded model, a small GPT-2 trained on medical questions",
    "corpus": "SAE Factory's sample records of medical questions",
}


@dataclass(frozen=True)
class CardFacts:
    """What the card tells.

    record: run.json. rows: summary.csv along the front. best: name of the best dictionary. pushed: names of those in
    the repository. local: settings (`corpus`, `model_name`) that named something on the disk of who trained. image:
    whether `front.png` is there.
    """

    repo_id: str
    config: RunConfig
    record: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    best: str
    pushed: Sequence[str]
    local: Sequence[str]
    image: bool


def model_card(facts: CardFacts) -> str:
    """README.md."""
    points = ", ".join(code(name) for name in facts.config.hook_points)
    only = "" if len(facts.pushed) == len(facts.rows) else f" Of the sweep, only {code(facts.pushed[0])} is here."
    parts = [
        _header(facts),
        f"# Sparse dictionaries of {_title(facts.config)}",
        f"Sparse autoencoders for the activations at {points} of {_named(facts.config, 'model_name')}. Each activation "
        f"becomes a sparse sum of learned directions. Trained with SAE Factory.{only}",
        markdown_table([["", ""], *_facts(facts)]),
        _architectures(facts),
        "## Results",
        _results(facts),
        "## Load",
        _loading(facts),
        "## Reproduce",
        _reproduction(facts),
        "## Corpus and licences",
        _corpus(facts),
        "## Intended use and limits",
        LIMITS.format(corpus=EXAMINATIONS if facts.config.corpus in MEDICAL else ""),
    ]
    return "\n\n".join(parts) + "\n"


def _header(facts: CardFacts) -> str:
    import yaml

    header: dict[str, Any] = {
        "library_name": "sae-factory",
        "tags": ["sparse-autoencoder", "dictionary-learning", "mechanistic-interpretability"],
    }
    if facts.config.corpus in MEDICAL:
        header |= {"tags": [*header["tags"], "medical"], "language": ["en"]}
    if facts.config.model_name == "embedded":
        header["license"] = "mit"
    elif "model_name" not in facts.local and is_hub_name(facts.config.model_name):
        header["base_model"] = facts.config.model_name
    if datasets := [name for name, _, on_hub in _sources(facts.config.corpus) if on_hub]:
        header["datasets"] = datasets
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=False)}---"


def _facts(facts: CardFacts) -> list[list[str]]:
    config, record = facts.config, facts.record
    widths = sorted({spec.width for spec in config.dictionaries})
    architectures = list(dict.fromkeys(spec.architecture for spec in config.dictionaries))
    tokens = record.get("tokens_done")
    status = "" if record.get("status") == "complete" else " (the text ended before the run did)"
    return [
        ["model", _named(config, "model_name")],
        ["hook points", ", ".join(code(name) for name in config.hook_points)],
        ["corpus", _named(config, "corpus")],
        ["dictionaries", f"{len(config.dictionaries)}: {', '.join(code(name) for name in architectures)}"],
        ["latents of a dictionary", ", ".join(f"{width:,}" for width in widths)],
        ["trained on", f"{tokens if isinstance(tokens, int) else config.num_tokens:,} activations{status}"],
        ["texts", f"one embedding a text, cut at {config.ctx_len} tokens"]
        if config.rows_per_context == 1
        else ["context", f"{config.ctx_len} tokens, special tokens {'left out' if config.remove_bos else 'included'}"],
        ["best dictionary", code(facts.best)],
    ]


def _architectures(facts: CardFacts) -> str:
    """What each architecture of the run computes, as its class says it."""
    rows = []
    for name in dict.fromkeys(spec.architecture for spec in facts.config.dictionaries):
        said = " ".join((inspect.getdoc(_dictionary_class(name)) or "").partition("\n\n")[0].split())
        rows.append([code(name), escaped(said)])
    return markdown_table([["architecture", "codes f and reconstruction x\\_hat of an activation x"], *rows])


def _dictionary_class(architecture: str) -> type[Dictionary]:
    """The class of the dictionaries that a run's architecture trains."""
    from dictionary_learning.trainers import trainer_class

    return inspect.signature(trainer_class(architecture)).parameters["dict_class"].default


def _results(facts: CardFacts) -> str:
    head = ["", "dictionary", "architecture", "sparsity", "latents", "hook point", *(name for name, _, _ in COLUMNS)]
    rows = [
        [
            "*" if row["front"] else "",
            code(row["trainer"]),
            code(row["architecture"]),
            plain(row["sparsity"]),
            plain(row["width"]),
            code(row["hook_point"]),
            *("–" if row.get(key) is None else format(row[key], form) for _, key, form in COLUMNS),
        ]
        for row in facts.rows
    ]
    text = [
        f"On {facts.rows[0]['tokens']:,} held-out activations, by hook point and L0; a * marks the front: no other "
        "dictionary of its hook point is as sparse and recovers as much of the loss. The best is the one on the front "
        "that recovers the most.",
        markdown_table([head, *rows]),
        "*L0*: mean number of active latents. *Loss recovered*: how far the reconstruction in place of the activation "
        "brings the model's loss back, from 0 (the activation set to zero) to 1 (untouched). *KL*: from the untouched "
        "model's predictions, in nats a token. *Alive*: share of latents that fired.",
    ]
    if facts.image:
        text.append(f"![Loss recovered by L0, a line an architecture; the best dictionary is ringed]({IMAGE})")
    return "\n\n".join(text)


def _loading(facts: CardFacts) -> str:
    name = facts.best
    architecture = next(row["architecture"] for row in facts.rows if row["trainer"] == name)
    other, where, load = (  # SAELens holds them all but for this one
        ("sparsify", "sparsify", "from sparsify import SparseCoder\nsae = SparseCoder")
        if _dictionary_class(architecture) is AutoEncoderGroupMax
        else ("SAELens", "saelens", "from sae_lens import SAE\nsae = SAE")
    )
    return f"""\
```python
from dictionary_learning import load_dictionary
dictionary, config = load_dictionary("hf://{facts.repo_id}/{name}")  # "hf://{facts.repo_id}" is the best
codes = dictionary.encode(activations)  # raw activations [..., d] of the hook point -> codes [..., latents]
```

Pin a version with `revision="..."`. Every file is checked against `checksums.json` as it is loaded. In {other}:

```bash
hf download {facts.repo_id} --local-dir run && sae-factory export run --format {where} --out {where}
```

```python
{load}.load_from_disk("{where}/{name}")
codes = sae.encode(activations)
```"""


def _reproduction(facts: CardFacts) -> str:
    versions = facts.record.get("versions") or {}
    shown = ", ".join(f"{plain(name)} {plain(version)}" for name, version in versions.items())
    local = [f"--{name} {shlex.quote('PATH/TO/' + last_part(getattr(facts.config, name)))}" for name in facts.local]
    command = " ".join(["sae-factory train --config run.json --save_dir runs/again", *map(one_line, local)])
    revision = facts.record.get("git_revision")
    fingerprint = facts.record.get("corpus_fingerprint")
    made = [f"Made with {shown or 'unknown versions'}"]
    made += [f"revision {code(revision)}"] if revision else []
    made += [f"on a corpus with the fingerprint {code(fingerprint)}"] if fingerprint else []
    return f"""\
```bash
pip install sae-factory
hf download {facts.repo_id} run.json --local-dir .
{command}
```

{", ".join(made)}. `run.json` holds every setting, each dictionary's `config.json` its own, and `eval_results.json` the
numbers above, which the saved weights give again."""


def _corpus(facts: CardFacts) -> str:
    rows = [
        [f"[{plain(name)}](https://huggingface.co/datasets/{name})" if on_hub else plain(name), plain(licence)]
        for name, licence, on_hub in _sources(facts.config.corpus)
    ]
    return markdown_table([["text from", "licence"], *rows]) + (
        "\n\nThe dictionaries derive from the language model as well: what its licence asks of works made with it "
        "holds for them. They hold no text of the corpus."
    )


def _sources(corpus: str) -> list[tuple[str, str, bool]]:
    """(name, licence, whether it is a data set on the Hub) of what the corpus consists of."""
    from data_prep.sources import CORPORA

    if corpus == "embedded":
        return [(OURS["corpus"], "MIT", False)]
    if corpus == "medical_qa":
        return [(spec.hub_path, spec.licence, True) for spec in CORPORA.values()]
    if corpus.startswith("hf://"):
        name = corpus.removeprefix("hf://")
        return [(name, "see its page", is_hub_name(name))]
    return [(corpus, "a local corpus: not known", False)]


# ---------------------------------------------------------------------------------------------- names from outside


def _title(config: RunConfig) -> str:
    return (
        OURS["model_name"].partition(",")[0] if config.model_name == "embedded" else plain(last_part(config.model_name))
    )


def _named(config: RunConfig, setting: str) -> str:
    """The model or the corpus as the card calls it."""
    value = getattr(config, setting)
    return OURS[setting] if value == "embedded" else code(value)


def one_line(text: object) -> str:
    """On one line, printable, and not longer than `TEXT_CHARACTERS`."""
    line = "".join(char if char.isprintable() else " " for char in " ".join(str(text).split()))
    return line if len(line) <= TEXT_CHARACTERS else line[: TEXT_CHARACTERS - 1] + "…"


def plain(text: object) -> str:
    """As Markdown text that reads as it is written: no link, no HTML, no emphasis, no table cell."""
    return escaped(one_line(text))


def escaped(line: str) -> str:
    """A line with what Markdown would take for its own escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#!|~&$:@]|(?<=www)\.)", r"\\\1", line)


def code(text: object) -> str:
    """As a code span, also within a table."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', '¦').strip() or ' '}`"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of finished Markdown, the first the heading."""
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rest])


def is_hub_name(name: str) -> bool:
    """Whether a name is spelt as one of the Hub's: `name` or `owner/name`."""
    return re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None


def last_part(name: str) -> str:
    """The file or folder that a path ends in."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name


# ---------------------------------------------------------------------------------------------- the picture


def front_image(rows: Sequence[Mapping[str, Any]], best: str) -> bytes | None:
    """Quality by L0 as a PNG, a panel a hook point (`MAX_PANELS` at most); None without matplotlib.

    Quality is the loss recovered where every row has it, else the variance explained.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
        from matplotlib.ticker import LogLocator
    except ImportError:
        return None
    recovered = all(row.get("frac_recovered") is not None for row in rows)
    quality = "frac_recovered" if recovered else "frac_variance_explained"
    points = list(dict.fromkeys(row["hook_point"] for row in rows))[:MAX_PANELS]
    figure = Figure(figsize=(4.2 * len(points) + 0.8, 3.8), dpi=110, layout="constrained")
    for index, (point, axes) in enumerate(zip(points, figure.subplots(1, len(points), squeeze=False)[0], strict=True)):
        here = [row for row in rows if row["hook_point"] == point and row.get(quality) is not None]
        for number, name in enumerate(dict.fromkeys(row["architecture"] for row in rows)):
            xy = [(row["l0"], row[quality]) for row in here if row["architecture"] == name]
            marker = "osD^vPX"[number % 7]
            axes.plot([x for x, _ in xy], [y for _, y in xy], marker=marker, color=f"C{number % 10}", label=name)
        for row in here:
            if row["trainer"] == best:
                axes.plot(row["l0"], row[quality], "o", markersize=14, fillstyle="none", color="black")
        if all(row["l0"] > 0 for row in here):
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.set_title(one_line(point)[:60], fontsize=10, parse_math=False)
        axes.set_xlabel("L0 (active latents)")
        if index == 0:
            axes.set_ylabel("loss recovered" if recovered else "variance explained")
            axes.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
