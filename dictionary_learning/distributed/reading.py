"""What the first rank reads, and all ranks are told: so every record of a corpus is read once.

In: on the first rank, an iterator with a state (texts, token contexts). Out: on every rank its items, some at a time;
on the first one also the iterator's state behind each, since it reads further than was handed out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dictionary_learning.distributed.ranks import OfAllRanks, Ranks
from dictionary_learning.errors import UserError
from dictionary_learning.stopping import StoppedWaiting


class ReadByFirst:
    """Tells all ranks what the first one reads from `source`.

    Args:
        source: of every rank alike; only the first rank's is asked.
        worth: whether an item is to be handed out, of those read.
    """

    def __init__(self, ranks: Ranks, source: Any, worth: Callable[[Any], bool] = lambda item: True) -> None:
        self.ranks, self.source, self._worth = ranks, source, worth
        self._problem: UserError | None = None  # met when reading ahead: it belongs behind the items read before it

    def items(self, count: int) -> list[tuple[Any, Any]]:
        """The next (item, state of `source` behind it), at most `count`; the state is None but on the first rank.

        Raises:
            StopIteration: `source` is at its end.
            UserError: the first rank can't read it.
            StoppedWaiting: the first rank was asked to end while it waited for it: on all ranks, at the same place.
        """
        items, states, problem = self._read(count) if self.ranks.first else ([], [], None)
        items, problem = self.ranks.of_first((items, problem))
        if not items and isinstance(problem, StoppedWaiting):
            raise problem
        if not items and problem is not None:
            raise OfAllRanks(str(problem))
        if not items:
            raise StopIteration
        return list(zip(items, states or [None] * len(items), strict=True))

    def _read(self, count: int) -> tuple[list[Any], list[Any], Exception | None]:
        items: list[Any] = []
        states: list[Any] = []
        problem: Exception | None = self._problem
        self._problem = None
        while problem is None and len(items) < count:
            try:
                item = next(self.source)
            except StopIteration:
                break
            except (UserError, StoppedWaiting) as error:
                problem = error
                break
            if self._worth(item):
                items.append(item)
                states.append(self.source.state_dict())
        if items:  # whoever gets to it hears of it; a wait that was ended is begun anew
            self._problem, problem = problem if isinstance(problem, UserError) else None, None
        return items, states, problem

    def state_dict(self) -> Any:
        """That of `source`; where it stands is known to the first rank alone."""
        return self.source.state_dict() if self.ranks.first else None

    def load_state_dict(self, state: Any) -> None:
        self._problem = None
        if self.ranks.first:
            self.source.load_state_dict(state)
