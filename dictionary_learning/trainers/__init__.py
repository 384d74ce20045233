"""How dictionaries learn: one file an architecture, on the shared loop body of `trainer.py`."""

from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.trainers.trainer import TRAINERS, LossOutput, SAETrainer, trainer_class

__all__ = ["TRAINERS", "JumpReluTrainer", "LossOutput", "SAETrainer", "StandardTrainer", "TopKTrainer", "trainer_class"]
