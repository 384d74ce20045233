"""Tiny random models of five families and a toy tokenizer, made in the process: no network, milliseconds a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.kernels.matmul import fast_matmul
from dictionary_learning.packing import TokenBatch

VOCAB = 320
FAMILIES = ("gpt2", "gemma2", "llama", "gpt_neox", "falcon")  # falcon adds to the output of its MLP in place
TEXT = [
    "The left ventricle pumps oxygenated blood into the aorta.",
    "Metformin lowers hepatic glucose production; it does not cause hypoglycaemia on its own.",
    "A 54-year-old man presents with crushing chest pain radiating to the left arm.",
    "Which nerve innervates the deltoid muscle? The axillary nerve.",
]


def build(family: str, seed: int = 0) -> nn.Module:
    import transformers as t

    torch.manual_seed(seed)
    ids: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 4, "max_position_embeddings": 64}
    if family == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_layer=4, n_embd=32, n_head=4, n_positions=64, **ids))
    elif family == "gemma2":
        config = t.Gemma2Config(**shape, **heads, **ids, num_key_value_heads=2, head_dim=8, sliding_window=4)
        model = t.Gemma2ForCausalLM(config)
    elif family == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**shape, **heads, **ids, num_key_value_heads=2))
    elif family == "falcon":
        model = t.FalconForCausalLM(t.FalconConfig(**shape, num_attention_heads=4, **ids))
    else:
        model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**shape, **heads, **ids))
    with torch.no_grad():  # weights large enough that a mixed-up site would show
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return model.eval()


@pytest.fixture(autouse=True)
def products_as_in_the_harvest() -> Iterator[None]:
    """What a test computes with the model itself comes from the same library as what it is compared with."""
    with fast_matmul():
        yield


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong model id must fail at once, whatever network the machine has."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class Family(NamedTuple):
    """A model, and where its parts are, written down by hand to check what the code finds by itself."""

    lm: TracedLM
    blocks: str
    attn: str
    mlp: str = "mlp"

    def path(self, site: str, layer: int) -> str:
        part = {"resid": "", "mlp": f".{self.mlp}", "attn": f".{self.attn}"}[site.split("_")[0]]
        return f"{self.blocks}.{layer}{part}"


PARTS = {
    "gpt2": ("transformer.h", "attn"),
    "gemma2": ("model.layers", "self_attn"),
    "llama": ("model.layers", "self_attn"),
    "gpt_neox": ("gpt_neox.layers", "attention"),
    "falcon": ("transformer.h", "self_attention"),
}


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    return {name: Family(TracedLM.load(build(name)), *PARTS[name]) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


@pytest.fixture(params=("gpt2", "gemma2"))
def lm(request: pytest.FixtureRequest, families: dict[str, Family]) -> TracedLM:
    return families[request.param].lm


@pytest.fixture
def gpt2(families: dict[str, Family]) -> TracedLM:
    return families["gpt2"].lm


@pytest.fixture
def tokens_CL() -> Tensor:
    return torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(TEXT, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def by_torch_hooks(module: nn.Module, points: dict[str, tuple[str, str]], **inputs: Any) -> dict[str, Tensor]:
    """{name: (path, "in" | "out")} -> activations, cloned by plain torch hooks in a whole forward pass."""
    acts: dict[str, Tensor] = {}

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            acts[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        def after(_: nn.Module, args: tuple, out: Any) -> None:
            acts[name] = (out[0] if isinstance(out, tuple) else out).clone()

        return before, after

    handles = []
    for name, (path, io) in points.items():
        before, after = hooks(name)
        part = module.get_submodule(path)
        handles.append(
            part.register_forward_pre_hook(before, with_kwargs=True)
            if io == "in"
            else part.register_forward_hook(after)
        )
    try:
        with torch.no_grad():
            module(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return acts


class Contexts:
    """A packer of made-up contexts: BOS in front, the last context right-padded, one separator; with a state."""

    def __init__(self, n_batches: int = 3, batch_contexts: int = 2, ctx_len: int = 8) -> None:
        self.n_batches, self.batch_contexts, self.ctx_len, self.at = n_batches, batch_contexts, ctx_len, 0

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        if self.at >= self.n_batches:
            raise StopIteration
        batch = self.batch(self.at)
        self.at += 1
        return batch

    def batch(self, number: int) -> TokenBatch:
        C, L = self.batch_contexts, self.ctx_len
        tokens = torch.randint(3, VOCAB, (C, L), generator=torch.Generator().manual_seed(number))
        keep, real = torch.ones(C, L, dtype=torch.bool), torch.ones(C, L, dtype=torch.bool)
        tokens[:, 0], keep[:, 0] = 0, False
        tokens[0, 4], keep[0, 4] = 1, False
        tokens[-1, -3:], keep[-1, -3:], real[-1, -3:] = 2, False, False
        document = (torch.arange(C)[:, None] + number * C).expand(C, L).clone()
        position = torch.arange(L, dtype=torch.int32).expand(C, L).clone() - 1
        corpus = torch.full((C, L), number % 2, dtype=torch.int16)
        return TokenBatch(tokens, keep, real, document, position, corpus, number * C)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]
