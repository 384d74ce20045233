"""Two further buffers of the field: activations of token ids in place of texts, and of single attention heads.

In and out as `ActivationBuffer`, which does all the work: these only choose what it reads and how a batch is shaped.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dictionary_learning.activations.language_model import LanguageModelActivations
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.buffer import IO, ActivationBuffer
from dictionary_learning.errors import UserError
from dictionary_learning.packing import TokenBatch

# The last projection of an attention module, whose input is the heads' outputs side by side.
OUTPUT_PROJECTION = re.compile(r"(o|out|c|output)_?proj|dense|wo|to_out", re.IGNORECASE)


class TokenRows:
    """`TokenBatch`es from rows of token ids of one length: what a `ContextPacker` is for texts.

    Raises:
        UserError: while iterating, when a row's length is another.
    """

    def __init__(self, rows: Iterable[Any], ctx_len: int, batch_contexts: int) -> None:
        self.rows, self.ctx_len, self.batch_contexts = iter(rows), ctx_len, batch_contexts
        self.contexts = 0

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        first = self.contexts
        tokens_CL = self.take(self.batch_contexts)
        everywhere_CL = torch.ones_like(tokens_CL, dtype=torch.bool)
        document_CL = torch.arange(first, self.contexts)[:, None].expand_as(tokens_CL)
        position_CL = torch.arange(tokens_CL.shape[1]).expand_as(tokens_CL)
        return TokenBatch(
            tokens_CL, everywhere_CL, everywhere_CL, document_CL, position_CL, torch.zeros_like(tokens_CL), first
        )

    def take(self, count: int) -> Tensor:
        """The next `count` rows [C, L], cut to `ctx_len`; fewer at the end. Raises StopIteration behind it."""
        rows = [torch.as_tensor(row)[: self.ctx_len] for row in itertools.islice(self.rows, count)]
        if not rows:
            raise StopIteration
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise UserError(f"Rows of token ids must be of one length, got lengths {lengths}.")
        self.contexts += len(rows)
        return torch.stack(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"contexts": self.contexts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the rows of `state`; the rows must be given from their beginning."""
        next(itertools.islice(self.rows, state["contexts"], state["contexts"]), None)
        self.contexts = state["contexts"]


class NNsightActivationBuffer(ActivationBuffer):
    """An `ActivationBuffer` of a model that is given token ids: rows of one length, such as lists of `ctx_len` ids.

    Every position counts, and the model needs no tokenizer. `text_batch` delivers token ids [C, L] too.
    """

    def __init__(
        self,
        data: Any,
        model: Any,
        submodule: Any,
        d_submodule: int | None = None,
        io: str = "out",
        n_ctxs: float = 3e4,
        ctx_len: int = 128,
        refresh_batch_size: int = 512,
        out_batch_size: int = 8192,
        device: torch.device | str = "cpu",
        *,
        seed: int = 0,
    ) -> None:
        if io not in IO:
            raise UserError(f"io must be one of {', '.join(IO)}, got '{io}'.")
        lm = TracedLM.load(model)
        wanted = submodule if isinstance(submodule, list | tuple) else [submodule]
        points = [point for end in IO[io] for point in lm.resolve(wanted, io=end)]
        self.token_rows = TokenRows(data, ctx_len, refresh_batch_size)
        source = LanguageModelActivations(lm, self.token_rows, points, remove_special=False, provenance=True)  # type: ignore[arg-type]
        sizes: dict[str, Any] = {"n_ctxs": n_ctxs, "ctx_len": ctx_len, "out_batch_size": out_batch_size}
        sizes["refresh_batch_size"] = refresh_batch_size
        super().__init__(None, source, None, d_submodule, io, device=device, seed=seed, **sizes)
        self.data, self.model, self.submodule = data, model, submodule

    def token_batch(self, batch_size: int | None = None) -> Tensor:
        """The next rows of token ids [C, L], on the buffer's device. Raises StopIteration at the end of the data."""
        return self.token_rows.take(batch_size or self.refresh_batch_size).to(self.device)

    def text_batch(self, batch_size: int | None = None) -> Any:
        """`token_batch`."""
        return self.token_batch(batch_size)

    def tokenized_batch(self, batch_size: int | None = None) -> dict[str, Tensor]:
        """`token_batch` as a tokenizer gives it."""
        tokens_CL = self.token_batch(batch_size)
        return {"input_ids": tokens_CL, "attention_mask": torch.ones_like(tokens_CL)}


class HeadActivationBuffer(ActivationBuffer):
    """An `ActivationBuffer` of one layer's attention heads: batches [B, heads, d_head], for
    `trainSAE(..., activations_split_by_head=True)`.

    Args:
        layer: of the model, whose attention's output projection is found by its name.
        apply_W_O: give each head's contribution to the residual stream, [B, heads, d_model]: the output projection
            of that head alone, without its bias.
        remote: only False; models run here.

    Raises:
        UserError: a remote model, or an attention without an output projection of a known name.
    """

    def __init__(
        self,
        data: Any,
        model: Any,
        layer: int,
        n_ctxs: float = 3e4,
        ctx_len: int = 128,
        refresh_batch_size: int = 512,
        out_batch_size: int = 8192,
        device: torch.device | str = "cpu",
        apply_W_O: bool = False,
        remote: bool = False,
        *,
        remove_bos: bool = False,
        packing: bool = True,
        seed: int = 0,
    ) -> None:
        if remote:
            raise UserError("remote=True is not offered: the model runs on this machine.")
        lm = TracedLM.load(model)
        attention = lm.resolve(f"attn_out_layer_{layer}")[0].path
        names = [name for name, _ in lm.module.get_submodule(attention).named_children()]
        found = [name for name in names if OUTPUT_PROJECTION.fullmatch(name)]
        if len(found) != 1:
            raise UserError(f"The output projection of '{attention}' is not to be told from {', '.join(names)}.")
        projection = lm.module.get_submodule(f"{attention}.{found[0]}")
        self.layer, self.apply_W_O, self.remote = layer, apply_W_O, remote
        sizes: dict[str, Any] = {"n_ctxs": n_ctxs, "ctx_len": ctx_len, "out_batch_size": out_batch_size}
        sizes["refresh_batch_size"] = refresh_batch_size
        place = f"{attention}.{found[0]}:in"
        super().__init__(data, lm, place, device=device, remove_bos=remove_bos, packing=packing, seed=seed, **sizes)
        self.model = model
        config: Any = lm.module.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.n_heads, self.resid_dim = int(config.num_attention_heads), lm.d_model
        assert self.d_submodule is not None
        self.head_dim = self.d_submodule // self.n_heads
        weight = projection.get_parameter("weight").detach()
        # Linear keeps [out, in], GPT-2's Conv1D [in, out]; a square weight does not tell by its shape.
        weight_IO = weight.t() if isinstance(projection, torch.nn.Linear) else weight
        self._W_O_HdD = weight_IO.reshape(self.n_heads, self.head_dim, -1) if apply_W_O else None

    def __next__(self) -> Tensor:
        """The next batch, [B, heads, d_head], or [B, heads, d_model] with `apply_W_O`."""
        acts = super().__next__()
        assert isinstance(acts, Tensor)
        acts_BHd = acts.unflatten(-1, (self.n_heads, self.head_dim))
        if self._W_O_HdD is None:
            return acts_BHd
        return torch.einsum("bhd,hdo->bho", acts_BHd, self._W_O_HdD.to(acts_BHd))

    @property
    def activations(self) -> Tensor:
        """The ring itself, [capacity, heads, d_head]."""
        rows = super().activations
        assert isinstance(rows, Tensor)
        return rows.unflatten(-1, (self.n_heads, self.head_dim))

    @property
    def config(self) -> dict[str, Any]:
        """Settings, as config.json keeps them under "buffer"."""
        return super().config | {"layer": self.layer, "apply_W_O": self.apply_W_O}
