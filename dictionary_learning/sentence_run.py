"""The parts of the main job that differ where a sentence encoder takes the place of the language model.

The corpus, its held-out part, the buffer, the trainers and the files are those of any run. Different are the source,
which needs no packing, and the evaluation: a sentence encoder predicts no tokens, so there is no loss to recover, and
what is measured is the reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dictionary_learning.config import RunConfig
from dictionary_learning.errors import UserError

if TYPE_CHECKING:
    from dictionary_learning.activations.sentence_encoder import SentenceActivations, SentenceEncoder
    from dictionary_learning.corpus import TextStream
    from dictionary_learning.dictionary import Dictionary
    from dictionary_learning.evaluation import EvalResult
    from dictionary_learning.training import TrainingRun

KEEP_MB = 1024.0  # of embeddings, for later epochs; part of every saved state
EVALUATION = "reconstruction of held-out activations; without a language model there is no loss to recover"


def load_encoder(config: RunConfig, device: Any, revision: str | None = None) -> SentenceEncoder:
    """The run's sentence encoder, from the Hub at a revision, which cuts texts at `ctx_len` tokens.

    Raises UserError where it can't."""
    from dictionary_learning.activations.sentence_encoder import SentenceEncoder, check_level

    assert config.sentence is not None
    check_level(config.sentence.level, hook_points=config.hook_points)
    encoder = SentenceEncoder.load(config.model_name, dtype=config.dtype, device=device, revision=revision)
    longest = encoder.max_positions
    if longest is not None and config.ctx_len > longest:
        raise UserError(
            f"ctx_len {config.ctx_len} is longer than the {longest} tokens that {config.model_name} takes of a text."
        )
    encoder.cut_at(config.ctx_len)
    return encoder


def make_source(
    config: RunConfig, encoder: SentenceEncoder, texts: TextStream, *, heldout: bool
) -> SentenceActivations:
    """The activations of a stream of texts; those to train on are kept for later epochs."""
    from dictionary_learning.activations.sentence_encoder import SentenceActivations

    assert config.sentence is not None
    text_level = config.sentence.level == "text"
    return SentenceActivations(
        encoder,
        texts,
        level=config.sentence.level,
        hook_points=config.hook_points,
        batch_texts=config.eval_contexts if heldout else config.harvest_contexts,
        prompt=config.sentence.prompt,
        normalize=config.sentence.normalize,
        remove_special=config.remove_bos,
        keep_mb=0.0 if heldout or not text_level else KEEP_MB,
    )


def evaluate_on_source(
    source: SentenceActivations,
    dictionaries: Sequence[tuple[str, Dictionary]],
    max_rows: int,
    progress: Callable[[int], None],
) -> list[EvalResult]:
    """Pooled metrics of dictionaries (hook point, dictionary that takes raw activations) on the rows of a source.

    Stops behind the batch that reaches `max_rows`; `progress` is called with the rows measured so far.
    """
    from dictionary_learning.evaluation import PooledMetrics

    pooled = [PooledMetrics(dictionary) for _, dictionary in dictionaries]
    for batch in source:
        for (name, _), metrics in zip(dictionaries, pooled, strict=True):
            metrics.update(batch.acts[name].float())
        progress(pooled[0].tokens)
        if pooled[0].tokens >= max_rows:
            break
    return [metrics.result() for metrics in pooled]


def print_stream_facts(run: TrainingRun, source: SentenceActivations) -> None:
    """How the stream went: what was trained on, and how often the corpus was read for it."""
    unit = "embeddings" if source.level == "text" else "token states"
    print(
        f"Stream: {run.tokens:,} {unit}, {source.texts.epoch + 1} pass(es) over the corpus begun, "
        f"{source.texts_encoded:,} texts encoded."
    )
