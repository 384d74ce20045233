"""A run on several GPUs and machines, started by `torchrun`: who reads, who harvests, who trains what.

`ranks` finds the other processes and agrees with them, `reading`, `harvest` and `sentences` split the forwards of one
corpus, `spread` balances the dictionaries, `states` makes a run's state one that any number of ranks can go on with,
`sharded` splits one wide dictionary over its latents, `job` is what the main job needs of them, `__main__` starts them.
See docs/distributed.md.
"""

from dictionary_learning.distributed.ranks import Ranks, join, rank_exit_code

__all__ = ["Ranks", "join", "rank_exit_code"]
