"""What SAE Factory carries along so that it runs without a network: sample records and a tiny trained language model.

`SAMPLES_DIR` holds records in the schemas of the six corpora, written for this project; `MODEL_DIR` a model of GPT-2's
architecture with its tokenizer, which `AutoModelForCausalLM` and `AutoTokenizer` load, and the card that says how
`train_model.py` made it.
"""

from __future__ import annotations

from pathlib import Path

SAMPLES_DIR = Path(__file__).parent / "samples"
MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR", "SAMPLES_DIR"]
