"""What a dictionary is: encode, decode, forward, load. How it learns lives in `trainers/`.

D is the width of the activations, F the number of latents. Encoder and decoder weights are kept with one latent's
weights contiguous in memory, also where the attribute's shape is the transpose ([D, F]), because everything sparse
reads and writes whole latents. `encoder_rows` and `decoder_rows` give that [F, D] view for every architecture.

Parameter names and shapes on disk are those of the `dictionary-learning` package, so that each reads the other's files.
"""

from __future__ import annotations

import os
import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, overload

import torch
from torch import Tensor, nn

from dictionary_learning.errors import UserError, did_you_mean

DICTIONARIES: dict[str, type[Dictionary]] = {}  # class name (`dict_class` in config.json) -> class


class Dictionary(nn.Module, ABC):
    """A collection of F feature directions in activation space with an encoder and a decoder.

    Every method takes x of shape [..., D] and codes of shape [..., F].
    """

    dict_size: int
    activation_dim: int
    decoder_bias_name: ClassVar[str]
    scaled_with_data: ClassVar[tuple[str, ...]]  # parameters in units of the activations

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__.startswith("_"):  # a base of several architectures, not one
            return
        if cls.__name__ in DICTIONARIES:
            raise TypeError(f"two dictionary classes are named '{cls.__name__}'")
        DICTIONARIES[cls.__name__] = cls

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__()
        for name, size in (("activation_dim", activation_dim), ("dict_size (width)", dict_size)):
            if not isinstance(size, int) or size < 1:
                raise UserError(f"{name} must be a positive integer, got {size!r}.")
        self.activation_dim, self.dict_size = activation_dim, dict_size

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., D] -> codes [..., F], zero where a latent does not fire."""

    @abstractmethod
    def decode(self, f: Tensor) -> Tensor:
        """Codes [..., F] -> reconstructions [..., D]."""

    @property
    @abstractmethod
    def encoder_rows(self) -> Tensor:
        """[F, D], one latent's encoder weights a row (a view of the parameter)."""

    @property
    @abstractmethod
    def decoder_rows(self) -> Tensor:
        """[F, D], one latent's direction a row (a view of the parameter)."""

    @property
    def decoder_bias(self) -> nn.Parameter:
        """[D], the bias added to every reconstruction."""
        return getattr(self, self.decoder_bias_name)

    @overload
    def forward(self, x: Tensor, output_features: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, output_features: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, output_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction of x, and with `output_features` the codes too."""
        f = self.encode(x)
        x_hat = self.decode(f)
        return (x_hat, f) if output_features else x_hat

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Make a dictionary trained on x / scale do the same on x: weights stay, what has the units of x is scaled."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for name in self.scaled_with_data:
            tensors[name].mul_(scale)

    @classmethod
    @abstractmethod
    def from_state_dict(cls, state: dict[str, Tensor], **kwargs: Any) -> Self:
        """A dictionary of the sizes and values in `state`."""

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
        except (KeyError, RuntimeError, ValueError) as error:  # a tensor missing, left over, or of another shape
            raise UserError(
                f"'{os.fspath(path)}' does not hold a {cls.__name__}: its tensors are {', '.join(sorted(state))}."
            ) from error
        return dictionary.to(dtype=dtype, device=device)


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
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # what PyTorch advises here is to load it unrestricted: never
        raise UserError(f"'{file}' holds something other than plain tensors and was not loaded.") from error
    except Exception as error:  # each format has errors of its own; all mean that the file can't be used
        raise UserError(f"'{file}' is not a readable file of weights ({type(error).__name__}).") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"'{file}' does not hold a dictionary's weights: expected named tensors.")
    return state


def dictionary_class(name: str) -> type[Dictionary]:
    """The dictionary class of a name, as `dict_class` in a config.json gives it.

    Raises:
        UserError: no such class.
    """
    if name not in DICTIONARIES:
        raise UserError(
            f"Dictionary class '{name}' is unknown: use one of {', '.join(DICTIONARIES)}."
            f"{did_you_mean(name, DICTIONARIES)}"
        )
    return DICTIONARIES[name]


def unit_rows(dict_size: int, activation_dim: int) -> Tensor:
    """[F, D] random directions of norm 1, drawn from torch's default generator (trainers seed it)."""
    rows_FD = torch.randn(dict_size, activation_dim)
    return rows_FD / rows_FD.norm(dim=1, keepdim=True)


class _LinearDictionary(Dictionary):
    """Weights as `encoder` and `decoder` linear maps, tied at the start: encoder rows equal decoder rows."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__(activation_dim, dict_size)
        rows_FD = unit_rows(dict_size, activation_dim)
        self.encoder = nn.utils.skip_init(nn.Linear, activation_dim, dict_size)
        self.decoder = nn.utils.skip_init(nn.Linear, dict_size, activation_dim, bias=False)
        self.encoder.weight = nn.Parameter(rows_FD.clone())
        self.encoder.bias = nn.Parameter(torch.zeros(dict_size))
        self.decoder.weight = nn.Parameter(rows_FD.t())  # [D, F] with contiguous rows of [F, D] underneath
        self.register_parameter(self.decoder_bias_name, nn.Parameter(torch.zeros(activation_dim)))

    @property
    def encoder_rows(self) -> Tensor:
        return self.encoder.weight

    @property
    def decoder_rows(self) -> Tensor:
        return self.decoder.weight.t()

    def preactivations(self, x: Tensor) -> Tensor:
        """[..., F] values before the nonlinearity: W_enc (x - b_dec) + b_enc."""
        return self.encoder(x - self.decoder_bias)

    def decode(self, f: Tensor) -> Tensor:
        return self.decoder(f) + self.decoder_bias

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], **kwargs: Any) -> Self:
        dict_size, activation_dim = state["encoder.weight"].shape
        dictionary = cls(activation_dim, dict_size, **kwargs)
        dictionary.load_state_dict(state)
        return dictionary


class AutoEncoder(_LinearDictionary):
    """The standard SAE: f = ReLU(W_enc (x - b) + b_enc), x_hat = W_dec f + b.

    Source: Bricken et al. 2023, "Towards Monosemanticity", section "Sparse autoencoder setup".
    """

    decoder_bias_name = "bias"
    scaled_with_data = ("bias", "encoder.bias")

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.preactivations(x))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give decoder rows unit norm and their norms to the encoder: the same function, comparable codes."""
        norms_F = self.decoder_rows.norm(dim=1)
        if torch.allclose(norms_F, torch.ones_like(norms_F)):
            return
        norms_F.clamp_min_(torch.finfo(norms_F.dtype).tiny)
        self.decoder.weight.div_(norms_F)
        self.encoder.weight.mul_(norms_F[:, None])
        self.encoder.bias.mul_(norms_F)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], normalize_decoder: bool = True, **kwargs: Any) -> Self:
        dictionary = super().from_state_dict(state, **kwargs)
        if normalize_decoder:
            dictionary.normalize_decoder()
        return dictionary


class AutoEncoderTopK(_LinearDictionary):
    """The TopK SAE: only the k largest ReLU pre-activations of each input are kept.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv:2406.04093), section 2.3.

    `threshold` is the running mean of the smallest kept activation; with it `encode(use_threshold=True)` treats each
    latent on its own, whatever the others do. It is -1 until training has measured it.
    """

    decoder_bias_name = "b_dec"
    scaled_with_data = ("b_dec", "encoder.bias", "threshold")

    k: Tensor
    threshold: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size)
        if not isinstance(k, int) or not 0 < k <= dict_size:
            raise UserError(f"k must be a positive integer of at most the width {dict_size}, got {k!r}.")
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))

    @overload
    def encode(self, x: Tensor, return_topk: Literal[False] = False, use_threshold: bool = False) -> Tensor: ...
    @overload
    def encode(
        self, x: Tensor, return_topk: Literal[True], use_threshold: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def encode(
        self, x: Tensor, return_topk: bool = False, use_threshold: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes [..., F]; with `return_topk` also their k values, their indices, and all ReLU pre-activations."""
        acts_F = torch.relu(self.preactivations(x))
        if use_threshold:
            if self.threshold < 0:
                raise UserError("This TopK dictionary has no measured threshold: encode without use_threshold.")
            f = acts_F * (acts_F > self.threshold)
            if not return_topk:
                return f
            top = f.topk(int(self.k), dim=-1, sorted=False)
            return f, top.values, top.indices, acts_F
        top = acts_F.topk(int(self.k), dim=-1, sorted=False)
        f = torch.zeros_like(acts_F).scatter(-1, top.indices, top.values)
        return (f, top.values, top.indices, acts_F) if return_topk else f

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], k: int | None = None, **kwargs: Any) -> Self:
        """`k` is needed for files that don't hold it.

        Raises:
            UserError: `k` is another than the file's.
        """
        if k is None:
            k = int(state["k"])
        elif "k" in state and k != int(state["k"]):
            raise UserError(f"This dictionary was trained with k = {int(state['k'])}, and k = {k} was asked for.")
        state = {"threshold": torch.tensor(-1.0), **state, "k": torch.tensor(k, dtype=torch.int)}
        return super().from_state_dict(state, k=k, **kwargs)


class JumpReluAutoEncoder(Dictionary):
    """The JumpReLU SAE: z = x W_enc + b_enc, f = z where z > threshold and 0 elsewhere, x_hat = f W_dec + b_dec.

    Source: Rajamanoharan et al. 2024, "Jumping ahead" (arXiv:2407.14435), equations 3 to 5; its appendix I sets the
    first threshold to 0.001. `apply_b_dec_to_input` (off by default) subtracts b_dec before encoding.
    """

    decoder_bias_name = "b_dec"
    scaled_with_data = ("b_dec", "b_enc", "threshold")

    def __init__(self, activation_dim: int, dict_size: int, device: torch.device | str | None = None) -> None:
        super().__init__(activation_dim, dict_size)
        rows_FD = unit_rows(dict_size, activation_dim)
        self.W_enc = nn.Parameter(rows_FD.clone().t())  # [D, F] with contiguous rows of [F, D] underneath
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(rows_FD)
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))
        self.threshold = nn.Parameter(torch.full((dict_size,), 0.001))
        self.apply_b_dec_to_input = False
        if device is not None:
            self.to(device)

    @property
    def encoder_rows(self) -> Tensor:
        return self.W_enc.t()

    @property
    def decoder_rows(self) -> Tensor:
        return self.W_dec

    def preactivations(self, x: Tensor) -> Tensor:
        """[..., F] values before the jump."""
        if self.apply_b_dec_to_input:
            x = x - self.b_dec
        return x @ self.W_enc + self.b_enc

    @overload
    def encode(self, x: Tensor, output_pre_jump: Literal[False] = False) -> Tensor: ...
    @overload
    def encode(self, x: Tensor, output_pre_jump: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Codes [..., F]; with `output_pre_jump` also the pre-activations."""
        pre = self.preactivations(x)
        f = torch.relu(pre * (pre > self.threshold))
        return (f, pre) if output_pre_jump else f

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], **kwargs: Any) -> Self:
        activation_dim, dict_size = state["W_enc"].shape
        dictionary = cls(activation_dim, dict_size, **kwargs)
        dictionary.load_state_dict(state)
        return dictionary


class IdentityDict(Dictionary):
    """The identity: codes are the activations. A baseline for evaluation and intervention code."""

    decoder_bias_name = ""
    scaled_with_data = ()

    def __init__(self, activation_dim: int | None = None) -> None:
        nn.Module.__init__(self)
        self.activation_dim = self.dict_size = activation_dim  # type: ignore[assignment]

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, f: Tensor) -> Tensor:
        return f

    @property
    def encoder_rows(self) -> Tensor:
        return torch.eye(self.activation_dim)

    decoder_rows = encoder_rows

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], **kwargs: Any) -> Self:
        return cls(**kwargs)
