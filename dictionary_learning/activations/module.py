"""Activations of any torch module: batches of whatever it takes in, rows of activations out.

In: an `nn.Module` (audio, vision, tables, anything), the paths of its hook points, and a DataLoader or any iterable of
batches. Out: the `ActivationBatch`es that the buffer eats, as from a language model. Nothing about the data is assumed
but that the last axis at a hook point is the width; what passes there is seen in the first batch, not looked up.

Plain forward hooks read the values, and the last of them breaks the forward off, so that what lies behind costs
nothing. They need no tracing, no tokenizer and no knowledge of the module's arguments; text and interventions are
`TracedLM`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dictionary_learning.activations.hooks import capture, find_points, first_activation, is_activation, to_device
from dictionary_learning.activations.loading import resolve_device
from dictionary_learning.activations.types import ActivationBatch, Provenance
from dictionary_learning.errors import UserError

_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.MaxPool2d, nn.AvgPool2d, nn.MaxPool1d)


class ModuleActivations:
    """An `ActivationSource` over the forward passes of a module.

    The first batch is read, and runs once to its end, when the source is made: that shows what passes at the hook
    points. Its activations are the first that are handed out.

    Args:
        module: is put into eval mode, and moved where `device` says so.
        batches: a DataLoader or any iterable of tensors, tuples or mappings. They are moved to the module's device.
        hook_points: module paths ("encoder.layers.3", "encoder.layers.3:in"), names as "resid_post_layer_3", or
            submodules; one or a list.
        io: side of the modules for hook points that do not say it: "out", "in", or "in_and_out" for both.
        forward: `forward(module, batch)` feeds a batch; by default `module(tensor)`, `module(*tuple)` or
            `module(**mapping)`.
        mask: `mask(batch)` -> bool tensor over the positions (the axes before the width), True where a row is wanted.
        to_rows: `to_rows(value)` -> [examples, ..., width] from what passes at a hook point, where that is not such a
            tensor already: feature maps [B, C, H, W] (`lambda x: x.permute(0, 2, 3, 1)`), an output with fields.
        epochs: passes over the batches; None repeats them for ever.
        max_rows: rows of an `ActivationBatch` at most; None takes the positions of the first batch. A forward that
            gives more is handed out in parts.

    Attributes:
        widths, dtype, max_rows: as `ActivationSource` has them. examples: of the batches read so far.

    A row's provenance is the number of its example (`document_N`, `context_N`) and its place in it (`position_N`);
    `token_N` is -1.

    Resuming: where `batches` has `state_dict()` and `load_state_dict()` (as torchdata's StatefulDataLoader), its state
    is saved and it goes on from there. Otherwise `load_state_dict` reads and skips the batches that were used up, which
    needs a new source over batches that come in the same order (a DataLoader with a seeded generator does). Rows of a
    forward that were not handed out yet are part of the state.

    Raises:
        UserError: no such module, one that does not run exactly once, no batch, a batch that the module can't take, a
            value that is no tensor or has its channels first, hook points with different numbers of positions, a mask
            of another shape; while iterating, a width that changes, or a pass in which no row is wanted.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        hook_points: str | nn.Module | Sequence[str | nn.Module],
        *,
        io: str = "out",
        forward: Callable[[Any, Any], Any] | None = None,
        mask: Callable[[Any], Tensor] | None = None,
        to_rows: Callable[[Any], Tensor] | None = None,
        epochs: int | None = 1,
        device: torch.device | str | None = None,
        max_rows: int | None = None,
    ) -> None:
        for name, count in (("epochs", epochs), ("max_rows", max_rows)):
            if count is not None and count < 1:
                raise UserError(f"{name} must be at least 1, got {count}.")
        if epochs != 1 and isinstance(batches, Iterator):
            raise UserError("An iterator can be read once only: for several epochs give a DataLoader or a list.")
        self.module = module.eval()
        if device is not None:
            module.to(resolve_device(device))
        self.device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        self.batches, self.epochs, self._forward, self._mask = batches, epochs, forward, mask
        self.hook_points = find_points(module, hook_points, io)
        self._paths = {point.name: point.locate(module) for point in self.hook_points}
        self._to_rows = to_rows
        self.widths: dict[str, int] = {}
        self.dtype = torch.float32
        self.max_rows = max_rows or 0
        self._start()

    def _start(self) -> None:
        self.examples = 0
        self._read = 0  # batches, in all epochs
        self._passed = 0  # rows wanted, in this epoch
        self._epoch = 0
        self._iterator = iter(self.batches)
        self._pending: ActivationBatch | None = None  # rows of the last forward, not handed out yet
        self._pending = self._harvest(self._next_batch(), probe=not self.widths)

    # ------------------------------------------------------------------------------------------- reading

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        while self._pending is None or not _rows(self._pending):
            self._pending = None  # before the next forward needs the room
            self._pending = self._harvest(self._next_batch())
        head = _cut(self._pending, 0, self.max_rows)
        self._pending = _cut(self._pending, self.max_rows, None)
        return head

    def _next_batch(self) -> Any:
        """The next batch. Raises StopIteration behind the last epoch."""
        for _ in range(2):  # the end of a pass, and the first batch of the next
            if self.epochs is not None and self._epoch >= self.epochs:
                raise StopIteration
            for batch in self._iterator:
                self._read += 1
                return batch
            if self._read and not self._passed:
                raise UserError("A whole pass over the batches gave no row: the mask leaves everything out.")
            if not self._read:
                raise UserError("The module's activations need at least one batch, and there is none.")
            self._epoch, self._passed = self._epoch + 1, 0
            self._iterator = iter(self.batches)
        raise StopIteration

    def _harvest(self, batch: Any, probe: bool = False) -> ActivationBatch:
        batch = to_device(batch, self.device)
        seen = capture(
            self.module,
            [(point.name, self._paths[point.name], point.io) for point in self.hook_points],
            lambda: self._feed(batch),
            self._value,
            whole=probe,
        )
        shapes = {name: tuple(x.shape[:-1]) for name, x in seen.items()}
        if len(set(shapes.values())) > 1:
            shown = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise UserError(f"The hook points differ in their positions ({shown}), so their rows can't be aligned.")
        widths = {name: x.shape[-1] for name, x in seen.items()}
        self.widths = self.widths or widths
        for name, width in widths.items():
            if width != self.widths[name]:
                raise UserError(
                    f"'{name}' has width {self.widths[name]} in the first batch and {width} in batch {self._read - 1}: "
                    "its last axis is not the width; move that to the end with to_rows."
                )
        shape = next(iter(shapes.values()))
        count = int(torch.Size(shape).numel())
        if probe:
            self.dtype = next(iter(seen.values())).dtype
            self.max_rows = self.max_rows or count
        wanted_N = torch.arange(count) if self._mask is None else self._wanted(batch, shape)
        first, self.examples = self.examples, self.examples + shape[0]
        self._passed += len(wanted_N)
        index_N = wanted_N.to(self.device)
        acts = {name: x.flatten(0, -2).index_select(0, index_N.to(x.device)).to(self.dtype) for name, x in seen.items()}
        each = count // shape[0] if shape[0] else 1
        example_N = first + wanted_N.div(each, rounding_mode="floor")
        return ActivationBatch(
            acts,
            Provenance(
                document_N=example_N,
                position_N=wanted_N % each,
                token_N=torch.full_like(wanted_N, -1),
                corpus_N=torch.zeros_like(wanted_N),
                context_N=example_N,
            ),
        )

    def _feed(self, batch: Any) -> None:
        if self._forward is not None:
            self._forward(self.module, batch)
            return
        try:
            if isinstance(batch, Mapping):
                self.module(**batch)
            elif isinstance(batch, tuple | list):
                self.module(*batch)
            else:
                self.module(batch)
        except TypeError as error:
            raise UserError(
                f"{type(self.module).__name__} can't take a batch of {_described(batch)} ({error}); say how with "
                "forward=lambda module, batch: ..."
            ) from error

    def _wanted(self, batch: Any, shape: tuple[int, ...]) -> Tensor:
        """Numbers of the rows that the mask wants."""
        assert self._mask is not None
        mask = self._mask(batch)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise UserError(f"The mask should be a torch.bool tensor {list(shape)}, one for each position, got {got}.")
        return mask.flatten().nonzero().flatten().cpu()

    def _value(self, name: str, value: Any) -> Tensor:
        """What passes at a hook point, as a tensor [examples, ..., width]."""
        if self._to_rows is not None:
            try:
                x = self._to_rows(value)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                raise UserError(f"to_rows fails on what '{name}' passes, {_said(value)} ({why}).") from error
            if not is_activation(x):
                raise UserError(
                    f"to_rows should give a tensor [examples, ..., width], for '{name}' it gave {_said(x)}."
                )
            return x
        x = first_activation(value)
        if not is_activation(x):
            fields = f" with the fields {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
            raise UserError(
                f"'{name}' passes {_said(value)}{fields}, not a tensor [examples, ..., width]: name a module inside "
                "it, or pick the tensor with to_rows=lambda value: ..."
            )
        child = self.module.get_submodule(self._paths[name])
        if x.ndim > 3 or (x.ndim == 3 and _channels_first(child)):
            move = {3: "0, 2, 1", 4: "0, 2, 3, 1", 5: "0, 2, 3, 4, 1"}.get(x.ndim, "0, ..., 1")
            raise UserError(
                f"'{name}' passes {list(x.shape)}, whose width may not be the last axis: give to_rows=lambda x: "
                f"x.permute({move}) for channels first, or to_rows=lambda x: x where the last axis is the width."
            )
        return x

    # ------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        pending = self._pending
        own = getattr(self.batches, "state_dict", None)
        return {
            "read": self._read,
            "epoch": self._epoch,
            "passed": self._passed,
            "examples": self.examples,
            "batches": None if own is None else own(),
            "pending": None
            if pending is None
            else {
                "acts": {name: x.to("cpu", copy=True) for name, x in pending.acts.items()},
                "provenance": [column.clone() for column in pending.provenance or ()],
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where other hook points were saved, or the batches can't be brought to where they were."""
        pending = state["pending"]
        widths = None if pending is None else {name: x.shape[-1] for name, x in pending["acts"].items()}
        if widths not in (None, self.widths):
            raise UserError(f"The saved position is of the hook points {widths}, not of {self.widths}.")
        if state["batches"] is not None:
            self.batches.load_state_dict(state["batches"])  # type: ignore[attr-defined]
            self._iterator = iter(self.batches)
        else:
            self._skip_to(state["read"])
        self._read, self._epoch, self._passed = state["read"], state["epoch"], state["passed"]
        self.examples = state["examples"]
        self._pending = None
        if pending is not None:
            acts = {name: x.to(self.device) for name, x in pending["acts"].items()}
            self._pending = ActivationBatch(acts, Provenance(*pending["provenance"]))

    def _skip_to(self, read: int) -> None:
        if self._read > read and isinstance(self.batches, Sequence):
            self._iterator, self._read, self._epoch = iter(self.batches), 0, 0
        if self._read > read:
            raise UserError("The batches are past the saved position: make a new source over them to resume.")
        self._passed = 1  # whether rows passed is not known of what is skipped
        while self._read < read:
            try:
                self._next_batch()
            except StopIteration:
                raise UserError(f"The batches end before the {read:,} that were used up.") from None
            self._passed = 1


def _channels_first(module: nn.Module) -> bool:
    """Whether the last axis of what a module passes may be time and not channels: it convolves or pools, and nothing in
    it is linear."""
    children = list(module.modules())
    return any(isinstance(m, _CHANNELS_FIRST) for m in children) and not any(isinstance(m, nn.Linear) for m in children)


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of ({', '.join(map(_said, value))})"
    return f"a {type(value).__name__}"


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"the fields {', '.join(map(str, batch))}"
    return _said(batch)


def _rows(batch: ActivationBatch) -> int:
    return len(next(iter(batch.acts.values())))


def _cut(batch: ActivationBatch, start: int, stop: int | None) -> ActivationBatch:
    assert batch.provenance is not None
    acts = {name: x[start:stop] for name, x in batch.acts.items()}
    return ActivationBatch(acts, Provenance(*(column[start:stop] for column in batch.provenance)))
