"""A dictionary as SAEBench wants its SAEs: a module with `encode`, `decode`, `forward`, weights and `cfg`.

    sae = saebench_sae(*load_dictionary("runs/first/trainer_0"))
    evaluation(sae)                                            # any of SAEBench's custom-SAE evaluations

SAEBench compares codes between latents and so wants decoder rows of norm 1: a latent's norm moves to its code. Nothing
of SAEBench is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.formats import files
from dictionary_learning.formats.coder import CannotHold, Coder, as_coder
from dictionary_learning.formats.hook_names import transformer_lens_name


@dataclasses.dataclass
class SAEBenchConfig:
    """What SAEBench reads of an SAE; the names are its own."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    context_size: int | None = None
    hook_head_index: int | None = None
    prepend_bos: bool = True
    apply_b_dec_to_input: bool = False
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    finetuning_scaling_factor: bool = False
    model_from_pretrained_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class SAEBenchSAE(nn.Module):
    """Parameters `W_enc [D, F]`, `W_dec [F, D]` (rows of norm 1), `b_enc`, `b_dec`; any leading axes on input."""

    threshold: Tensor | None
    ranking_F: Tensor | None

    def __init__(self, coder: Coder, cfg: SAEBenchConfig) -> None:
        super().__init__()
        norms_F = coder.decoder_FO.norm(dim=1)
        norms_F = torch.where(norms_F > 0, norms_F, 1.0)
        unit = coder if coder.has_unit_decoder else coder.scaled(norms_F)
        self.W_enc = nn.Parameter(unit.encoder_FD.t().contiguous())
        self.b_enc = nn.Parameter(unit.encoder_bias_F.clone())
        self.W_dec = nn.Parameter(unit.decoder_FO.clone())
        self.b_dec = nn.Parameter(unit.decoder_bias_O.clone())
        self.register_buffer("threshold", unit.threshold_F if unit.activation == "jumprelu" else None)
        # TopK chooses by the codes as they were trained, whatever unit they are handed out in.
        self.register_buffer("ranking_F", 1 / norms_F if unit is not coder and unit.activation == "topk" else None)
        self.k, self.subtracts_bias, self.cfg = unit.k, unit.subtracts_bias, cfg

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def to(self, *args: Any, **kwargs: Any) -> SAEBenchSAE:
        super().to(*args, **kwargs)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., D] -> codes [..., F]."""
        x = x.to(self.dtype)
        acts_F = (x - self.b_dec if self.subtracts_bias else x) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            acts_F = acts_F * (acts_F > self.threshold)
        acts_F = torch.relu(acts_F)
        if self.k is None:
            return acts_F
        ranked_F = acts_F if self.ranking_F is None else acts_F * self.ranking_F
        kept = ranked_F.topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(acts_F).scatter(-1, kept, acts_F.gather(-1, kept))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Codes [..., F] -> reconstructions [..., D]."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x."""
        return self.decode(self.encode(x))


def saebench_sae(dictionary: Dictionary, config: Mapping[str, Any], *, model_name: str | None = None) -> SAEBenchSAE:
    """The adapter of a dictionary, with what its config knows of model and hook point; on the dictionary's device.

    Args:
        model_name: as TransformerLens calls the model, where the config has another name for it.

    Raises:
        CannotHold: a transcoder, or group-max; see also `as_coder`.
    """
    coder = as_coder(dictionary)
    if coder.transcodes:
        raise CannotHold("SAEBench evaluates autoencoders, and this is a transcoder.")
    if coder.activation in ("gated", "groupmax"):
        coder = coder.as_jumprelu()
    facts = files.facts_of(config)
    model = model_name or facts.model or ""
    cfg = SAEBenchConfig(
        model_name=model,
        d_in=coder.d_in,
        d_sae=coder.d_sae,
        hook_layer=facts.layer or 0,
        hook_name=transformer_lens_name(facts.hook_point, model) or "",
        architecture={"relu": "standard"}.get(coder.activation, coder.activation),
        context_size=facts.ctx_len,
        prepend_bos=facts.adds_bos,
        apply_b_dec_to_input=coder.subtracts_bias,
        activation_fn_str="topk" if coder.activation == "topk" else "relu",
        activation_fn_kwargs={"k": coder.k} if coder.k is not None else {},
        dataset_path=facts.corpus or "",
    )
    weights = dictionary.decoder_rows
    return SAEBenchSAE(coder, cfg).to(device=weights.device, dtype=weights.dtype).requires_grad_(False)
