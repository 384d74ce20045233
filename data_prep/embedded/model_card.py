"""The card of the embedded language model, written from what its training run measured and from nothing else.

In: the run's settings, counts, losses and continuations. Out: the text of README.md. No number is typed by hand, and
each continuation comes with its longest stretch of words that also stands in the training text, so that a reader can
tell what the model says from what it recites.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from data_prep.sources import CORPORA

if TYPE_CHECKING:
    from data_prep.embedded.contexts import Corpus, TokenText
    from data_prep.embedded.train_model import HeldOut, Progress, TrainModelConfig

CARD = """\
---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, medical, tiny]
---
# The embedded language model of SAE Factory

A GPT-2-architecture model of {parameters:,} parameters with its own byte-level BPE tokenizer, trained from scratch on
medical question-answer text. It gives `make demo` and the tests real activations without a network.

**For demonstration and tests only. It is not medical advice:** it writes what reads like medical English and knows no
medicine. Do not use it to answer a medical question.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from data_prep.embedded import MODEL_DIR

model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
```

The tokenizer adds no special token. In training every context began with `<|endoftext|>`, which also separates
documents and is the beginning, end and padding token: put it first.

## Held-out loss

Measured in float32 with the stored weights, on {held_out_records:,} records ({held_out_tokens:,} predicted tokens)
whose questions the training never saw: {held_out_percent:g} % of all questions, chosen by a stable hash.

| | loss (nats a token) | perplexity | bits per byte |
|---|---|---|---|
| **this model** | **{loss:.4f}** | **{perplexity:.2f}** | **{bits_per_byte:.4f}** |
| token frequencies alone | {unigram:.4f} | {unigram_perplexity:.2f} | {unigram_bits:.4f} |
| uniform over the vocabulary | {uniform:.4f} | {vocab_size:,} | {uniform_bits:.4f} |

## How it was trained

`{command}`

| | |
|---|---|
| architecture | GPT2LMHeadModel: {n_layer} layers, width {n_embd}, {n_head} heads, tied embeddings |
| context, vocabulary | {context} tokens, {vocab_size:,} entries |
| weights | float16 on disk |
| text | {train_tokens:,} training tokens, the documents in a new order each epoch |
| seen | {tokens:,} tokens: {epochs:.1f} epochs, {steps:,} steps of {batch_size} contexts |
| optimiser | AdamW, peak rate {learning_rate:g}, warm-up over {warmup:g} of the run, then cosine to 0 |
| regularisation | weight decay {weight_decay:g}, dropout {dropout:g} (none in attention) |
| precision | bf16 autocast over float32 weights |
| time | {minutes:.1f} minutes, {rate:,.0f} tokens/s, evaluations included |
| machine | {cores}-core CPU ({machine}), {threads} threads |
| seed | {seed} |

| corpus | training records | held-out records | licence |
|---|---|---|---|
{corpora}

Records that SAE Factory wrote itself (`data_prep/embedded/samples`) are counted with their corpus.

| step | epoch | training loss (with dropout) | held-out loss |
|---|---|---|---|
{curve}

The weights kept are those with the lowest held-out loss.

## Continuations

{decoding}

{samples}
"""


def model_card(
    *,
    config: TrainModelConfig,
    corpus: Corpus,
    text: TokenText,
    progress: Progress,
    held_out: HeldOut,
    parameters: int,
    continuations: Sequence[tuple[str, str]],
    decoding: str,
) -> str:
    """The README.md of the model folder. `continuations`: (prompt, text); `decoding`: how they were drawn."""
    vocab_size, unigram_loss = text.tokenizer.get_vocab_size(), text.unigram_loss()
    bits_per_nat = held_out.bits_per_byte / held_out.loss
    training_text = "\n\n".join(corpus.train)
    rows = [
        f"| {name} | {train:,} | {test:,} | {CORPORA[name].licence} |" for name, (train, test) in corpus.records.items()
    ]
    rows.append("| all | {:,} | {:,} | |".format(*map(sum, zip(*corpus.records.values(), strict=True))))
    return CARD.format(
        parameters=parameters,
        held_out_records=len(corpus.held_out),
        held_out_tokens=text.held_out_CL[:, 1:].numel(),
        held_out_percent=100 * config.held_out,
        loss=held_out.loss,
        perplexity=held_out.perplexity,
        bits_per_byte=held_out.bits_per_byte,
        unigram=unigram_loss,
        unigram_perplexity=math.exp(unigram_loss),
        unigram_bits=unigram_loss * bits_per_nat,
        uniform=math.log(vocab_size),
        uniform_bits=math.log(vocab_size) * bits_per_nat,
        vocab_size=vocab_size,
        command=command(config),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_head,
        context=config.context,
        tokens=progress.tokens,
        steps=progress.step,
        batch_size=config.batch_size,
        epochs=progress.curve[-1][1],
        train_tokens=text.train_tokens,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        dropout=config.dropout,
        minutes=progress.seconds / 60,
        rate=progress.tokens / progress.seconds,
        cores=os.cpu_count(),
        machine=platform.machine(),
        threads=config.threads,
        seed=config.seed,
        corpora="\n".join(rows),
        curve="\n".join(f"| {step:,} | {epoch:.1f} | {a:.3f} | {b:.3f} |" for step, epoch, a, b in progress.curve),
        decoding=decoding,
        samples="\n\n".join(sample(prompt, written, training_text) for prompt, written in continuations),
    )


def command(config: TrainModelConfig) -> str:
    """The command line of the run: the settings that differ from their defaults, the output folder by its name."""
    parts = ["python -m data_prep.embedded.train_model", f"--out {config.out.name}"]
    for setting in fields(config):
        value = getattr(config, setting.name)
        if setting.name == "out" or value == setting.default:
            continue
        if isinstance(value, bool):
            parts.append(f"--{'' if value else 'no_'}{setting.name}")
        else:
            parts.append(f"--{setting.name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(parts)


def sample(prompt: str, continuation: str, training_text: str) -> str:
    """A prompt in bold and its continuation as a quotation, with how many words of it in a row are training text."""
    quoted = continuation.replace("\n", "  \n> ")
    shown = f"**{prompt.replace(chr(10), ' / ')}**{quoted}"
    words = continuation.split()
    recited = longest_recited(words, training_text)
    return f"> {shown}\n\n({recited} of {len(words)} words in a row also stand in the training text.)"


def longest_recited(words: Sequence[str], text: str) -> int:
    """Length of the longest run of `words` that occurs in `text`, words compared exactly."""
    haystack = f" {' '.join(text.split())} "
    longest = 0
    for start in range(len(words)):
        while start + longest < len(words) and f" {' '.join(words[start : start + longest + 1])} " in haystack:
            longest += 1
    return longest
