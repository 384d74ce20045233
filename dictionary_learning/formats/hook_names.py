"""Hook points as other libraries name them: TransformerLens (`blocks.8.hook_resid_post`), and module paths.

Only names that mean the same activation are translated. TransformerLens has no name for what goes into an MLP or
attention behind the norm, and in Gemma 2 and 3 its `hook_mlp_out` and `hook_attn_out` lie behind a norm that our hook
points lie in front of: there our name is kept.
"""

from __future__ import annotations

import re

from dictionary_learning.activations.hook_points import SITES

_SAME_SITES = {site: f"hook_{site}" for site in ("resid_pre", "resid_post", "mlp_out", "attn_out")}
_OURS = re.compile(rf"({'|'.join(SITES)})_layer_(\d{{1,6}})")
_THEIRS = re.compile(r"blocks\.(\d{1,6})\.hook_(\w+)")
_POST_NORMED = re.compile(r"gemma-?[23]", re.IGNORECASE)
_BLOCK_PATH = re.compile(r"(?:\w+\.)*(?:layers|layer|h|blocks)\.(\d{1,6})(\.mlp|)")  # as sparsify names its folders


def transformer_lens_name(hook_point: str | None, model_name: str | None) -> str | None:
    """`resid_post_layer_8` -> `blocks.8.hook_resid_post`; a name without an equal is handed back as it is."""
    match = _OURS.fullmatch(hook_point or "")
    if match is None or match[1] not in _SAME_SITES:
        return hook_point
    if not match[1].startswith("resid") and _POST_NORMED.search(model_name or ""):
        return hook_point
    return f"blocks.{match[2]}.{_SAME_SITES[match[1]]}"


def is_transformer_lens_name(name: str | None) -> bool:
    return _THEIRS.fullmatch(name or "") is not None


def from_transformer_lens(name: str | None, model_name: str | None) -> tuple[str | None, int | None]:
    """(our hook point, layer) of a TransformerLens name; a name without an equal is handed back as it is."""
    match = _THEIRS.fullmatch(name or "")
    if match is None:
        layer = re.match(r"blocks\.(\d{1,6})\.", name or "")
        ours = _OURS.fullmatch(name or "")
        return name, int(layer[1]) if layer else int(ours[2]) if ours else None
    hook_point = f"{match[2]}_layer_{match[1]}"
    same = match[2] in _SAME_SITES and transformer_lens_name(hook_point, model_name) == name
    return (hook_point if same else name), int(match[1])


def from_module_path(path: str) -> tuple[str | None, int | None]:
    """(our hook point, layer) of a module path such as sparsify's `layers.8.mlp`; (None, None) for anything else."""
    match = _BLOCK_PATH.fullmatch(path)
    if match is None:
        return None, None
    return f"{'mlp_out' if match[2] else 'resid_post'}_layer_{match[1]}", int(match[1])
