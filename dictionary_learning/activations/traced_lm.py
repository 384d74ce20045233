"""Reading and replacing a causal language model's activations, through nnsight.

In come token contexts [C, L] and hook points; out go activations [C, L, d] at all of them from one forward pass that
stops after the last, or the logits with activations replaced on the way.

The model is traced as a bare module (`nnsight.NNsight`), not through nnsight's text pipeline: that one splits a batch
into rows, left-pads it and adds an all-ones attention mask, which costs a host sync and the fast attention path.
Contexts here are packed, or padded on the right. Right padding needs no mask in a causal model: no real position sees
a later one. Pass `attention_mask` for anything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, TypeAlias

import nnsight
import torch
from nnsight import Envoy
from torch import Tensor, nn

from dictionary_learning.activations.hook_points import (
    IO,
    HookPoint,
    Probed,
    ResolvedHookPoint,
    find_blocks,
    layer_of,
    parse_hook_point,
    probe,
)
from dictionary_learning.activations.loading import load
from dictionary_learning.activations.mask_checks import no_mask_checks
from dictionary_learning.errors import UserError
from dictionary_learning.kernels.matmul import fast_matmul
from dictionary_learning.streams import to_device

Place: TypeAlias = str | HookPoint | ResolvedHookPoint | nn.Module | Envoy
Replacement: TypeAlias = Tensor | Callable[[Tensor], Tensor]


class TracedLM:
    """A language model whose activations can be read and replaced by hook point.

    One trace at a time: a lock lets a harvesting thread and an evaluating one share the model.
    """

    def __init__(self, module: nn.Module, tokenizer: Any | None = None, *, name: str = "", revision: str | None = None):
        self.module = module
        self.model = nnsight.NNsight(module)
        self.name = name or type(module).__name__
        self.revision = revision
        self._tokenizer = tokenizer
        self._envoys = {path.removeprefix("model").lstrip("."): envoy for path, envoy in self.model.named_modules()}
        self._resolved: dict[tuple[str, IO], ResolvedHookPoint] = {}
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls,
        model: Any,
        tokenizer: Any | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
    ) -> TracedLM:
        """A model given as Hub id, local folder, "embedded" (that of this project), torch module, nnsight wrapper, or
        `TracedLM` (returned as it is).

        Args:
            tokenizer: a tokenizer, or the id or folder of one; by default the one that lies with the model.
            dtype: of the weights, and so of the activations. By default float32 for a model loaded by name; a module
                given as an object stays as it is (and is converted in place where a dtype or device is given).
            device: by default the CPU for a model loaded by name.

        Raises:
            UserError: no such model, no network, not a causal language model, unknown dtype, absent device.
        """
        if isinstance(model, TracedLM):
            return model
        loaded = load(
            model,
            tokenizer,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        return cls(loaded.module, loaded.tokenizer, name=loaded.name, revision=loaded.revision)

    # ---- what the model is ---------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise UserError(
                f"The model '{self.name}' came without a tokenizer; pass one with tokenizer=, or TracedLM.load(model, "
                "tokenizer) in place of the model."
            )
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @cached_property
    def n_layers(self) -> int:
        return len(find_blocks(self.module)[1])

    @cached_property
    def d_model(self) -> int:
        return self.resolve("resid_post_layer_0")[0].width

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the input embedding (which may be padded beyond the tokenizer's vocabulary)."""
        find = getattr(self.module, "get_input_embeddings", None)
        embedding = find() if find else next(m for m in self.module.modules() if isinstance(m, nn.Embedding))
        return embedding.weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        """Longest context that the model was made for, None where its config does not say."""
        config: Any = getattr(self.module, "config", None)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text_config, "max_position_embeddings", None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What identifies the model, JSON-able: for a run's configuration and for telling a resume that it changed.

        `weights` digests eight numbers of every tensor, which any training changes.
        """
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:8].cpu().double().numpy().tobytes())
        return {
            "name": self.name,
            "revision": self.revision,
            "architecture": type(self.module).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "vocab_size": self.vocab_size,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "weights": digest.hexdigest()[:16],
        }

    # ---- hook points ---------------------------------------------------------------------------------------------

    @cached_property
    def _probed(self) -> dict[tuple[str, str], Probed]:
        with self._lock:
            return probe(self.module, lambda tokens_CL: self.module(**self._inputs(tokens_CL, None)), self.device)

    @cached_property
    def _paths(self) -> dict[int, str]:
        return {id(module): path for path, module in self.module.named_modules()}

    def resolve(self, places: Place | Iterable[Place], io: IO = "out") -> list[ResolvedHookPoint]:
        """Find hook points in this model: names, module paths, torch submodules or nnsight envoys, in the order given.

        Args:
            io: side of the modules for places that do not say it themselves. A submodule is named `path:io`.

        Raises:
            UserError: see `HookPoint.locate`; or the module does not run exactly once in a forward pass, or passes
                no [contexts, tokens, width] tensor.
        """
        if isinstance(places, (str, HookPoint, ResolvedHookPoint, nn.Module, Envoy)):
            places = [places]
        points = [self._resolve(place, io) for place in places]
        if not points:
            raise UserError("No hook point given; name at least one, such as 'resid_post_layer_0'.")
        return points

    def _resolve(self, place: Place, io: IO) -> ResolvedHookPoint:
        if isinstance(place, ResolvedHookPoint):
            place = place.name
        if isinstance(place, Envoy):
            place = place._module
        if isinstance(place, nn.Module):
            path = self._paths.get(id(place))
            if not path:
                raise UserError(f"The {type(place).__name__} given as hook point is not a submodule of {self.name}.")
            place = f"{path}:{io}"
        point = parse_hook_point(place, io) if isinstance(place, str) else place
        key = (point.name, point.io)
        if key not in self._resolved:
            self._resolved[key] = self._look_up(point)
        return self._resolved[key]

    def _look_up(self, point: HookPoint) -> ResolvedHookPoint:
        path = point.locate(self.module)
        seen = self._probed.get((path, point.io))
        if seen is None:
            raise UserError(f"'{point.name}' does not run in a forward pass of {self.name}.")
        if seen.calls > 1:
            raise UserError(f"'{point.name}' runs {seen.calls} times in one forward pass of {self.name}, not once.")
        if seen.width is None:
            verb = "takes" if point.io == "in" else "gives"
            raise UserError(f"'{point.name}' {verb} {seen.shape}, not a tensor [contexts, tokens, width].")
        layer = layer_of(path, self.module)
        return ResolvedHookPoint(point.name, path, point.io, layer, seen.width, seen.order, seen.slot)

    # ---- running -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def capture(
        self, tokens_CL: Tensor, hook_points: Place | Iterable[Place], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations {name: [C, L, d]} at the hook points, in one forward that stops after the last of them.

        Raises:
            UserError: see `resolve`; tokens that the model cannot take.
        """
        points = self.resolve(hook_points)
        in_turn = sorted(points, key=lambda point: point.order)
        inputs, shape = self._inputs(tokens_CL, attention_mask), tokens_CL.shape
        with self._forward(attention_mask), self.model.trace(**inputs) as tracer:
            acts = nnsight.save({})
            for point in in_turn:
                x = self._read(point)
                # What runs afterwards may add to it in place (Falcon's blocks do); after the last, nothing runs.
                acts[point.name] = (x if point is in_turn[-1] else x.clone()).reshape(*shape, -1)
            tracer.stop()
        return {point.name: acts[point.name] for point in points}

    @torch.no_grad()
    def logits(
        self,
        tokens_CL: Tensor,
        *,
        capture: Place | Iterable[Place] = (),
        replace: Mapping[Any, Replacement] | None = None,
        attention_mask: Tensor | None = None,
        past: Any | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [C, L, V], with activations captured and replaced on the way.

        Args:
            capture: hook points to return as {name: [C, L, d]}. Where one is also replaced, what the model computed
                there is returned (under the effect of replacements earlier in the pass), not the replacement.
            replace: hook point -> activations [C, L, d], or a function from the activations to such a tensor. They
                are cast to the model's dtype; a tuple around the activation keeps its other entries.
            past: a `new_cache`, which takes in the tokens given now behind those it holds. L then counts these alone,
                in logits, captures and replacements; an attention mask covers all.

        Raises:
            UserError: see `resolve`; a replacement that is not a tensor of the activation's shape; more tokens than
                the model has positions, those in `past` included.
        """
        captured = [] if isinstance(capture, (tuple, list)) and not capture else self.resolve(capture)
        replaced = {self._resolve(place, "out"): value for place, value in (replace or {}).items()}
        inputs, shape = self._inputs(tokens_CL, attention_mask, past), tokens_CL.shape
        with self._forward(attention_mask), self.model.trace(**inputs) as tracer:
            acts = nnsight.save({})
            for point in sorted({*captured, *replaced}, key=lambda point: (point.order, point in replaced)):
                x = self._read(point)
                if point in captured:
                    # A copy, because the model or a function that replaces may go on to change it in place.
                    acts[point.name] = x.clone().reshape(*shape, -1)
                if point in replaced:
                    self._write(point, _replacement(point, replaced[point], x, shape))
            logits_CLV = nnsight.save(_logits(tracer.result))
        return logits_CLV, {point.name: acts[point.name] for point in captured}

    def new_cache(self) -> Any | None:
        """An empty cache of keys and values for `logits`; None where the model has no such cache.

        That includes recurrent models: some start anew where several tokens come at once. A model may also leave the
        cache empty: its `get_seq_length()` says how many tokens it holds.
        """
        if "past_key_values" not in inspect.signature(self.module.forward).parameters:
            return None
        from transformers import PreTrainedModel
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        if not isinstance(self.module, PreTrainedModel):
            return None
        cache = DynamicCache(config=self.module.config)
        return cache if {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer} else None

    @contextlib.contextmanager
    def _forward(self, attention_mask: Tensor | None) -> Iterator[None]:
        """What a forward runs in: alone, with the fastest exact products, and without questions about the tokens."""
        checks = no_mask_checks() if attention_mask is None else contextlib.nullcontext()
        with self._lock, fast_matmul(), checks:
            yield

    def _inputs(self, tokens_CL: Tensor, attention_mask: Tensor | None, past: Any | None = None) -> dict[str, Any]:
        """Keywords of the forward pass. Ids are checked on the CPU, where that costs no sync."""
        if tokens_CL.ndim != 2 or tokens_CL.is_floating_point():
            got = f"{tokens_CL.dtype} {tuple(tokens_CL.shape)}"
            raise UserError(f"Tokens should be integers [contexts, tokens], got {got}.")
        length = tokens_CL.shape[1] + (0 if past is None else past.get_seq_length())
        longest = self.max_positions
        if longest is not None and length > longest:
            raise UserError(f"A context of {length} tokens is longer than the {longest} positions of {self.name}.")
        if tokens_CL.device.type == "cpu" and tokens_CL.numel() and int(tokens_CL.max()) >= self.vocab_size:
            raise UserError(
                f"Token id {int(tokens_CL.max())} is outside the {self.vocab_size} tokens of {self.name}; "
                "is the tokenizer the model's own?"
            )
        inputs: dict[str, Any] = {"input_ids": to_device(tokens_CL, self.device)}
        if attention_mask is not None:
            inputs["attention_mask"] = to_device(attention_mask, self.device)
        if hasattr(self.module, "config"):  # a transformers model; an nn.Module of one's own has no cache to switch off
            inputs["use_cache"] = past is not None
        if past is not None:
            inputs["past_key_values"] = past
        return inputs

    def _read(self, point: ResolvedHookPoint) -> Tensor:
        """The activation at a hook point, from inside a trace."""
        envoy = self._envoys[point.path]
        if point.io == "in":
            args, kwargs = envoy.inputs
            return kwargs[point.slot] if isinstance(point.slot, str) else args[point.slot]
        return envoy.output if point.slot is None else envoy.output[point.slot]

    def _write(self, point: ResolvedHookPoint, x: Tensor) -> None:
        """Put `x` in place of the activation, leaving whatever else the module takes or gives."""
        envoy, slot = self._envoys[point.path], point.slot
        if point.io == "in":
            args, kwargs = envoy.inputs
            if isinstance(slot, str):
                envoy.inputs = (args, {**kwargs, slot: x})
            else:
                envoy.inputs = ((*args[:slot], x, *args[slot + 1 :]), kwargs)  # type: ignore[operator]
        elif slot is None:
            envoy.output = x
        else:
            rest = envoy.output
            envoy.output = (*rest[:slot], x, *rest[slot + 1 :])  # type: ignore[operator]


def _replacement(point: ResolvedHookPoint, value: Replacement, x: Tensor, shape: torch.Size) -> Tensor:
    new = value(x.reshape(*shape, -1)) if callable(value) else value
    wanted = (*shape, x.shape[-1])
    if not isinstance(new, Tensor) or tuple(new.shape) != wanted:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise UserError(f"The replacement at '{point.name}' should be a tensor of shape {wanted}, got {got}.")
    return new.to(x).reshape(x.shape)


def _logits(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result[0]
