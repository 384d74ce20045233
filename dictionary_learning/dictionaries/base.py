"""What every dictionary is: an encoder, a decoder, F latents; sizes, units, files, and the registry of classes.

D is the width of the activations, F the number of latents. Encoder and decoder weights are kept with one latent's
weights contiguous in memory, also where the attribute's shape is the transpose ([D, F]), because everything sparse
reads and writes whole latents. A class says where its parameters are; `encoder_rows`, `encoder_bias`, `pre_bias`,
`decoder_rows` and `decoder_bias` then name them for every architecture alike.

Parameter names and shapes on disk are those of the `dictionary-learning` package, so that each reads the other's files.

With `output_dim` a dictionary of any architecture is a transcoder: it encodes the activations of one site and predicts
those of another, of width D_out. It has no pre-bias, because the decoder bias lives in the other space. With `skip` the
prediction is also given a linear map of the input. A file of weights says so itself, by a tensor `transcodes_to`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self, overload

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from dictionary_learning.dictionaries.weights import read_weights
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.untrusted import listed, shown

DICTIONARIES: dict[str, type[Dictionary]] = {}  # class name (`dict_class` in config.json) -> class


class Dictionary(nn.Module, ABC):
    """A collection of F feature directions in activation space with an encoder and a decoder.

    Every method takes x of shape [..., D] and codes of shape [..., F]; reconstructions are [..., D_out], and D_out is D
    but for transcoders.

    Args:
        output_dim: D_out of a transcoder (Dunefsky et al. 2024, arXiv:2406.11944); None for an autoencoder.
        skip: whether a transcoder adds W_skip x, W_skip [D_out, D] being zero at first (Paulo et al. 2025,
            arXiv:2501.18823).
    """

    dict_size: int
    activation_dim: int
    output_dim: int
    is_transcoder: bool
    W_skip: nn.Parameter | None
    encoder_bias_name: ClassVar[str]
    decoder_bias_name: ClassVar[str]
    subtracts_decoder_bias: ClassVar[bool] = True  # from the input, before encoding
    unit_norm_decoder: bool = True  # whether decoder rows are meant to stay of norm 1
    scaled_with_data: tuple[str, ...]  # parameters and buffers in units of the activations (of a transcoder's output)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__.startswith("_"):  # a base of several architectures, not one
            return
        if cls.__name__ in DICTIONARIES:
            raise TypeError(f"two dictionary classes are named '{cls.__name__}'")
        DICTIONARIES[cls.__name__] = cls

    def __init__(
        self, activation_dim: int, dict_size: int, *, output_dim: int | None = None, skip: bool = False
    ) -> None:
        super().__init__()
        sizes = [("activation_dim", activation_dim), ("dict_size (width)", dict_size)]
        for name, size in sizes + ([] if output_dim is None else [("output_dim", output_dim)]):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise UserError(f"{name} must be a positive integer, got {size!r}.")
        if skip and output_dim is None:
            raise UserError("An autoencoder has no skip connection, it would copy its input: give output_dim.")
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.is_transcoder = output_dim is not None
        self.output_dim = activation_dim if output_dim is None else output_dim
        self.register_buffer("transcodes_to", None if output_dim is None else torch.tensor(output_dim))
        W_skip = nn.Parameter(torch.zeros(self.output_dim, activation_dim)) if skip else None
        self.register_parameter("W_skip", W_skip)

    def _initial_rows(self) -> tuple[Tensor, Tensor]:
        """[F, D] encoder and [F, D_out] decoder rows of norm 1: equal at first where both are of one space."""
        encoder_FD = unit_rows(self.dict_size, self.activation_dim)
        return encoder_FD, unit_rows(self.dict_size, self.output_dim) if self.is_transcoder else encoder_FD.clone()

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., D] -> codes [..., F], zero where a latent does not fire."""

    def decode(self, f: Tensor) -> Tensor:
        """Codes [..., F] -> reconstructions [..., D_out]: W_dec f + b_dec, without what a skip connection adds."""
        return functional.linear(f, self.decoder_rows.t(), self.decoder_bias)

    def reconstruct(self, f: Tensor, x: Tensor) -> Tensor:
        """What `forward` gives for the codes f of x: `decode(f)`, and W_skip x besides where there is a skip."""
        x_hat = self.decode(f)
        return x_hat if self.W_skip is None else x_hat + functional.linear(x, self.W_skip)

    def preactivations(self, x: Tensor) -> Tensor:
        """[..., F] values before the nonlinearity: W_enc (x - pre_bias) + b_enc."""
        if self.pre_bias is not None:
            x = x - self.pre_bias
        return functional.linear(x, self.encoder_rows, self.encoder_bias)

    @property
    @abstractmethod
    def encoder_rows(self) -> Tensor:
        """[F, D], one latent's encoder weights a row (a view of the parameter)."""

    @property
    @abstractmethod
    def decoder_rows(self) -> Tensor:
        """[F, D_out], one latent's direction a row (a view of the parameter)."""

    @property
    def encoder_bias(self) -> nn.Parameter:
        """[F], the bias added to every latent's encoding."""
        return self._parameter_named(self.encoder_bias_name)

    @property
    def decoder_bias(self) -> nn.Parameter:
        """[D_out], the bias added to every reconstruction."""
        return self._parameter_named(self.decoder_bias_name)

    def _parameter_named(self, name: str) -> nn.Parameter:
        """A parameter by its name on disk, past a property that may have the same name."""
        module, _, leaf = name.rpartition(".")
        parameter = self.get_submodule(module)._parameters[leaf]
        assert parameter is not None
        return parameter

    @property
    def pre_bias(self) -> nn.Parameter | None:
        """[D], the parameter that is subtracted from the input (it is the decoder bias), or None."""
        return self.decoder_bias if self.subtracts_decoder_bias and not self.is_transcoder else None

    @overload
    def forward(self, x: Tensor, output_features: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, output_features: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, output_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction of x (of a transcoder: the prediction from x), and with `output_features` the codes."""
        f = self.encode(x)
        x_hat = self.reconstruct(f, x)
        return (x_hat, f) if output_features else x_hat

    @torch.no_grad()
    def scale_biases(self, scale: float, output_scale: float | None = None) -> None:
        """Make a dictionary trained on x / scale do the same on x: what has the units of x is scaled.

        Args:
            output_scale: of a transcoder's output, where it is another. Codes then have the output's units, so that
                decoder rows keep their norms: the encoder's weights, and W_skip, take on the ratio of the two.

        Raises:
            UserError: two scales for an autoencoder.
        """
        units = scale if output_scale is None else output_scale
        if units != scale and not self.is_transcoder:
            raise UserError(f"An autoencoder has one scale, got {scale} for its input and {units} for its output.")
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for name in self.scaled_with_data:
            tensors[name].mul_(units)
        if units != scale:
            self.encoder_rows.mul_(units / scale)
            if self.W_skip is not None:
                self.W_skip.mul_(units / scale)

    @classmethod
    @abstractmethod
    def _sizes(cls, state: dict[str, Tensor]) -> tuple[int, int, int]:
        """(D, F, D_out) of the weights in `state`."""

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], **kwargs: Any) -> Self:
        """A dictionary of the sizes and values in `state`."""
        activation_dim, dict_size, output_dim = cls._sizes(state)
        if "transcodes_to" in state:
            if int(state["transcodes_to"]) != output_dim:
                raise ValueError("the decoder is of another width than the file says")
            kwargs = {"output_dim": output_dim, "skip": "W_skip" in state} | kwargs
        made = dict_size * (activation_dim + output_dim) + ("W_skip" in state) * activation_dim * output_dim
        if made > 2 * sum(tensor.numel() for tensor in state.values()):  # two thin matrices can ask for a wide one
            raise ValueError("the encoder and the decoder don't fit together")
        dictionary = cls(activation_dim, dict_size, **kwargs)
        dictionary.load_state_dict(state)
        return dictionary

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a dictionary from `ae.safetensors`, an `ae.pt`, the folder that holds one, or the Hub.

        `user/repo` (or hf://user/repo) is a repository on the Hub: its `subfolder`, or without one the best of a
        pushed run, at a `revision` (default: the newest).

        Raises:
            UserError: no such file, not a file of weights, or weights of another architecture.
        """
        if isinstance(path, str) or subfolder or revision:
            from dictionary_learning.hub_load import local_folder

            path = local_folder(path, revision, subfolder)
        state = read_weights(path)
        try:
            dictionary = cls.from_state_dict(state, **kwargs)
        except UserError:
            raise
        except (KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:  # missing, of another shape
            raise UserError(
                f"'{os.fspath(path)}' does not hold a {cls.__name__}: its tensors are {listed(sorted(state))}."
            ) from error
        return dictionary.to(dtype=dtype, device=device)


def dictionary_class(name: str) -> type[Dictionary]:
    """The dictionary class of a name, as `dict_class` in a config.json gives it.

    Raises:
        UserError: no such class.
    """
    if name not in DICTIONARIES:
        raise UserError(
            f"Dictionary class '{shown(name)}' is unknown: use one of {', '.join(DICTIONARIES)}."
            f"{did_you_mean(name, DICTIONARIES)}"
        )
    return DICTIONARIES[name]


def unit_rows(dict_size: int, activation_dim: int) -> Tensor:
    """[F, D] random directions of norm 1, drawn from torch's default generator (trainers seed it)."""
    rows_FD = torch.randn(dict_size, activation_dim)
    return rows_FD / rows_FD.norm(dim=1, keepdim=True)
