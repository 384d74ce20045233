"""Reading what passes in a module with plain forward hooks, and breaking the forward off behind the last of them.

In: a module, hook points, and a function that runs the module. Out: one tensor a hook point. For modules that a trace
does not fit (no tokens, arguments of their own); language models are read by `TracedLM`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dictionary_learning.activations.hook_points import IO, HookPoint, parse_hook_point
from dictionary_learning.errors import UserError, did_you_mean

SIDES: dict[str, tuple[IO, ...]] = {"out": ("out",), "in": ("in",), "in_and_out": ("in", "out")}


class _Stop(BaseException):
    """Every hook point was seen. Not an Exception, which a module may catch."""


def find_points(module: nn.Module, places: Any, io: str = "out") -> list[HookPoint]:
    """Hook points by name, path or submodule; two a place for "in_and_out". Raises UserError for what is not there."""
    if io not in SIDES:
        raise UserError(f"io must be one of {', '.join(SIDES)}, got '{io}'.{did_you_mean(io, SIDES)}")
    places = list(places) if isinstance(places, list | tuple) else [places]
    if not places:
        raise UserError("No hook point given: name at least one module by its path.")
    paths = {id(child): path for path, child in module.named_modules() if path}
    points: dict[str, HookPoint] = {}
    for place in places:
        if isinstance(place, nn.Module):
            if id(place) not in paths:
                raise UserError(
                    f"The {type(place).__name__} given as hook point is not a submodule of {type(module).__name__}."
                )
            place = paths[id(place)]
        if not isinstance(place, str):
            raise UserError(f"A hook point is a module's path or the module itself, not {type(place).__name__}.")
        if io == "in_and_out" and place.endswith((":in", ":out")):
            raise UserError(f"With io='in_and_out' a hook point names no side: write '{place.rpartition(':')[0]}'.")
        for side in SIDES[io]:
            point = parse_hook_point(place, side)
            point.locate(module)
            if io == "in_and_out" and point.io != side:
                raise UserError(f"'{place}' says its side by itself: for io='{io}' give the path of a module.")
            points[point.name] = point
    return list(points.values())


@torch.no_grad()
def capture(
    module: nn.Module,
    points: Sequence[tuple[str, str, IO]],
    run: Callable[[], Any],
    value: Callable[[str, Any], Tensor],
    *,
    whole: bool = False,
) -> dict[str, Tensor]:
    """What passes at hook points while `run()` runs the module, which is broken off behind the last of them.

    Args:
        points: (name, path, side).
        value: `value(name, passed)` -> the tensor meant, from a module's output or (input) its arguments as a tuple.
        whole: let the forward run to its end, to see that each module runs once only.

    Raises:
        UserError: a module did not run, or (with `whole`) more than once.
    """
    seen: dict[str, Tensor] = {}
    calls = dict.fromkeys((name for name, _, _ in points), 0)

    def see(name: str, passed: Any) -> None:
        calls[name] += 1
        if name in seen:
            return
        # A copy, because what runs afterwards may change it in place.
        seen[name] = value(name, passed).detach().clone()
        if not whole and len(seen) == len(points):
            raise _Stop

    handles = []
    for name, path, io in points:
        child = module.get_submodule(path)
        if io == "in":

            def before(_: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                passed = (*args, *kwargs.values())
                see(name, passed[0] if len(passed) == 1 else passed)

            handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(child.register_forward_hook(lambda _, __, out, name=name: see(name, out)))
    try:
        run()
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for name, count in calls.items():
        if count != 1:
            times = "does not run" if count == 0 else f"runs {count} times, not once,"
            raise UserError(f"'{name}' {times} in a forward pass of {type(module).__name__}: choose another module.")
    return {name: seen[name] for name, _, _ in points}


def is_activation(value: Any) -> bool:
    """A float tensor [examples, ..., width]."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def first_activation(value: Any) -> Any:
    """The first activation in a tuple or list, which is how modules pass several things; else the value itself."""
    if isinstance(value, tuple | list):
        return next((item for item in value if is_activation(item)), value)
    return value


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`; tuples, lists and mappings keep their shape."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
