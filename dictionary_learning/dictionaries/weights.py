"""The tensors of a file of weights: safetensors, or a pickle restricted to tensors. Nothing in a file is executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.untrusted import read_pickled


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a weights file (safetensors, or a pickle restricted to tensors), or of the one in a folder.

    Raises:
        UserError: nothing there, or not a file of weights.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        found = [file / name for name in ("ae.safetensors", "ae.pt") if (file / name).is_file()]
        if not found:
            raise UserError(f"'{file}' holds neither ae.safetensors nor ae.pt: give the folder of one dictionary.")
        file = found[0]
    if not file.is_file():
        raise UserError(f"No dictionary at '{file}'.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = read_pickled(file)
    except pickle.UnpicklingError as error:
        raise UserError(f"'{file}' holds something other than plain tensors and was not loaded.") from error
    except Exception as error:  # each format has errors of its own; all mean that the file can't be used
        raise UserError(f"'{file}' is not a readable file of weights ({type(error).__name__}).") from error
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise UserError(f"'{file}' does not hold a dictionary's weights: expected named tensors.")
    return state
