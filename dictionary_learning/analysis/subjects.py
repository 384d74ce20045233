"""What is analysed or evaluated: the dictionaries that a command line names, and how their activations are read.

In: a run, the folder of one dictionary or of several in any format known here, or a dictionary on the Hub. Out: the
dictionaries with their hook points, and a `RunConfig` that says by which model, in which contexts and with which rows
left out they were trained, so that what is measured is what they were made for.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dictionary_learning import formats
from dictionary_learning.config import DictionarySpec, RunConfig, SentenceSettings, load_config
from dictionary_learning.demo_args import names_sentence_encoder
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.formats.files import part_of, text, whole
from dictionary_learning.storage import read_json
from dictionary_learning.summary import best_of, read_summary

if TYPE_CHECKING:
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.activations.sentence_encoder import SentenceEncoder
    from dictionary_learning.activations.types import ActivationSource

Site: TypeAlias = "str | tuple[str, str]"  # a hook point, or the input and the output of a transcoder

FRONT, BEST = "front", "best"
DEFAULT_CTX_LEN, DEFAULT_BATCH, DEFAULT_EVAL_TOKENS = 128, 32, 20_000
_TEXT_POINTS = {"sentence_embedding": "text", "token_embeddings": "token"}  # of sentence encoders -> their level


@dataclass(frozen=True)
class Subject:
    """One dictionary. `facts` is what analysis.json says of it, `results` its stored metrics where it has any."""

    name: str
    site: Site
    dictionary: Dictionary
    facts: dict[str, Any]
    results: dict[str, Any] | None

    @property
    def reads(self) -> str:
        """The hook point whose activations it encodes."""
        return self.site if isinstance(self.site, str) else self.site[0]


@dataclass(frozen=True)
class Subjects:
    """Dictionaries of one model.

    config: how their activations are read; its corpus is "" where nobody said one. run: the folder of their run, where
    they lie in one on this disk (and not in the Hub's cache). model_weights: the digest of the model that they were
    trained on, None where nobody noted it.
    """

    dictionaries: list[Subject]
    config: RunConfig
    run: Path | None
    model_weights: str | None

    @property
    def hook_points(self) -> list[str]:
        """What the dictionaries read, each once."""
        return list(dict.fromkeys(subject.reads for subject in self.dictionaries))


def load_subjects(
    source: str | Path,
    *,
    chosen: Sequence[str] = (),
    model_name: str | None = None,
    hook_point: str | None = None,
    ctx_len: int | None = None,
    batch_contexts: int | None = None,
    device: Any = "cpu",
) -> Subjects:
    """The dictionaries that `source` names.

    Args:
        source: a run's folder, the folder of a dictionary or of several, or hf://user/repo[/trainer_3].
        chosen: names of dictionaries, or "front" or "best" by the run's summary; all by default.
        model_name, hook_point, ctx_len: in place of what the configs say, or where they don't.
        batch_contexts: contexts (of a sentence encoder: texts) in one forward; by default those of the run.

    Raises:
        UserError: nothing there, an unknown name, a damaged dictionary, several models, or nobody says which model or
            hook point it is.
    """
    path = Path(source).expanduser()
    name = None
    for option, value in (("ctx_len", ctx_len), ("batch_contexts", batch_contexts)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}.")
    if str(source).startswith("hf://"):
        from dictionary_learning.hub_load import local_folder, parse_reference

        path = local_folder(str(source), None, None)
        name = path.name if (path.parent / "run.json").is_file() else parse_reference(str(source)).repo_id.split("/")[1]
    elif not path.exists():
        beside = list(path.parent.iterdir()) if path.parent.is_dir() else []
        near = [entry.name for entry in beside if _files_in(entry) & {"run.json", "config.json"}]
        raise UserError(
            f"There is no run or dictionary at '{source}': give a folder, or hf://user/repo."
            + did_you_mean(path.name, near)
        )
    run = next((folder for folder in (path, path.absolute().parent) if (folder / "run.json").is_file()), None)
    found = {name or _name_of(where, path): (where, kind) for where, kind in _dictionaries_at(path, run)}
    front = _front(run) if chosen and {FRONT, BEST} & set(chosen) else {}
    names = _chosen(list(found), chosen, front)
    loaded = {name: found[name][1].read(found[name][0]) for name in names}
    configs = {name: config for name, (_, config) in loaded.items()}
    config = load_config(run / "run.json") if run is not None else None
    subjects = [
        _subject(name, dictionary.to(device).eval(), configs[name], found[name][0], hook_point)
        for name, (dictionary, _) in loaded.items()
    ]
    digest = None
    if config is None or run is None:
        config = _config_of(configs, subjects, model_name, ctx_len)
    else:
        recorded = read_json(run / "run.json").get("model")
        digest = text(recorded.get("weights")) if isinstance(recorded, dict) else None
    changed = replace(
        config,
        harvest_contexts=batch_contexts or config.harvest_contexts,
        eval_contexts=batch_contexts or config.eval_contexts,
        model_name=model_name or config.model_name,
        ctx_len=ctx_len or config.ctx_len,
        dictionaries=[
            DictionarySpec(s.facts["architecture"], s.reads, s.dictionary.dict_size, s.facts["sparsity"])
            for s in subjects
        ],
    )
    on_hub = str(source).startswith("hf://")
    return Subjects(subjects, changed, None if on_hub else run, None if model_name else digest)


def weights_digest(dictionary: Dictionary) -> str:
    """What an analysis knows the weights of a dictionary by."""
    digest = hashlib.sha256()
    for key, tensor in sorted(dictionary.state_dict().items()):
        digest.update(f"{key}{tuple(tensor.shape)}".encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def trained_on(run: Path, analysed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of dictionaries of a run whose weights are no longer those that were analysed, by the entries of an
    analysis.json; without those that are gone or can't be read."""
    ours, changed = formats.FORMATS["dictionary_learning"], []
    for entry in analysed:
        folder = run / entry["name"]
        if entry.get("weights") and any(needed <= _files_in(folder) for needed in ours.files):
            with contextlib.suppress(UserError):
                if weights_digest(ours.read(folder)[0]) != entry["weights"]:
                    changed.append(entry["name"])
    return changed


def load_reader(subjects: Subjects, device: Any, loaded: Any = None) -> TracedLM | SentenceEncoder:
    """The model whose activations the dictionaries read; `loaded` is it, where it is in memory already.

    Raises:
        UserError: see `TracedLM.load` and `SentenceEncoder.load`; it is not the one that the run was trained on, and
            was not named by hand; or the dictionaries do not fit their hook points.
    """
    from dictionary_learning import demo, sentence_run

    config = subjects.config
    load: Any = demo.load_model if config.sentence is None else sentence_run.load_encoder
    lm = load(config, device) if loaded is None else loaded
    if subjects.model_weights not in (None, lm.config["weights"]):
        raise UserError(
            f"The weights of '{config.model_name}' are not those that the run was trained on: restore them, or add "
            "--model_name to take this model all the same."
        )
    for subject in subjects.dictionaries:
        sides = (subject.dictionary.activation_dim, subject.dictionary.output_dim)
        places = (subject.site, subject.site) if isinstance(subject.site, str) else subject.site
        for place, width in zip(places, sides, strict=True):
            point = lm.resolve(place)[0]
            if point.width != width:
                raise UserError(
                    f"The dictionary {subject.name} is of width {width}, but '{place}' of {config.model_name} has "
                    f"width {point.width}: it belongs to another hook point or model."
                )
    return lm


def make_source(subjects: Subjects, lm: Any, texts: Any) -> ActivationSource:
    """The activations of a stream of texts at the hook points of the dictionaries, each row with its provenance."""
    from dictionary_learning import sentence_run
    from dictionary_learning.activations.language_model import LanguageModelActivations
    from dictionary_learning.packing import ContextPacker

    config = subjects.config
    if config.sentence is not None:
        return sentence_run.make_source(config, lm, texts, heldout=True)
    return LanguageModelActivations(
        lm,
        ContextPacker(texts, lm.tokenizer, ctx_len=config.ctx_len, batch_contexts=config.harvest_contexts),
        subjects.hook_points,
        remove_special=config.remove_bos,
        max_activation_norm_multiple=config.max_activation_norm_multiple,
        provenance=True,
    )


def unit_of(config: RunConfig) -> str:
    """What a row of activations is: "token", or "text"."""
    return "text" if config.sentence is not None and config.sentence.level == "text" else "token"


def _dictionaries_at(path: Path, run: Path | None) -> list[tuple[Path, formats.Format]]:
    """Folders (or files) of dictionaries with their formats, in the order of their numbers."""
    if run is not None and run == path:
        ours = formats.FORMATS["dictionary_learning"]
        folders = [f for f in path.glob("trainer_*") if any(needed <= _files_in(f) for needed in ours.files)]
        if not folders:
            raise UserError(f"The run in '{path}' has no trained dictionary yet: let it go on with --resume.")
        found = [(folder, ours) for folder in folders]
    else:
        found = [(where, kind) for where, _, kind in formats.find_dictionaries(path)]
        found = [entry for entry in found if entry[0] == path] or found  # without its checkpoints
    return sorted(found, key=lambda entry: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", str(entry[0]))])


def _files_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


def _name_of(where: Path, root: Path) -> str:
    """A dictionary's name: that of its folder, with those above it up to where we looked."""
    if where == root:
        where = where.resolve()
        return (where.parent if where.is_file() else where).name
    return where.relative_to(root).as_posix().replace("/", "_")


def _front(run: Path | None) -> dict[str, list[str]]:
    """What "front" and "best" stand for. Raises UserError where no summary says it."""
    if run is None:
        raise UserError("Only a run has a front: name its folder, or the dictionaries themselves.")
    if not (run / "summary.csv").is_file():
        raise UserError(f"The run in '{run}' has no summary yet, which says which are best: name a dictionary of it.")
    rows = read_summary(run / "summary.csv")
    return {FRONT: [row["trainer"] for row in rows if row["front"]], BEST: [best_of(rows)["trainer"]]}


def _chosen(names: list[str], chosen: Sequence[str], front: dict[str, list[str]]) -> list[str]:
    wanted = {name for word in chosen for name in front.get(word, [word])}
    for name in sorted(wanted - set(names)):
        near = did_you_mean(name, [*names, FRONT, BEST])
        raise UserError(f"There is no dictionary '{name}', but {', '.join(names)}.{near}")
    return [name for name in names if not wanted or name in wanted]


def _subject(name: str, dictionary: Dictionary, config: dict[str, Any], where: Path, hook_point: str | None) -> Subject:
    trainer, buffer = part_of(config, "trainer"), part_of(config, "buffer")
    point = hook_point or text(trainer.get("submodule_name"))
    if point is None:
        raise UserError(
            f"The config of {name} does not say at which hook point its activations are: add --hook_point, such as "
            "resid_post_layer_8."
        )
    site = _site(point, buffer.get("io"), dictionary.is_transcoder)
    stored = where / "eval_results.json"
    results = read_json(stored) if stored.is_file() else None
    facts = {
        "name": name,
        "hook_point": point,
        "layer": whole(trainer.get("layer")),
        "dict_class": type(dictionary).__name__,
        "architecture": text(trainer.get("architecture")) or type(dictionary).__name__,
        "sparsity": _sparsity(trainer),
        "activation_dim": dictionary.activation_dim,
        "dict_size": dictionary.dict_size,
        "weights": weights_digest(dictionary),
    }
    return Subject(name, site, dictionary, facts, results if isinstance(results, dict) else None)


def _sparsity(trainer: dict[str, Any]) -> dict[str, float]:
    """What set the number of active latents, as far as a config of any library says it."""
    known = ("k", "target_l0", "l1_penalty", "sparsity_penalty", "initial_sparsity_penalty")
    said = {key: trainer[key] for key in known if isinstance(trainer.get(key), int | float)}
    return dict(list(said.items())[:1])  # a JumpReLU's config has a target and a penalty: the target it is


def _site(point: str, io: Any, is_transcoder: bool) -> Site:
    """Where a dictionary reads, and writes where that is another place."""
    by_layer = re.fullmatch(r"(mlp|attn)_(?:in|out)_layer_(\d+)", point)
    if is_transcoder:
        if by_layer:
            return f"{by_layer[1]}_in_layer_{by_layer[2]}", f"{by_layer[1]}_out_layer_{by_layer[2]}"
        path = re.sub(r":(in|out)$", "", point)
        return f"{path}:in", path
    named = by_layer or re.search(r"_layer_\d+$|:(in|out)$", point)
    return f"{point}:in" if io == "in" and not named else point


def _config_of(
    configs: dict[str, dict[str, Any]], subjects: list[Subject], model_name: str | None, ctx_len: int | None
) -> RunConfig:
    """How dictionaries outside of a run are read, from their own configs."""
    models = {text(part_of(config, "trainer").get("lm_name")) for config in configs.values()}
    if model_name is None and (len(models) > 1 or None in models):
        known = ", ".join(sorted(filter(None, models)))
        raise UserError(
            f"The dictionaries belong to several models ({known}): choose those of one with --dictionaries."
            if known
            else "The dictionary's config does not say which model it belongs to: add --model_name."
        )
    model = model_name or next(iter(models)) or ""
    buffers = [part_of(config, "buffer") for config in configs.values()]
    lengths = {ctx_len or whole(buffer.get("ctx_len")) or DEFAULT_CTX_LEN for buffer in buffers}
    if len(lengths) > 1:
        raise UserError(f"The dictionaries were trained on contexts of {sorted(lengths)} tokens: say --ctx_len.")
    points = {subject.reads for subject in subjects}
    level = _TEXT_POINTS.get(min(points)) or ("token" if names_sentence_encoder(model) else None)
    multiples = {buffer.get("max_activation_norm_multiple") for buffer in buffers}
    return RunConfig(
        model_name=model,
        corpus="",
        dictionaries=[DictionarySpec("", point, 1, {}) for point in sorted(points)],
        num_tokens=1,
        ctx_len=lengths.pop(),
        harvest_contexts=DEFAULT_BATCH,
        buffer_contexts=1,
        batch_size=1,
        dtype="float32",
        eval_tokens=DEFAULT_EVAL_TOKENS,
        eval_contexts=DEFAULT_BATCH // 2,
        remove_bos=level == "text" or any(buffer.get("remove_bos") is not False for buffer in buffers),
        max_activation_norm_multiple=None if level or len(multiples) > 1 else multiples.pop(),
        sentence=None if level is None else SentenceSettings(level=level),
    )
