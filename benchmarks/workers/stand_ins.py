"""Stands in for torchvision where there is none: overcomplete imports it for its image models, which no step uses, and
the CPU builds of torch come without one."""

from __future__ import annotations

import importlib.util
import sys
import types

if importlib.util.find_spec("torchvision") is None:
    stand_in, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    stand_in.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": stand_in, "torchvision.transforms": transforms}
