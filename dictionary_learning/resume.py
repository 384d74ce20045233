"""What must stay as it was for a resumed run to be the same run, and what a longer run takes over from the shorter.

In: settings as a run recorded them, and those it is to go on with. Out: what differs, field by field, for a refusal
that names it; and the settings that a trainer derives from the length of its run, as they were when it began.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dictionary_learning.errors import UserError

# What a trainer derives from `steps` where it is not given. A run that is made longer keeps them as it began with them,
# but for the decay (`decay_start`, and the whole of "linear" and "cosine"), which is laid anew.
FROM_LENGTH = (
    *("lr", "warmup_steps", "sparsity_warmup_steps", "threshold_start_step", "anneal_start", "anneal_end"),
    "n_sparsity_updates",
)
INDIFFERENT = ("device", "lm_name", "wandb_name", "dead_after_tokens")  # to what a trainer computes; the last is state
SHOWN = 6  # differences that a refusal names


class Difference(NamedTuple):
    """A field (`dictionaries[3].lr`), what it was and what it is."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.old)} -> {_short(self.new)}"


def differences(old: Any, new: Any, field: str = "") -> list[Difference]:
    """Where two plain values (of JSON) differ, as deep down as they can be compared."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = list(dict.fromkeys([*old, *new]))
        below = [(f"{field}.{name}" if field else str(name), old.get(name), new.get(name)) for name in names]
    elif _plain(old) == _plain(new):
        return []
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        below = [(f"{field}[{index}]", a, b) for index, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [Difference(field, old, new)]
    return [difference for name, a, b in below for difference in differences(a, b, name)]


def refuse(what: str, found: Iterable[Difference], override: bool) -> list[str]:
    """The differences as text, where `override` allows them.

    Raises:
        UserError: there are some, and nothing allows them: names each.
    """
    named = [str(difference) for difference in found]
    if named and not override:
        more = f"; and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        raise UserError(
            f"{what} began with other settings ({'; '.join(named[:SHOWN])}{more}): resume it with the same, or add "
            "--override (override=True) to go on with what would not be the same run."
        )
    return named


def trainer_differences(old: Mapping[str, Any], new: Mapping[str, Any], field: str) -> list[Difference]:
    """Of two trainers' settings, what changes what is computed. More steps are a longer run, not another one."""
    apart = {*INDIFFERENT, "steps"} | ({"decay_start"} if old["steps"] != new["steps"] else set())
    before, now = ({name: value for name, value in side.items() if name not in apart} for side in (old, new))
    return differences(before, now, field)


def carried_settings(began: Mapping[str, Any] | None, cls: type) -> dict[str, Any]:
    """Of the settings that a trainer began with, those that another length would give it differently by default."""
    if not began:
        return {}
    takes = inspect.signature(cls).parameters
    named = {name for name in FROM_LENGTH if name in takes or _passed_on(cls, name)}
    return {name: began[name] for name in FROM_LENGTH if name in named and began.get(name) is not None}


def _passed_on(cls: Any, name: str) -> bool:
    return name in cls.argument_names() if hasattr(cls, "argument_names") else False


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
