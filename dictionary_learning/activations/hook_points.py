"""Hook points: names for the places in a model where activations are read or replaced.

In comes a name and a model's module tree; out goes the path of one module and which side of it is meant. Nothing here
knows a model family: the blocks are the longest list of modules, a block's MLP and attention are found by what its
children are called, and shapes come from one probe forward. A model family nobody has seen needs no code, and what
the names cannot say (`fc2`, a gate, one projection) can be said as a module path.

    resid_post_layer_8   output of block 8             resid_pre_layer_8   its input
    mlp_out_layer_8      output of its MLP module      mlp_in_layer_8      its input (after the norm, if any)
    attn_out_layer_8     output of its attention       attn_in_layer_8     its input (after the norm, if any)
    model.layers.8.mlp:out, model.layers.8.mlp:in      any module by path; without a suffix, the output

"Output of the module" is meant literally: where a family normalises or scales it before adding it to the residual
stream (gemma-2), the hook point is in front of that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dictionary_learning.errors import UserError, did_you_mean

IO = Literal["in", "out"]

# Site -> (part of the block, side of it).
SITES: dict[str, tuple[str, IO]] = {
    "resid_pre": ("block", "in"),
    "resid_post": ("block", "out"),
    "mlp_in": ("mlp", "in"),
    "mlp_out": ("mlp", "out"),
    "attn_in": ("attn", "in"),
    "attn_out": ("attn", "out"),
}

_BY_LAYER = re.compile(r"(?P<site>\w+?)_layer_(?P<layer>-?\d+)")
# What a block's children are called, by name or else by class: `mlp`, `feed_forward`, `ffn`, `block_sparse_moe`, ...
_PARTS = {
    "mlp": re.compile(r"mlp|ffn|feed_?forward|moe|(^|_)ff(_|$)", re.IGNORECASE),
    "attn": re.compile(r"attn|attention", re.IGNORECASE),
}
# Children named after a neighbour: post_attention_layernorm, post_mlp_dropout.
_NOT_A_PART = re.compile(r"norm|drop|\bln", re.IGNORECASE)
_PART_NAMES = {"mlp": "MLP", "attn": "attention"}


@dataclass(frozen=True)
class HookPoint:
    """A place in a model by name: a `site` of block number `layer`, or one side (`io`) of the module at `path`."""

    name: str
    io: IO
    site: str | None = None
    layer: int | None = None
    path: str | None = None

    def locate(self, module: nn.Module) -> str:
        """The path of the module meant.

        Raises:
            UserError: the layer is out of range, the block has no such part, or there is no module at the path.
        """
        if self.site is None or self.layer is None:
            return self._locate_path(module)
        blocks_path, blocks = find_blocks(module)
        if not 0 <= self.layer < len(blocks):
            raise UserError(
                f"Layer {self.layer} of '{self.name}' is out of range: "
                f"{type(module).__name__} has layers 0 to {len(blocks) - 1}."
            )
        block_path = f"{blocks_path}.{self.layer}"
        part = SITES[self.site][0]
        return block_path if part == "block" else f"{block_path}.{find_part(blocks[self.layer], part, block_path)}"

    def _locate_path(self, module: nn.Module) -> str:
        paths = [path for path, _ in module.named_modules() if path]
        if self.path in paths:
            return str(self.path)
        known = paths + [f"{site}_layer_0" for site in SITES]
        raise UserError(f"{type(module).__name__} has no module '{self.path}'.{did_you_mean(self.path, known)}")


@dataclass(frozen=True)
class ResolvedHookPoint:
    """A hook point found in one model.

    `path` and `io` say which side of which module, `layer` the block it belongs to (None outside the blocks), `width`
    the last axis of the activation there, `order` its turn in the forward pass, and `slot` where the activation is in
    what the module takes or gives: None for the value itself, else a place in the tuple or a keyword.
    """

    name: str
    path: str
    io: IO
    layer: int | None
    width: int
    order: int
    slot: int | str | None


def parse_hook_point(name: str, io: IO = "out") -> HookPoint:
    """Name -> `HookPoint`; `io` is the side of a module path that names none.

    Raises:
        UserError: an unknown site, or a suffix other than ':in' and ':out'.
    """
    if match := _BY_LAYER.fullmatch(name):
        site = match["site"]
        if site not in SITES:
            near = did_you_mean(name, [f"{s}_layer_{match['layer']}" for s in SITES])
            raise UserError(f"Unknown site '{site}' in hook point '{name}'; known are {', '.join(SITES)}.{near}")
        return HookPoint(name, SITES[site][1], site=site, layer=int(match["layer"]))
    path, _, side = name.partition(":")
    if not path or (":" in name and side not in ("in", "out")):
        raise UserError(f"Hook point '{name}' should end in ':in' or ':out', as in 'model.layers.8.mlp:out'.")
    point_io: IO = "in" if (side or io) == "in" else "out"
    return HookPoint(name if side or point_io == "out" else f"{path}:in", point_io, path=path)


def hook_points_for(layers: Iterable[int], site: str = "resid_post") -> list[str]:
    """Names of one site in several layers: `hook_points_for([1])` is `["resid_post_layer_1"]`."""
    return [parse_hook_point(f"{site}_layer_{layer}").name for layer in layers]


def find_blocks(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of a model's blocks: its longest ModuleList that is not inside another; the first of equals.

    (Not inside another, because a mixture of experts may hold more experts in a block than it has blocks.)

    Raises:
        UserError: the model has no ModuleList.
    """
    if found := _outermost_lists(module):
        return max(found, key=lambda entry: len(entry[1]))
    raise UserError(
        f"{type(module).__name__} has no list of blocks to number layers by; "
        "name the module by its path, as in 'encoder.fc2:out'."
    )


def _outermost_lists(module: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    found: list[tuple[str, nn.ModuleList]] = []
    for path, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, child))
    return found


def layer_of(path: str, module: nn.Module) -> int | None:
    """Number of the block that the module at `path` is or belongs to, None when it is outside the blocks."""
    if not _outermost_lists(module):
        return None
    match = re.match(rf"{re.escape(find_blocks(module)[0])}\.(\d+)(\.|$)", path)
    return int(match[1]) if match else None


def find_part(block: nn.Module, part: str, block_path: str = "the block") -> str:
    """Name of the child of `block` that is its "mlp" or "attn": by the children's names, else by their classes.

    Raises:
        UserError: no child looks like it; the message lists them.
    """
    children = dict(block.named_children())
    classes = {name: type(child).__name__ for name, child in children.items()}
    names = [name for name in children if not _NOT_A_PART.search(f"{name} {classes[name]}")]
    for label in (lambda name: name, lambda name: classes[name]):
        for name in names:
            if _PARTS[part].search(label(name)):
                return name
    raise UserError(
        f"{block_path} has no {_PART_NAMES[part]} module among its children ({', '.join(children)}); "
        f"name one by its path, as in '{block_path}.{next(iter(children), 'child')}:out'."
    )


# ---- one probe forward: shapes, order and tuples of every module -------------------------------------------------

PROBE_SHAPE = (2, 5)  # contexts, tokens: unlike each other and unlike any usual number of heads


@dataclass
class Probed:
    """What the probe saw on one side of one module. `width` is None where no [contexts, tokens, d] passes."""

    order: int
    calls: int
    width: int | None
    slot: int | str | None
    shape: str


def probe(module: nn.Module, forward: Callable[[Tensor], Any], device: torch.device) -> dict[tuple[str, str], Probed]:
    """Run `forward` once on a few token ids with hooks on every module -> {(path, "in" | "out"): Probed}.

    `forward` takes token ids of `PROBE_SHAPE`. What ran, in which order and what passed is seen, not assumed, so that
    no table of model families is needed.
    """
    seen: dict[tuple[str, str], Probed] = {}

    def see(key: tuple[str, str], entries: Iterable[tuple[int | str | None, Any]]) -> None:
        if key in seen:
            seen[key].calls += 1
            return
        entries = list(entries)
        slot, width = next(((slot, value.shape[-1]) for slot, value in entries if _is_activation(value)), (None, None))
        shape = ", ".join(_shape(value) for _, value in entries) or "nothing"
        seen[key] = Probed(len(seen), 1, width, slot, shape)

    handles = []
    for path, child in module.named_modules():

        def before(_: nn.Module, args: tuple, kwargs: dict, path: str = path) -> None:
            see((path, "in"), [*enumerate(args), *kwargs.items()])

        def after(_: nn.Module, args: tuple, out: Any, path: str = path) -> None:
            see((path, "out"), enumerate(out) if isinstance(out, (tuple, list)) else [(None, out)])

        handles += [child.register_forward_pre_hook(before, with_kwargs=True), child.register_forward_hook(after)]
    try:
        with torch.no_grad():
            forward(torch.ones(PROBE_SHAPE, dtype=torch.long, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _is_activation(value: Any) -> bool:
    """A float tensor [contexts, tokens, d], or [contexts * tokens, d] as some expert layers pass it."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    contexts, tokens = PROBE_SHAPE
    return tuple(value.shape[:-1]) in ((contexts, tokens), (contexts * tokens,))


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
