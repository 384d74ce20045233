"""ActivationBuffer: mixes the activations of many contexts into training batches, never touching the disk.

In: an activation source (the language model by default). Out: batches [B, D] drawn without replacement from the whole
buffer.

The buffer is a ring of slots allocated once. A drawn row's slot is free at once, and as soon as the free slots hold
one forward's worth of activations, that one forward runs and its rows go into exactly those slots. So the buffer stays
between full and one forward short of full, refilling costs one forward at a time instead of a long stall, nothing is
concatenated or copied, and every harvested row is trained on once. A slot's row waits a random time, so neighbours in
text are spread over many batches; `mixing()` measures it.

Which slots are drawn is decided on the CPU by a generator of its own: the same seed draws the same slots on every
device, and drawing does not wait for the device.

On CUDA the forwards that a draw makes room for begin right behind it, on a stream of their own, and write into the
freed slots while the batch is trained on; the next draw comes after them on the device. Done in turn, as on the CPU,
they give the same rows in the same slots. Only where rows are dropped by their norm does the next draw have to know how
many are left, and the host waits for that one number unless the forward is done by then.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.activations.types import ActivationBatch, ActivationSource, Launched, Provenance
from dictionary_learning.errors import UserError
from dictionary_learning.read_ahead import ReadAhead
from dictionary_learning.slots import Slots, check_capacity
from dictionary_learning.stopping import StoppedWaiting
from dictionary_learning.streams import side_stream, to_device

IO: dict[str, tuple[Literal["in", "out"], ...]] = {"in": ("in",), "out": ("out",), "in_and_out": ("in", "out")}


class ActivationBuffer:
    """Iterates over batches of activations: a tensor [B, D] for one hook point, a dict of name -> [B, D] for several,
    a tensor [B, 2, D] (input, output) for `io="in_and_out"`.

    Args:
        data: texts (a list, a generator, a `TextStream`); None when `model` is an activation source.
        model: a language model (nnsight, transformers, `TracedLM`, a Hub id or folder), or an activation source.
        submodule: the hook point(s): a module of the model, a name such as "resid_post_layer_8", or a list of them.
        d_submodule: their width; found by a probe when None, checked against it otherwise.
        n_ctxs: size of the buffer in contexts of `ctx_len` tokens.
        refresh_batch_size: contexts in one forward of the model.
        out_batch_size: rows B of a batch; the last batches of a stream that ends may be shorter.
        remove_bos: drop the activations of special tokens.
        max_activation_norm_multiple: drop rows whose norm is above this multiple of the median norm.
        packing: fill contexts with consecutive documents instead of one document a context.
        seed: of the generator that draws slots.
        provenance: keep document, position, token and corpus of every row; `draw()` delivers them.
        read_ahead: batches that a thread tokenises and packs ahead of the model; 0 does it in between. The rows are
            the same. By default 2 on CUDA; 0 elsewhere, where the model needs the processor itself.

    Raises:
        UserError: a buffer too small for one forward and one batch, an unknown hook point, a wrong width.
    """

    def __init__(
        self,
        data: Any,
        model: Any,
        submodule: Any = None,
        d_submodule: int | None = None,
        io: str = "out",
        n_ctxs: float = 3e4,
        ctx_len: int = 128,
        refresh_batch_size: int = 512,
        out_batch_size: int = 8192,
        device: torch.device | str = "cpu",
        remove_bos: bool = False,
        add_special_tokens: bool = True,
        max_activation_norm_multiple: float | None = None,
        *,
        packing: bool = True,
        seed: int = 0,
        provenance: bool = False,
        read_ahead: int | None = None,
    ) -> None:
        if io not in IO:
            raise UserError(f"io must be one of {', '.join(IO)}, got '{io}'.")
        if out_batch_size < 1 or ctx_len < 1:
            raise UserError(f"out_batch_size and ctx_len must be at least 1, got {out_batch_size} and {ctx_len}.")
        self.io, self.n_ctxs, self.ctx_len = io, int(n_ctxs), ctx_len
        self.refresh_batch_size, self.out_batch_size = refresh_batch_size, int(out_batch_size)
        self.device, self.remove_bos, self.packing, self.seed = torch.device(device), remove_bos, packing, seed
        self.max_activation_norm_multiple = max_activation_norm_multiple
        self.add_special_tokens = add_special_tokens
        self._read_ahead = (2 if self.device.type == "cuda" else 0) if read_ahead is None else read_ahead
        self.data, self.model, self.submodule = data, model, submodule
        self.source: ActivationSource
        if isinstance(model, ActivationSource):
            if data is not None or submodule is not None:
                raise UserError("With an activation source in place of the model, data and submodule must be None.")
            if remove_bos or max_activation_norm_multiple is not None or read_ahead:
                raise UserError(
                    "remove_bos, max_activation_norm_multiple and read_ahead are for a language model: an activation "
                    "source has chosen its rows already, and reads as it likes."
                )
            self.source = model
        else:
            self.source = self._language_model_source()
        self.d_submodule = self._checked_width(d_submodule)

        self.capacity = self.activation_buffer_size = self.n_ctxs * self.ctx_len
        check_capacity(self.n_ctxs, self.ctx_len, self.source.max_rows, self.out_batch_size)
        self._rows = {
            name: torch.zeros(self.capacity, width, dtype=self.source.dtype, device=self.device)
            for name, width in self.source.widths.items()
        }
        fields = len(Provenance._fields)
        self._provenance = torch.zeros(fields, self.capacity, dtype=torch.long) if provenance else None
        self._context = np.full(self.capacity, -1, dtype=np.int64)  # of each slot's row, to measure mixing
        self._slots = Slots(self.capacity, seed)
        self._exhausted = False
        self._side = side_stream(self.device)
        self._pending: list[tuple[Launched, int]] = []  # forwards whose rows are on their way into the free slots
        self._error: Exception | None = None  # of a forward begun ahead: it belongs to the next draw
        self._last_contexts = np.empty(0, dtype=np.int64)  # of the rows of the last batch
        self.rows_drawn = 0

    def _language_model_source(self) -> ActivationSource:
        from dictionary_learning.activations.language_model import LanguageModelActivations
        from dictionary_learning.activations.traced_lm import TracedLM
        from dictionary_learning.packing import ContextPacker

        if self.submodule is None:
            raise UserError(
                "The buffer needs a hook point: a submodule of the model, or a name as 'resid_post_layer_0'."
            )
        by_name = isinstance(self.model, str | os.PathLike)  # a model given as an object stays on its device
        lm = TracedLM.load(self.model, device=self.device if by_name else None)
        packer = ContextPacker(
            self.data,
            lm.tokenizer,
            ctx_len=self.ctx_len,
            batch_contexts=self.refresh_batch_size,
            packing=self.packing,
            add_special_tokens=self.add_special_tokens,
        )
        wanted = self.submodule if isinstance(self.submodule, list | tuple) else [self.submodule]
        return LanguageModelActivations(
            lm,
            ReadAhead(packer, self._read_ahead) if self._read_ahead else packer,
            [point for end in IO[self.io] for point in lm.resolve(wanted, io=end)],
            remove_special=self.remove_bos,
            provenance=True,
            max_activation_norm_multiple=self.max_activation_norm_multiple,
        )

    def _checked_width(self, d_submodule: int | None) -> int | None:
        widths = set(self.source.widths.values())
        if d_submodule is not None and widths != {d_submodule}:
            raise UserError(f"d_submodule is {d_submodule}, but the activations have width {sorted(widths)}.")
        if self.io == "in_and_out" and (len(self.source.widths) != 2 or len(widths) != 1):
            raise UserError(f"io='in_and_out' needs one input and one output of equal width, got {self.source.widths}.")
        return widths.pop() if len(widths) == 1 else None

    # ------------------------------------------------------------------------------------------- drawing

    def __iter__(self) -> Iterator[Tensor | dict[str, Tensor]]:
        return self

    def __next__(self) -> Tensor | dict[str, Tensor]:
        acts = self.draw().acts
        if self.io == "in_and_out":
            return torch.stack(list(acts.values()), dim=1)
        return next(iter(acts.values())) if len(acts) == 1 else acts

    @torch.no_grad()
    def draw(self) -> ActivationBatch:
        """The next batch with the provenance of its rows (None unless the buffer was asked to keep it).

        Raises:
            StopIteration: the source is exhausted and every row was drawn.
        """
        self.refresh()
        count = min(self.out_batch_size, self._slots.n_live)
        if count == 0:
            raise StopIteration
        index = torch.from_numpy(slots := self._slots.take(count))
        on_device = to_device(index, self.device)
        acts = {name: rows.index_select(0, on_device) for name, rows in self._rows.items()}
        provenance = None if self._provenance is None else Provenance(*self._provenance[:, index])
        self._last_contexts = self._context[slots]
        self.rows_drawn += count
        if self._side.overlaps:
            try:
                self._launch()
            except StoppedWaiting:
                pass  # of the run that waits now: a draw of this run or of a later one waits anew
            except Exception as error:  # noqa: BLE001 - this batch was drawn and is handed out first
                self._error = error
        return ActivationBatch(acts, provenance)

    @torch.no_grad()
    def refresh(self) -> None:
        """Run forwards while a whole one fits into the free slots."""
        self._settle()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        while self._launch():
            self._settle()

    def _launch(self) -> bool:
        """Begin the forwards that fit into the free slots, all their rows counted; whether there are any."""
        begun = 0
        while not self._exhausted and self.capacity - self._slots.n_live - begun >= self.source.max_rows:
            with self._side.beside():
                try:
                    launched = self.source.launch() if hasattr(self.source, "launch") else Launched(next(self.source))
                except StopIteration:
                    self._exhausted = True
                    break
                count = self._store(launched, begun)
            # The activations are in the ring: let go of them.
            self._pending.append((launched._replace(batch=launched.batch._replace(acts={})), count))
            begun += count
        return bool(self._pending)

    def _store(self, launched: Launched, begun: int) -> int:
        """Copy a batch into the free slots behind the next `begun`, the rows that stay first; how many rows it has."""
        acts = launched.batch.acts
        count = len(next(iter(acts.values())))
        if count > self.source.max_rows:
            raise ValueError(
                f"The activation source gave {count} rows at once, above its max_rows {self.source.max_rows}."
            )
        if self._provenance is not None and launched.batch.provenance is None:
            raise UserError("Provenance was asked of the buffer, but its activation source does not know it.")
        slots_N = to_device(torch.from_numpy(self._slots.next_free(begun, count)), self.device)
        if launched.keep_N is not None:
            keep_N = launched.keep_N.to(self.device)
            slots_N = slots_N[torch.where(keep_N, keep_N.cumsum(0), keep_N.sum() + (~keep_N).cumsum(0)) - 1]
        for name, rows in self._rows.items():
            x_Nd = acts[name]
            if x_Nd.is_cuda:  # made on another stream, perhaps: its memory must not be reused before the copy
                x_Nd.record_stream(torch.cuda.current_stream(x_Nd.device))
            rows.index_copy_(0, slots_N, to_device(x_Nd, rows.device).to(rows.dtype))
        return count

    def _settle(self) -> None:
        """Count the rows of the forwards that were begun as filled slots, and note where each comes from."""
        self._side.join()
        pending, self._pending = self._pending, []
        counts = [(count, launched.kept()) for launched, count in pending]
        filled = self._slots.fill(counts)
        for (launched, _), (_, kept_N), slots in zip(pending, counts, filled, strict=True):
            if launched.batch.provenance is not None:
                provenance = torch.stack(list(launched.batch.provenance)).cpu()
                provenance = provenance if kept_N is None else provenance[:, kept_N]
                self._context[slots] = provenance[Provenance._fields.index("context_N")].numpy()
                if self._provenance is not None:
                    self._provenance[:, torch.from_numpy(slots)] = provenance

    # ------------------------------------------------------------------------------------------- measures

    def mixing(self) -> dict[str, float]:
        """How well the last batch was mixed: the mean number of rows from one context, and the share of its rows that
        stand alone (1.0 means that no two rows of the batch share a context). Empty where contexts are not known."""
        contexts, counts = np.unique(self._last_contexts, return_counts=True)
        if len(contexts) == 0 or contexts[0] < 0:
            return {}
        rows = len(self._last_contexts)
        return {"rows_per_context": rows / len(contexts), "rows_alone": float((counts == 1).sum()) / rows}

    @torch.no_grad()
    def mean_squared_norm(self, name: str | None = None) -> float:
        """Mean squared norm of the rows now in the buffer, of a hook point (default: the first)."""
        self.refresh()
        rows = self._rows[name or next(iter(self._rows))]
        if self._slots.n_live == 0:
            raise UserError("The buffer is empty: the activation source gave no rows.")
        live = torch.from_numpy(np.sort(self._slots.live)).to(self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in live.split(max(1, 2**18 // rows.shape[1])):  # 2 MiB: the copies must be small beside the ring
            total += rows[part].double().pow_(2).sum()
        return total.item() / self._slots.n_live

    @property
    def hook_points(self) -> list[str]:
        """Names of the hook points, in the order of the model's execution."""
        return list(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows on the device."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows.values())

    @property
    def activations(self) -> Tensor | dict[str, Tensor]:
        """The ring itself: [capacity, D], or a dict of them. Slots that were drawn hold stale rows."""
        self._side.join()
        return next(iter(self._rows.values())) if len(self._rows) == 1 else self._rows

    # ------------------------------------------------------------------------------------------- the field's surface

    def text_batch(self, batch_size: int | None = None) -> list[str]:
        """The next texts of the stream, behind those read ahead. Raises StopIteration at its end."""
        packer = self._packer()
        with packer.held() if isinstance(packer, ReadAhead) else contextlib.nullcontext():
            return [next(packer.texts).text for _ in range(batch_size or self.refresh_batch_size)]

    def tokenized_batch(self, batch_size: int | None = None) -> Any:
        """The next texts, tokenised, padded and cut to `ctx_len`."""
        packer = self._packer()
        tokenizer = packer.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(packer.pad)
        return tokenizer(
            self.text_batch(batch_size),
            return_tensors="pt",
            max_length=self.ctx_len,
            padding=True,
            truncation=True,
            add_special_tokens=self.add_special_tokens,
        )

    def _packer(self) -> Any:
        packer = getattr(self.source, "contexts", None)
        if packer is None:
            raise UserError("This buffer reads activations, not texts.")
        return packer

    @property
    def config(self) -> dict[str, Any]:
        """Settings, as config.json keeps them under "buffer"."""
        return {
            "d_submodule": self.d_submodule,
            "io": self.io,
            "n_ctxs": self.n_ctxs,
            "ctx_len": self.ctx_len,
            "refresh_batch_size": self.refresh_batch_size,
            "out_batch_size": self.out_batch_size,
            "device": str(self.device),
            "remove_bos": self.remove_bos,
            "add_special_tokens": self.add_special_tokens,
            "packing": self.packing,
            "max_activation_norm_multiple": self.max_activation_norm_multiple,
            "seed": self.seed,
        }

    def close(self) -> None:
        """End reading ahead, and close the text stream where it can be closed."""
        if isinstance(contexts := getattr(self.source, "contexts", None), ReadAhead):
            contexts.close()
        if (close := getattr(self.data, "close", None)) is not None:
            close()

    # ------------------------------------------------------------------------------------------- state

    def state_dict(self, *, live: bool = False) -> dict[str, Any]:
        """The rows, which slots are filled, the generator, and the source's position. Tensors are copies on the CPU;
        with `live` the rows are the ring itself, which the next draw changes."""
        self._settle()
        return {
            "rows": {name: rows if live else rows.to("cpu", copy=True) for name, rows in self._rows.items()},
            "provenance": None if self._provenance is None else self._provenance.clone(),
            "context": torch.from_numpy(self._context.copy()),
            **self._slots.state_dict(),
            "rows_drawn": self.rows_drawn,
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        shapes = {name: rows.shape for name, rows in state["rows"].items()}
        if shapes != {name: rows.shape for name, rows in self._rows.items()}:
            raise UserError("The saved buffer has another size or other hook points than this one.")
        if self._provenance is not None and state["provenance"] is None:
            raise UserError("The saved buffer kept no provenance, but this one is asked for it.")
        self._settle()
        self._error = None
        for name, rows in self._rows.items():
            rows.copy_(state["rows"][name])
        if self._provenance is not None:
            self._provenance.copy_(state["provenance"])
        self._context[:] = state["context"].numpy()
        self._slots.load_state_dict(state)
        self._exhausted = False  # its source may have been made longer; if not, it says so again
        self.rows_drawn = state["rows_drawn"]
        self.source.load_state_dict(state["source"])


def __getattr__(name: str) -> Any:
    if name in ("HeadActivationBuffer", "NNsightActivationBuffer"):  # which import this module
        return getattr(importlib.import_module("dictionary_learning.buffer_variants"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
