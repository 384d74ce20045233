"""Trains the embedded language model: a tiny GPT-2 and its byte-level BPE tokenizer, on medical question-answer text.

In: the records of a folder, of the Hub or of the embedded samples, as `stream_texts` gives them. Out: a folder that
`AutoModelForCausalLM` and `AutoTokenizer` load, at most 8 MB, with a card whose every number was measured here.

    python -m data_prep.embedded.train_model --source ../shared/data/medical_qa --out runs/tiny_lm --minutes 40

About a million tokens pass by a dozen times or more: dropout, weight decay and a fresh order of the documents in each
epoch hold over-fitting off, and the weights with the lowest held-out loss are the ones kept. Held out are all records
of one question in twenty, by the same stable hash as `sae-factory prep --split`.

The learning rate follows the budget spent, in steps or in minutes: a run of 40 minutes ends at rate 0 on any machine.
Attention has no dropout, because torch's fused attention on the CPU loses half its speed with it. On a busy
machine OMP_WAIT_POLICY=PASSIVE in the environment more than doubles the speed (threads sleep at a barrier instead of
spinning); where glibc hands freed memory back after every step, MALLOC_MMAP_THRESHOLD_=2000000000 with
MALLOC_TRIM_THRESHOLD_=8000000000 adds half as much again.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor

from data_prep.embedded.contexts import END_OF_TEXT, Corpus, TokenText, batches, read_corpus, tokenized
from data_prep.embedded.model_card import model_card
from dictionary_learning.errors import UserError

SAMPLE_TOKENS = 80
PROMPTS = (
    "A 58-year-old man comes to the emergency department because of",
    "Which of the following drugs is used in the treatment of",
    "Context:\nThe aim of this study was to evaluate",
)


@dataclass(frozen=True)
class TrainModelConfig:
    """Train the embedded language model and its tokenizer."""

    out: Path
    """Folder that gets the model, the tokenizer and the card; rewritten at every better held-out loss."""
    source: str = "embedded"
    """"hub", "embedded" or a folder of raw records."""
    corpora: tuple[str, ...] | None = None
    """Which of the six corpora; all that the source has by default."""
    samples: bool = True
    """Add the embedded sample records to those of the source."""
    minutes: float | None = None
    """Budget in minutes of wall time (40 when no number of steps is given either)."""
    steps: int | None = None
    """Budget in steps."""
    held_out: float = 0.05
    """Fraction of the questions held out."""
    eval_minutes: float = 2.0
    """Minutes between two evaluations on the held-out text."""
    vocab_size: int = 4096
    """Entries of the vocabulary, the 256 bytes and <|endoftext|> among them."""
    n_layer: int = 4
    """Transformer blocks."""
    n_embd: int = 192
    """Width of the residual stream."""
    n_head: int = 6
    """Attention heads."""
    context: int = 256
    """Tokens of a context."""
    batch_size: int = 16
    """Contexts in a step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule."""
    warmup: float = 0.03
    """Fraction of the budget over which the learning rate rises."""
    weight_decay: float = 0.1
    """AdamW's decay of the matrices; biases and layer norms are not decayed."""
    dropout: float = 0.1
    """Dropout on the embeddings and the residual stream."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Seed of initialisation, dropout, the order of the documents and the samples on the card."""


class HeldOut(NamedTuple):
    """Held-out loss: nats per predicted token, the perplexity of that, bits per byte of UTF-8 text."""

    loss: float
    perplexity: float
    bits_per_byte: float


@dataclass
class Progress:
    """What a run has measured so far: the material of the card."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)  # step, epoch, training, held-out loss

    def spent(self, steps: int | None, minutes: float | None) -> float:
        """The fraction of the budget that is spent, by steps or by minutes, whichever is further."""
        return max(self.step / steps if steps else 0.0, self.seconds / (60 * minutes) if minutes else 0.0)

    def note(self, training: float, held_out: float, epoch_tokens: int) -> None:
        """Add a point to the curve and print it."""
        self.curve.append((self.step, self.tokens / epoch_tokens, training, held_out))
        print(
            f"step {self.step:,}  epoch {self.curve[-1][1]:.1f}  {self.seconds / 60:.1f} min  "
            f"{self.tokens / self.seconds:,.0f} tokens/s  training loss {training:.3f}  "
            f"held-out loss {held_out:.3f}  perplexity {math.exp(held_out):.1f}",
            flush=True,
        )


# ---------------------------------------------------------------------------------------------- model


def build_model(config: TrainModelConfig, vocab_size: int, end: int) -> Any:
    """A GPT2LMHeadModel in float32 with tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=config.context,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new as one fused operation
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def next_token_loss(model: Any, tokens_BL: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of tokens 1..L-1 given those before them, in nats."""
    logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits_BLV.flatten(0, 1).float(), tokens_BL[:, 1:].flatten(), reduction=reduction
    )


def evaluate(model: Any, text: TokenText) -> HeldOut:
    """Loss over all predicted tokens of the held-out contexts, pooled, in float32 without dropout."""
    training = model.training
    model.eval()
    with torch.no_grad():
        total = sum(float(next_token_loss(model, batch, "sum")) for batch in text.held_out_CL.split(16))
    model.train(training)
    loss = total / text.held_out_CL[:, 1:].numel()
    return HeldOut(loss, math.exp(loss), loss / math.log(2) / text.bytes_per_token)


def optimiser(model: Any, config: TrainModelConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def schedule(spent: float, config: TrainModelConfig) -> float:
    """Learning rate at the fraction `spent` of the budget: linear warm-up, then a cosine to 0."""
    if spent < config.warmup:
        return config.learning_rate * max(spent / config.warmup, 0.01)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (spent - config.warmup) / (1 - config.warmup)))


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], seed: int, length: int = SAMPLE_TOKENS
) -> list[str]:
    """What a model in evaluation mode makes of each prompt: the first greedy, others sampled (temperature 0.7, top 40).

    Every token is computed from the last `n_positions` tokens, the first of which is <|endoftext|> until they run over.
    """
    texts = []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + number)
        tokens = [tokenizer.bos_token_id, *tokenizer(prompt).input_ids]
        prompted = len(tokens)
        while len(tokens) - prompted < length:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens[-model.config.n_positions :]]), use_cache=False).logits[
                    0, -1
                ]
            top = (logits / 0.7).topk(1 if number == 0 else min(40, len(logits)))
            tokens.append(int(top.indices[torch.multinomial(top.values.softmax(0), 1, generator=generator)]))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        texts.append(tokenizer.decode(tokens[prompted:], skip_special_tokens=True))
    return texts


# ---------------------------------------------------------------------------------------------- on disk


def save(model: Any, tokenizer: Tokenizer, out: Path, context: int) -> None:
    """Weights in float16 with their tokenizer; each file is complete or absent, whenever a reader looks."""
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast

    model.config.dtype = "float32"  # what a load without a dtype gives; on disk float16 is enough
    weights = {
        name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    staging = out / ".writing"
    fast.save_pretrained(staging)
    settings = json.loads((staging / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    (staging / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    model.config.save_pretrained(staging)
    save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
    for file in staging.iterdir():
        file.chmod(0o644)
        os.replace(file, out / file.name)
    staging.rmdir()


def load(out: Path) -> tuple[Any, Any]:
    """The model in float32 and the tokenizer, as users load them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(out, local_files_only=True)


def write_card(config: TrainModelConfig, corpus: Corpus, text: TokenText, progress: Progress) -> HeldOut:
    """Measure the model as it lies on disk and write its card."""
    model, tokenizer = load(config.out)
    measured = evaluate(model, text)
    card = model_card(
        config=config,
        corpus=corpus,
        text=text,
        progress=progress,
        held_out=measured,
        parameters=model.num_parameters(),
        decoding=f"Up to {SAMPLE_TOKENS} tokens; the first greedy, the others sampled (temperature 0.7, top 40).",
        continuations=list(zip(PROMPTS, continuations(model, tokenizer, PROMPTS, config.seed), strict=True)),
    )
    temporary = config.out / ".README.md"
    temporary.write_text(card, encoding="utf-8")
    os.replace(temporary, config.out / "README.md")
    return measured


# ---------------------------------------------------------------------------------------------- the run


def checked(config: TrainModelConfig) -> None:
    """Raises UserError for settings that no run can have, and an `out` that can't be a folder."""
    for name in ("vocab_size", "n_layer", "n_embd", "n_head", "context", "batch_size", "threads"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(config, name)}.")
    if config.vocab_size < 257:
        raise UserError(f"--vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), not {config.vocab_size}.")
    if config.n_embd % config.n_head:
        raise UserError(f"--n_embd {config.n_embd} is not a multiple of --n_head {config.n_head}.")
    if not 0 < config.held_out < 1 or not 0 <= config.dropout < 1 or not 0 < config.warmup < 1:
        raise UserError("--held_out and --warmup must lie between 0 and 1, --dropout from 0 to below 1.")
    if config.context < 2:
        raise UserError("--context must be at least 2: a token and the next one.")
    for name in ("minutes", "steps", "eval_minutes", "learning_rate"):
        if (value := getattr(config, name)) is not None and value <= 0:
            raise UserError(f"--{name} must be positive, not {value:g}.")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {config.out} can't be made a folder: {error.strerror}.") from error


def train_step(model: Any, adam: torch.optim.AdamW, tokens_BL: Tensor, rate: float) -> Tensor:
    """One step at the learning rate `rate`; the loss before it."""
    for group in adam.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model, tokens_BL)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    adam.zero_grad()
    return loss.detach()


def train_model(config: TrainModelConfig) -> HeldOut:
    """Train, keep the best weights in `config.out`, write the card; the held-out loss of what is on disk.

    Raises UserError for settings, a source or an `out` that can't be used.
    """
    checked(config)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # initialisation and dropout: GPT2LMHeadModel takes no generator
    minutes = 40.0 if config.minutes is None and config.steps is None else config.minutes
    sources = [config.source, *(["embedded"] if config.samples and config.source != "embedded" else [])]
    corpus = read_corpus(sources, config.corpora, config.held_out)
    text = tokenized(corpus, config.vocab_size, config.context)
    model = build_model(config, text.tokenizer.get_vocab_size(), text.end)
    adam = optimiser(model, config)
    print(
        f"{model.num_parameters():,} parameters; {len(corpus.train):,} training texts, {text.train_tokens:,} tokens; "
        f"{len(corpus.held_out):,} held out, {text.bytes_per_token:.2f} bytes a token",
        flush=True,
    )

    progress, best, recent = Progress(), math.inf, []
    started = evaluated = time.perf_counter()
    model.train()
    for tokens_BL in batches(
        text.train, config.context, text.end, config.batch_size, np.random.default_rng(config.seed)
    ):
        recent.append(train_step(model, adam, tokens_BL, schedule(progress.spent(config.steps, minutes), config)))
        progress.step += 1
        progress.tokens += tokens_BL.numel()
        progress.seconds = time.perf_counter() - started
        done = progress.spent(config.steps, minutes) >= 1
        if done or time.perf_counter() - evaluated > 60 * config.eval_minutes:
            loss = evaluate(model, text).loss
            progress.note(float(torch.stack(recent).mean()), loss, text.train_tokens)
            if loss < best:
                best = loss
                save(model, text.tokenizer, config.out, config.context)
                write_card(config, corpus, text, progress)
            recent, evaluated = [], time.perf_counter()
        if done:
            break
    return write_card(config, corpus, text, progress)  # once more: the curve now runs to the end


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: exit code 0, or 2 with one sentence about what was wrong in the input."""
    try:
        config = tyro.cli(TrainModelConfig, args=arguments)
        loss, perplexity, bits = train_model(config)
        print(f"{config.out}: held-out loss {loss:.4f}, perplexity {perplexity:.2f}, {bits:.3f} bits a byte")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
