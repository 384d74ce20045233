"""The files of an analysis: `AnalysisFolder` writes them, and reads them back for reports, tables and notebooks.

In: `FeatureStatistics`, a table of latents, strings of tokens. Out: plain files that need nothing of this project to be
read (parquet, npy, JSON, safetensors), laid out as docs/analysis.md says. Every file appears whole or not at all, and
`analysis.json` says "complete" only behind the last of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dictionary_learning.analysis.types import Examples, FeatureStatistics, Probes
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.storage import atomic_file, atomic_path, finite, read_json, write_json
from dictionary_learning.untrusted import names_folder, shown

VERSION = 1
RUNNING, COMPLETE = "running", "complete"
INFO, VOCABULARY, TEXTS, STATE = "analysis.json", "vocabulary.json", "texts.json", "state"
FEATURES, EXAMPLES, STATISTICS = "features.parquet", "examples.safetensors", "statistics.safetensors"
DESCRIPTIONS, PROBES = "descriptions.json", "probes.safetensors"

# The columns of features.parquet as pyarrow calls their types; between `status` and `corpus` stand those of
# `PER_CORPUS`, one each for every corpus, where there is more than one.
COLUMNS = {
    "feature": "int32",
    "density": "float64",
    "active": "int64",
    "documents": "int64",
    **dict.fromkeys(("mean", "std", "max", "q10", "q25", "q50", "q75", "q90"), "float64"),
    "status": "string",
    "corpus": "string",
    "coactive": "list<int32>",
    "coactive_jaccard": "list<float64>",
    "top_tokens": "list<string>",
    "top_logits": "list<float64>",
    "bottom_tokens": "list<string>",
    "bottom_logits": "list<float64>",
    "neighbours": "list<int32>",
    "neighbour_cosines": "list<float64>",
    "ablation_loss": "float64",
    "label": "string",
    "label_share": "float64",
}
PER_CORPUS = ("rate", "log2_ratio", "p", "q")  # columns `rate:pubmedqa`, ...

_Read = TypeVar("_Read")


def corpus_columns(corpora: Sequence[str]) -> list[str]:
    """Names of the columns of `PER_CORPUS` for each of the corpora."""
    return [f"{kind}:{corpus}" for corpus in corpora for kind in PER_CORPUS]


class AnalysisFolder:
    """The folder of one analysis. Making one touches no file.

    Raises:
        UserError: from everything that reads, where a file is missing, damaged or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @classmethod
    def open(cls, path: str | Path) -> AnalysisFolder:
        """The complete analysis at `path`, or in the folder `analysis` of the run at `path`.

        Raises:
            UserError: there is none, it is of another version, or it is not complete.
        """
        given = Path(path).expanduser()
        folder = cls(given if (given / INFO).is_file() or not (given / "analysis").is_dir() else given / "analysis")
        if not (folder.path / INFO).is_file():
            raise UserError(f"There is no analysis in '{given}': make one with `sae-factory analyze {given}`.")
        if folder.info["status"] != COMPLETE:
            raise UserError(
                f"The analysis in '{folder.path}' is not complete: the command that began it, given again, goes on."
            )
        return folder

    # ---- reading -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        """What analysis.json says."""
        path = self.path / INFO
        info = read_json(path)
        if not isinstance(info, dict) or "version" not in info:
            raise UserError(f"'{path}' does not describe an analysis: it should hold an object with a version.")
        if info["version"] != VERSION:
            raise UserError(
                f"'{path}' is of version {shown(info['version'])}, not {VERSION}, which this program reads."
            )
        for name, kind in (("status", str), ("settings", dict), ("unit", str), ("dictionaries", list)):
            if not isinstance(info.get(name), kind):
                raise UserError(f"'{path}' is damaged: its '{name}' should be a {kind.__name__}.")
        if not all(isinstance(entry, dict) and _is_name(entry.get("name")) for entry in info["dictionaries"]):
            raise UserError(f"'{path}' is damaged: each of its dictionaries should have the name of a folder.")
        return info

    @property
    def names(self) -> list[str]:
        """Of the dictionaries that were analysed."""
        return [entry["name"] for entry in self.info["dictionaries"]]

    def table(self, name: str) -> dict[str, np.ndarray]:
        """The columns of features.parquet: arrays of F; those of strings and of lists hold Python objects."""
        import pyarrow

        from dictionary_learning.parquet_files import parquet_columns

        path, types = self.folder(name) / FEATURES, {column: _arrow(kind) for column, kind in COLUMNS.items()}
        table = _readable(path, lambda file: parquet_columns(file, types, pyarrow.float64()))
        return {column: _as_numpy(table.column(column)) for column in table.column_names}

    def examples(self, name: str) -> tuple[Examples, Examples]:
        """(top activating places, samples from each quantile) of all latents."""
        arrays, _ = self._arrays(name, EXAMPLES, [f"{kind}.{short}" for kind in _KINDS for short in _EXAMPLE_ARRAYS])
        top, samples = (Examples(*(arrays[f"{kind}.{short}"] for short in _EXAMPLE_ARRAYS)) for kind in _KINDS)
        for part in (top, samples):
            dtypes = [array.dtype for array in part]
            dims = [array.shape[:2] + array.shape[3:] for array in part]  # F and E, and nothing behind W
            if dtypes != _EXAMPLE_DTYPES or set(dims) != {part.value_FE.shape} or part.value_FE.ndim != 2:
                raise UserError(f"'{self.path / name / EXAMPLES}' is damaged: its arrays are not those of examples.")
            if part.token_FEW.ndim != 3 or part.token_FEW.shape != part.act_FEW.shape:
                raise UserError(f"'{self.path / name / EXAMPLES}' is damaged: its windows do not fit.")
        return top, samples

    def statistics(self, name: str) -> FeatureStatistics:
        """All that was measured, examples included."""
        arrays, facts = self._arrays(name, STATISTICS, _ARRAYS)
        top, samples = self.examples(name)
        measured: dict[str, Any] = {field: arrays[field] for field in _ARRAYS}
        kinds = {name: type(value) for name, value in facts.items()} if isinstance(facts, dict) else {}
        if kinds != {"rows": int, "documents": int, "corpora": list}:
            raise UserError(f"'{self.path / name / STATISTICS}' is damaged: it does not say what was counted.")
        return FeatureStatistics(**facts, **measured, top=top, samples=samples, probes=self.probes(name))

    def probes(self, name: str) -> Probes | None:
        """Places at random with the latents that fire around them; None where the analysis kept none."""
        if not (self.folder(name) / PROBES).is_file():
            return None
        arrays, _ = self._arrays(name, PROBES, Probes._fields)
        probes = Probes(*(arrays[field] for field in Probes._fields))
        if probes.fired_RF.ndim != 2 or len({array.shape[:1] for array in probes}) > 1:
            raise UserError(f"'{self.path / name / PROBES}' is damaged: its arrays are not of one number of places.")
        return probes

    def vocabulary(self) -> dict[int, str]:
        """Token id -> its string, of every token in a kept example or a logit effect; of whole texts none."""
        return _numbered(self.path / VOCABULARY)

    def texts(self) -> dict[int, dict[str, Any]]:
        """Document -> {"corpus", "text"} of the kept examples, where the unit is a whole text; else none."""
        return _numbered(self.path / TEXTS)

    def descriptions(self, name: str) -> dict[int, dict[str, Any]]:
        """Latent -> its description; none before `sae-factory describe` ran."""
        return _numbered(self.folder(name) / DESCRIPTIONS)

    def folder(self, name: str) -> Path:
        """Where the files of a dictionary are. Raises UserError for one that was not analysed."""
        if name not in self.names:
            run = self.path.parent
            more = (
                f"; add it with `sae-factory analyze {run} --dictionaries {' '.join([*self.names, name])} --overwrite`."
                if (run / name / "config.json").is_file() and (run / "run.json").is_file()
                else "." + did_you_mean(name, self.names)
            )
            raise UserError(
                f"The analysis in '{self.path}' has no dictionary '{name}', but {', '.join(self.names) or 'none'}{more}"
            )
        return self.path / name

    def _arrays(self, name: str, file: str, wanted: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays of a safetensors file, and the facts beside them."""
        from safetensors import safe_open

        path = self.folder(name) / file

        def read(file_path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            with safe_open(file_path, framework="numpy") as opened:
                facts = json.loads((opened.metadata() or {}).get("facts", "{}"))
                return {key: opened.get_tensor(key) for key in opened.keys()}, facts

        arrays, facts = _readable(path, read)
        if missing := [key for key in wanted if key not in arrays]:
            raise UserError(f"'{path}' lacks the array {missing[0]}: it is damaged, or not of an analysis.")
        return arrays, facts

    # ---- writing -------------------------------------------------------------------------------------------------

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Write analysis.json; `version` is added."""
        plain = finite({"version": VERSION, **info})
        write_json(self.path / INFO, plain)
        self.info = plain

    def write_statistics(self, name: str, statistics: FeatureStatistics) -> None:
        """Write what was measured of a dictionary: statistics, examples, and fire_rate_NAME.npy."""
        folder = self.folder(name)
        facts = {"rows": statistics.rows, "documents": statistics.documents, "corpora": statistics.corpora}
        _write_arrays(folder / STATISTICS, {field: getattr(statistics, field) for field in _ARRAYS}, facts)
        named = {
            f"{kind}.{short}": array
            for kind, examples in zip(_KINDS, (statistics.top, statistics.samples), strict=True)
            for short, array in zip(_EXAMPLE_ARRAYS, examples, strict=True)
        }
        _write_arrays(folder / EXAMPLES, named, {})
        if statistics.probes is not None:
            _write_arrays(folder / PROBES, statistics.probes._asdict(), {})
        with atomic_path(folder / f"fire_rate_{name}.npy") as path, path.open("wb") as handle:
            np.save(handle, statistics.density_F)

    def write_table(self, name: str, columns: Mapping[str, Any], corpora: Sequence[str]) -> None:
        """Write features.parquet: every one of `COLUMNS`, and of two corpora or more theirs.

        Raises:
            ValueError: a column is missing or unknown.
        """
        import pyarrow
        import pyarrow.parquet as parquet

        several = corpus_columns(corpora) if len(corpora) > 1 else []
        before = list(COLUMNS).index("corpus")
        kinds = list(COLUMNS.items())
        types = dict([*kinds[:before], *((column, "float64") for column in several), *kinds[before:]])
        if set(types) != set(columns):
            raise ValueError(f"the columns differ from the layout in {sorted(set(types) ^ set(columns))}")
        arrays = {column: pyarrow.array(_plain(columns[column]), type=_arrow(kind)) for column, kind in types.items()}
        with atomic_path(self.folder(name) / FEATURES) as path:
            parquet.write_table(pyarrow.table(arrays), path, compression="zstd")

    def write_top_activations(
        self,
        name: str,
        top: Examples,
        corpora: Sequence[str],
        strings: Mapping[int, str],
        text_of: Callable[[int, list[int]], str],
    ) -> None:
        """Write top_activations_NAME.json: {latent: [its examples, the best first]}, of latents that have any.

        Args:
            strings: token id -> string. text_of: (document, token ids of the window) -> what to show as the text.
        """
        whole = top.token_FEW.shape[-1] == 0
        value_FE, act_FEW = _four_digits(top.value_FE), _four_digits(top.act_FEW)
        with atomic_file(self.folder(name) / f"top_activations_{name}.json") as handle:
            separator = "{"
            for feature in np.flatnonzero((top.document_FE >= 0).any(axis=1)).tolist():
                entries = []
                for place in np.flatnonzero(top.document_FE[feature] >= 0).tolist():
                    document = int(top.document_FE[feature, place])
                    inside = top.token_FEW[feature, place] >= 0
                    tokens = top.token_FEW[feature, place][inside].tolist()
                    entry = {
                        "activation": float(value_FE[feature, place]),
                        "corpus": corpora[top.corpus_FE[feature, place]],
                        "document": document,
                        "position": int(top.position_FE[feature, place]),
                        "text": text_of(document, tokens),
                    }
                    if not whole:
                        entry["tokens"] = [strings[token] for token in tokens]
                        entry["activations"] = act_FEW[feature, place][inside].tolist()
                    entries.append(entry)
                handle.write(f'{separator}\n"{feature}": {json.dumps(entries, allow_nan=False)}')
                separator = ","
            handle.write("\n}\n" if separator == "," else "{}\n")

    def write_vocabulary(self, strings: Mapping[int, str]) -> None:
        """Write vocabulary.json."""
        write_json(self.path / VOCABULARY, {str(token): strings[token] for token in sorted(strings)})

    def write_texts(self, texts: Mapping[int, Mapping[str, Any]]) -> None:
        """Write texts.json."""
        write_json(self.path / TEXTS, {str(document): texts[document] for document in sorted(texts)})

    def write_descriptions(self, name: str, descriptions: Mapping[int, Mapping[str, Any]]) -> None:
        """Write descriptions.json."""
        numbered = {str(feature): finite(descriptions[feature]) for feature in sorted(descriptions)}
        write_json(self.folder(name) / DESCRIPTIONS, numbered)


_KINDS = ("top", "sample")
_EXAMPLE_ARRAYS = [name.rpartition("_")[0] for name in Examples._fields]  # value_FE is kept as top.value
_EXAMPLE_DTYPES = [np.dtype(name) for name in ("float32", "int64", "int32", "int16", "int32", "float32", "int16")]
_ARRAYS = [
    field.name
    for field in dataclasses.fields(FeatureStatistics)
    if field.name not in ("rows", "documents", "corpora", "top", "samples", "probes")
]


def _is_name(name: Any) -> bool:
    """Whether it can name the folder of a dictionary: what stands in analysis.json decides where we write."""
    return names_folder(name) and name != STATE


def _readable(path: Path, read: Callable[[Path], _Read]) -> _Read:
    """Raises UserError in place of what the libraries raise for a file that is absent or damaged."""
    if not path.is_file():
        raise UserError(f"The analysis lacks '{path}': it is not complete, or the file was removed.")
    try:
        return read(path)
    except Exception as error:  # pyarrow, safetensors and json each have errors of their own; all mean the same
        why = f"{type(error).__name__}: {shown(error, 200)}"
        raise UserError(f"'{path}' can't be read ({why}): it is damaged, or not of an analysis.") from error


def _numbered(path: Path) -> dict[int, Any]:
    """A JSON object whose keys are numbers; an empty one where there is no such file."""
    if not path.exists():
        return {}
    data = read_json(path)
    try:
        return {int(key): finite(value) for key, value in data.items()}
    except (AttributeError, ValueError) as error:
        raise UserError(f"'{path}' is damaged: it should be an object whose keys are numbers.") from error


def _as_numpy(column: Any) -> np.ndarray:
    """A column of a parquet file: [F] numbers, or [F] Python objects for strings and lists."""
    import pyarrow

    if pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type):
        return column.to_numpy()
    return np.fromiter(column.to_pylist(), dtype=object, count=len(column))


def _plain(values: Any) -> Any:
    """What pyarrow takes: an array of numbers as it is, of objects as a list."""
    return values if isinstance(values, np.ndarray) and values.dtype != object else list(values)


def _arrow(kind: str) -> Any:
    """The pyarrow type that `COLUMNS` spells as it prints itself."""
    import pyarrow

    inner = kind.removeprefix("list<").removesuffix(">")
    return getattr(pyarrow, inner)() if inner == kind else pyarrow.list_(getattr(pyarrow, inner)())


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with atomic_path(path) as name:  # one key of metadata: several would be written in any order
        save_file(plain, name, metadata={"facts": json.dumps(facts)})


def _four_digits(values: np.ndarray) -> np.ndarray:
    """float64, rounded to four significant digits: enough to look at, and a third of the bytes in JSON."""
    exact = values.astype(np.float64)
    digits = 3 - np.floor(np.log10(np.where(exact == 0, 1, np.abs(exact))))
    scale = 10.0 ** np.abs(digits)  # whole, so that 0.1234 comes out as such
    return np.where(digits >= 0, np.round(exact * scale) / scale, np.round(exact / scale) * scale)
