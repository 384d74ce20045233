"""Reading ahead gives the same items, states and errors as reading in turn, is bounded, and leaves no thread behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from dictionary_learning.corpus import Text, TextStream, corpus_from_iterable
from dictionary_learning.errors import UserError
from dictionary_learning.packing import ContextPacker
from dictionary_learning.read_ahead import ReadAhead


class Counted:
    """Gives 0, 1, 2 ... below `end`, each after `seconds`; asked for `bad`, it fails once."""

    extra = "of the source"

    def __init__(self, end: int, seconds: float = 0.0, bad: int | None = None) -> None:
        self.end, self.seconds, self.bad, self.at = end, seconds, bad, 0

    def __next__(self) -> int:
        time.sleep(self.seconds)
        if self.at == self.bad:
            self.bad = None
            raise UserError(f"Item {self.at} is damaged.")
        if self.at >= self.end:
            raise StopIteration
        self.at += 1
        return self.at - 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.fixture(autouse=True)
def threads_of_other_tests():
    gc.collect()
    OTHERS[:] = all_threads()


OTHERS: list[threading.Thread] = []


def all_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def threads() -> list[threading.Thread]:
    return [thread for thread in all_threads() if thread not in OTHERS]


def wait_for(condition) -> bool:
    while not condition():  # pytest's timeout says that it never comes
        time.sleep(0.01)
    return True


def full(ahead: ReadAhead) -> bool:
    """Whether the thread has read as far as it may; it then stands still."""
    return wait_for(lambda: ahead.source.at == ahead.source.end or len(ahead._queue.made) == ahead.depth)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_items_and_states_are_those_of_the_source_however_far_is_read_ahead(depth):
    plain, ahead = Counted(20), ReadAhead(Counted(20), depth)
    assert ahead.state_dict() == plain.state_dict()
    for number in range(20):
        assert next(ahead) == next(plain) == number
        assert full(ahead)
        assert ahead.state_dict() == plain.state_dict() == {"at": number + 1}
    for _ in range(2):
        assert next(ahead, None) is None
    assert ahead.state_dict() == {"at": 20}


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_is_read_ahead_than_there_is_room_for(depth):
    ahead = ReadAhead(Counted(100), depth)
    assert ahead.source.at == 0 and not threads()  # nothing is read before the first item is asked for
    for number in range(10):
        assert next(ahead) == number
        assert full(ahead)
        time.sleep(0.02)
        assert ahead.source.at == number + 1 + depth
    ahead.close()


def test_it_goes_on_while_the_consumer_works():
    ahead = ReadAhead(Counted(10), 4)
    next(ahead)
    assert wait_for(lambda: ahead.source.at == 5)  # with nobody asking
    ahead.close()


@pytest.mark.parametrize("stop", [0, 1, 5, 20])
def test_a_state_goes_on_with_the_item_that_was_next_in_either_way_of_reading(stop):
    ahead = ReadAhead(Counted(20), 3)
    for _ in range(stop):
        next(ahead)
    full(ahead) if stop else None
    state = ahead.state_dict()
    for resumed in (ReadAhead(Counted(20), 2), Counted(20), ahead):  # into the one that read further as well
        resumed.load_state_dict(state)
        assert [next(resumed) for _ in range(20 - stop)] == list(range(stop, 20))
        assert next(resumed, None) is None


def test_an_error_is_raised_in_its_place_with_its_words_and_then_the_source_is_asked_again():
    ahead = ReadAhead(Counted(6, bad=3), 5)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"^Item 3 is damaged\.$"):
        next(ahead)
    assert ahead.state_dict() == {"at": 3}
    assert [next(ahead) for _ in range(3)] == [3, 4, 5] and next(ahead, None) is None


def test_the_thread_ends_with_the_source_with_close_and_with_its_owner():
    ahead = ReadAhead(Counted(3), 5)
    list(iter(ahead.__next__, 2))
    assert wait_for(lambda: not threads())

    ahead = ReadAhead(Counted(100), 2)
    next(ahead)
    assert len(threads()) == 1
    ahead.close()
    assert not threads() and next(ahead, None) is None and ahead.state_dict() == {"at": 1}

    ahead = ReadAhead(Counted(100), 2)
    next(ahead)
    del ahead
    gc.collect()
    assert wait_for(lambda: not threads())


def test_a_program_ends_though_its_source_does_not():
    script = """
from dictionary_learning.read_ahead import ReadAhead
class Endless:
    def __next__(self): return 1
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
ahead = ReadAhead(Endless(), 2)
print(next(ahead))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "1", "")


def test_the_source_can_be_used_while_the_thread_stands_still():
    ahead = ReadAhead(Counted(100, seconds=0.001), 3)
    next(ahead)
    with ahead.held():
        assert ahead.source.at == 4
        time.sleep(0.02)
        assert ahead.source.at == 4
    ahead.close()


def test_whatever_else_the_source_has_is_there():
    assert ReadAhead(Counted(1)).extra == "of the source"
    with pytest.raises(AttributeError, match="nothing"):
        ReadAhead(Counted(1)).nothing  # noqa: B018
    with pytest.raises(UserError, match="at least 1 item, got 0"):
        ReadAhead(Counted(1), 0)


# ---------------------------------------------------------------------------------------------- with the packer


def packer(tokenizer):
    texts = [Text(f"Patient {i} was given {i * i} mg of aspirin{'.' * (i % 9)}", "ab"[i % 2]) for i in range(300)]
    stream = TextStream(corpus_from_iterable(texts), epochs=2, seed=0, block=50)
    return ContextPacker(stream, tokenizer, ctx_len=16, batch_contexts=8)


def same(a, b) -> bool:
    return a.first_context == b.first_context and all(map(torch.equal, a[:-1], b[:-1]))


def test_packed_contexts_and_their_states_are_the_same_read_ahead_and_in_turn(tokenizer):
    plain, ahead = packer(tokenizer), ReadAhead(packer(tokenizer), 3)
    assert (ahead.ctx_len, ahead.batch_contexts) == (16, 8)
    batches = 0
    for expected in plain:
        assert same(next(ahead), expected)
        batches += 1
        if batches % 10 == 0:
            mine, its = ahead.state_dict(), plain.state_dict()
            assert torch.equal(mine.pop("pending"), its.pop("pending")) and mine == its
            resumed = packer(tokenizer)
            resumed.load_state_dict(ahead.state_dict())
            again = ReadAhead(packer(tokenizer), 2)
            again.load_state_dict(ahead.state_dict())
            following = next(resumed, None)
            assert following is None or same(next(again), following)
            again.close()
    assert batches > 50 and next(ahead, None) is None and sorted(ahead.corpora) == ["a", "b"]
