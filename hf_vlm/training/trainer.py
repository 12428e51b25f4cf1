"""What every trainer here shares: weight decay by shape, loss parts and throughput in the log, exact resume."""

import time
from collections import defaultdict

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollator, Trainer

from ..data.pairs import PairStream


class StreamLoader(DataLoader):
    """A data loader of one rank's part of a stream, which the Trainer can tell the epoch."""

    dataset: PairStream

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.dataset.set_epoch(epoch)


class VlmTrainer(Trainer):
    """transformers' Trainer for models whose output names its loss parts.

    - Weight decay acts on matrices only: not on gains, biases, or a temperature (CLIP, appendix F).
    - Every `loss*` field of the model's output is averaged over the logged steps.
    - `samples_per_second` counts the training samples of all ranks between two log lines.

    Args:
        eval_collator: Collator of the evaluation data, which is not augmented; `data_collator` by default.
    """

    def __init__(self, *args, eval_collator: DataCollator | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator or self.data_collator
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._last_log = (0, time.perf_counter())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with two dimensions or more."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def get_train_dataloader(self) -> DataLoader:
        """Map-style data is shared out by the Trainer's sampler, a stream by its shards."""
        if not isinstance(self.train_dataset, PairStream):
            return super().get_train_dataloader()
        workers = self.args.dataloader_num_workers
        return StreamLoader(
            self.train_dataset.split(self.args.process_index, self.args.world_size, workers),
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            drop_last=True,  # ranks must agree on the size of a batch
        )

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """The evaluation data by its own collator."""
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def record(self, name: str, value: torch.Tensor) -> None:
        """Keeps a scalar for the next log line."""
        self._parts[name].append(value.detach())

    def train(self, *args, **kwargs):
        """Trains; see `transformers.Trainer.train`."""
        self._last_log = (self.state.global_step, time.perf_counter())
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the recorded scalars and the throughput to the Trainer's training lines."""
        if "loss" in logs:
            for name, values in self._parts.items():
                logs[name] = torch.stack(values).mean().item()
            self._parts.clear()
            step, now = self.state.global_step, time.perf_counter()
            samples = (step - self._last_log[0]) * self.args.train_batch_size * self.args.world_size
            samples *= self.args.gradient_accumulation_steps
            logs["samples_per_second"] = round(samples / (now - self._last_log[1]), 1)
            self._last_log = (step, now)
        super().log(logs, start_time)


__all__ = ["VlmTrainer"]
