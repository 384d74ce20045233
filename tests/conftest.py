"""What all tests share: no network, one thread, a fixed seed, and two toy tokenizers made in the process."""

from __future__ import annotations

import os

# Before anything imports the libraries that read these: a test that reaches for the network must fail, not wait.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.update(TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")
os.environ.update(NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")  # servers of tests are here
# oneDNN keeps a program for each shape that it has met, and tests have many shapes.
os.environ.update(ONEDNN_PRIMITIVE_CACHE_CAPACITY="64")

import contextlib
import ctypes
import gc
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell starts in the background
untimed: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("deterministic", derandomize=True, max_examples=25, **untimed)
settings.load_profile("deterministic")


def pytest_collection_finish() -> None:
    gc.freeze()  # what imports made is no longer searched for cycles: searching the rest is quick, and so more frequent


@pytest.fixture(autouse=True, scope="module")
def _memory_given_back() -> Iterator[None]:
    """nnsight's traces are cycles that hold on to activations, and malloc keeps what is freed: gigabytes in all."""
    yield
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def _no_hurry_left() -> Iterator[None]:
    """A second Ctrl-C holds for the rest of its process, in which other tests follow here."""
    yield
    if (stopping := sys.modules.get("dictionary_learning.stopping")) is not None:
        stopping._now.in_a_hurry = False


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def byte_tokenizer(**special_tokens: str) -> Any:
    """A tokenizer of one token a byte, in which every text round-trips, with the special tokens given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """As GPT-2's: <|endoftext|> (id 256) is BOS and EOS, and there is no padding token."""
    return byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tokenizer_bos_eos_pad() -> Any:
    """Three special tokens of its own: <bos> 256, <eos> 257, <pad> 258."""
    return byte_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tokenizer_without_specials() -> Any:
    """No special token at all."""
    return byte_tokenizer()
