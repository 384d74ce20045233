"""A script as users of the `dictionary-learning` package write it; `test_peer_script.py` runs it here.

It names nothing that the package does not have: a language model through nnsight, a buffer over a list of texts, two
trainers, the saved folders, and their evaluation.  Arguments: folder of the model, file of texts (a line each), where
to save.
"""

import json
import sys
from itertools import cycle

import torch as t
from nnsight import LanguageModel
from transformers import AutoTokenizer

from dictionary_learning import ActivationBuffer, AutoEncoder
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers import StandardTrainer, TopKTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import get_nested_folders, load_dictionary

model_path, text_path, save_dir = sys.argv[1:]
device, layer, steps = "cpu", 1, 60

tokenizer = AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.eos_token
model = LanguageModel(model_path, tokenizer=tokenizer)
submodule = model.transformer.h[layer].mlp
activation_dim = model.config.n_embd

with open(text_path) as f:
    texts = [line.strip() for line in f if line.strip()]


def make_buffer() -> ActivationBuffer:
    return ActivationBuffer(
        data=cycle(texts),
        model=model,
        submodule=submodule,
        d_submodule=activation_dim,
        n_ctxs=64,
        ctx_len=32,
        refresh_batch_size=8,
        out_batch_size=128,
        io="out",
        device=device,
    )


shared = {
    "activation_dim": activation_dim,
    "dict_size": 4 * activation_dim,
    "steps": steps,
    "layer": layer,
    "lm_name": model_path,
    "warmup_steps": 10,
    "seed": 0,
    "device": device,
    "submodule_name": f"mlp_out_layer_{layer}",
}
trainSAE(
    data=make_buffer(),
    trainer_configs=[
        {
            "trainer": StandardTrainer,
            "dict_class": AutoEncoder,
            "lr": 1e-3,
            "l1_penalty": 0.04,
            "sparsity_warmup_steps": 20,
            "wandb_name": "standard",
            **shared,
        },
        {
            "trainer": TopKTrainer,
            "dict_class": AutoEncoderTopK,
            "lr": 1e-3,
            "k": 16,
            "auxk_alpha": 1 / 32,
            "threshold_start_step": 20,
            "wandb_name": "top_k",
            **shared,
        },
    ],
    steps=steps,
    use_wandb=False,
    save_steps=[30],
    save_dir=save_dir,
    log_steps=20,
    normalize_activations=True,
    verbose=False,
    autocast_dtype=t.float32,
    device=device,
)

results = {}
for folder in sorted(get_nested_folders(save_dir)):
    dictionary, config = load_dictionary(folder, device)
    measured = evaluate(dictionary, make_buffer(), max_len=32, batch_size=8, device=device, n_batches=2)
    results[config["trainer"]["wandb_name"].removesuffix("_trainer_0").removesuffix("_trainer_1")] = {
        "dict_class": config["trainer"]["dict_class"],
        "ctx_len": config["buffer"]["ctx_len"],
        **measured,
    }
print(json.dumps(results))
