"""The order of the pairs in reward training, the same on any number of processes."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from rlhf.config import RewardStageConfig


class GlobalOrder(Sampler[int]):
    """Row numbers of an epoch, shuffled by (seed, epoch); each `batch` consecutive rows are one optimizer step.

    Accelerate gives them to the processes one micro-batch at a time, so that a step has the same rows on any number of
    processes. The last step is padded with the epoch's first rows: all processes need the same number of passes, and
    Accelerate would pad to a length that depends on the number of processes.

    lengths: of each row, in any unit. strategy: random, group_by_length or sequential, as train_sampling_strategy.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, strategy: str) -> None:
        self.lengths, self.batch, self.seed, self.strategy, self.epoch = list(lengths), batch, seed, strategy, 0

    @classmethod
    def of(cls, args: RewardStageConfig, rows: Sequence[Sequence[Sequence[int]]]) -> "GlobalOrder | None":
        """The order of a training; rows: both sides of each pair, as token ids. None if transformers orders them."""
        strategy = str(args.train_sampling_strategy)
        if args.global_batch_size is None or strategy == "batch_rebalance":  # which orders global batches itself
            return None
        seed = args.seed if args.data_seed is None else args.data_seed
        return cls([max(map(len, sides)) for sides in rows], args.global_batch_size, seed, strategy)

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate's data loader before each pass over the rows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch) * self.batch

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.strategy == "group_by_length":
            order = get_length_grouped_indices(self.lengths, self.batch, generator=draws)
        elif self.strategy == "sequential":
            order = list(range(len(self.lengths)))
        else:
            order = torch.randperm(len(self.lengths), generator=draws).tolist()
        while len(order) < len(self):
            order += order[: len(self) - len(order)]
        return iter(order)
