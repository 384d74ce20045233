"""How dictionaries learn: one file an architecture, on the shared loop body of `trainer.py`."""

from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import GroupMaxTrainer, TopKTrainer
from dictionary_learning.trainers.trainer import TRAINERS, LossOutput, SAETrainer, trainer_class

__all__ = [
    "TRAINERS",
    "BatchTopKSAE",
    "BatchTopKTrainer",
    "GatedAnnealTrainer",
    "GatedSAETrainer",
    "GroupMaxTrainer",
    "JumpReluTrainer",
    "LossOutput",
    "MatryoshkaBatchTopKSAE",
    "MatryoshkaBatchTopKTrainer",
    "PAnnealTrainer",
    "SAETrainer",
    "StandardTrainer",
    "StandardTrainerAprilUpdate",
    "TopKTrainer",
    "trainer_class",
]
