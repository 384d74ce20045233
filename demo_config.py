"""The sweep that `demo.py` and `sae-factory train` run: edit it.

Every combination of architecture, sparsity, learning rate, seed, width and hook point below becomes one dictionary, and
all of them train on one pass of activations. The command line can replace what is here (see `--help`).
"""

from dictionary_learning.config import Preset, SentenceSettings, Sweep

PRESETS = {
    # The tiny model and the sample records that come with the project: no network, no token.
    "embedded": Preset(
        model_name="embedded",
        corpus="embedded",
        layers=(2,),
        widths=(1536,),
        num_tokens=600_000,
        ctx_len=128,
        harvest_contexts=32,
        buffer_contexts=512,
        batch_size=1024,
        eval_tokens=16_000,
    ),
    "gpt2": Preset(
        model_name="gpt2",
        corpus="medical_qa",
        layers=(8,),
        widths=(2**14,),
        num_tokens=50_000_000,
        ctx_len=128,
        harvest_contexts=32,  # on CUDA the harvest overlaps training whole while a forward gives at most a batch
        buffer_contexts=4096,
        batch_size=4096,
        eval_tokens=200_000,
    ),
    "gemma-2-2b": Preset(
        model_name="google/gemma-2-2b",
        corpus="medical_qa",
        layers=(12,),
        widths=(2**14,),
        num_tokens=200_000_000,
        ctx_len=512,
        harvest_contexts=16,
        buffer_contexts=1024,
        batch_size=8192,
        dtype="bfloat16",
        encoder_dtype="bf16",
        eval_tokens=200_000,
        eval_contexts=4,
    ),
    # One embedding a text (or, with --level token, the states of its tokens) of a sentence-transformers model.
    "sentence": Preset(
        model_name="sentence-transformers/all-MiniLM-L6-v2",
        corpus="medical_qa",
        layers=(),
        widths=(3072,),
        num_tokens=2_000_000,
        ctx_len=256,
        harvest_contexts=64,
        buffer_contexts=16_384,
        batch_size=1024,
        eval_tokens=10_000,
        eval_contexts=64,
        sentence=SentenceSettings(level="text"),
    ),
}

SWEEP = Sweep(
    architectures=("standard", "top_k", "jump_relu"),
    sparsities={
        "standard": {"l1_penalty": (0.03, 0.06, 0.1, 0.15)},
        "top_k": {"k": (16, 32, 64, 96)},
        "jump_relu": {"target_l0": (16, 32, 64, 96)},
        "batch_top_k": {"k": (16, 32, 64, 96)},
        "matryoshka_batch_top_k": {"k": (16, 32, 64, 96)},
        "group_max": {"k": (16, 32, 64, 128)},
        "gated": {"l1_penalty": (0.03, 0.06, 0.1, 0.15)},
        "standard_april_update": {"l1_penalty": (0.03, 0.06, 0.1, 0.15)},
        "p_anneal": {"initial_sparsity_penalty": (0.03, 0.06, 0.1, 0.15)},
        "gated_anneal": {"initial_sparsity_penalty": (0.03, 0.06, 0.1, 0.15)},
    },
    settings={  # further arguments of an architecture's trainer
        "matryoshka_batch_top_k": {"group_fractions": (1 / 16, 1 / 8, 1 / 4, 9 / 16)},
        "p_anneal": {"sparsity_function": "Lp^p"},
    },
    learning_rates=(None,),  # None: the rule that fits width and length
    seeds=(0,),
)
