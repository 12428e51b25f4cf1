"""The base of all trainers: weight decay by shape, separate losses and throughput in the log, exact resume."""

import time
from collections import defaultdict
from typing import NoReturn

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollator, Trainer, TrainerCallback

from ..data.batches.pairs import PairDataset, PairStream
from ..data.batches.questions import QuestionDataset
from .muon import MuonAdamW


class TellEpoch(TrainerCallback):
    """Calls `set_epoch` of the training dataset when an epoch begins; a stream counts its passes itself.

    With several ranks or a resumed epoch, the Trainer sets the epoch of the sampler only.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Called by the Trainer before the first batch of a new or resumed epoch."""
        if isinstance(train_dataloader.dataset, PairDataset | QuestionDataset):
            train_dataloader.dataset.set_epoch(int(state.epoch))


class Stopwatch(TrainerCallback):
    """Measures steps per second between log lines, starting when a run starts or resumes."""

    def __init__(self) -> None:
        self.last: tuple[int, float] = (0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Called by the Trainer after it has restored the step of a resumed run."""
        self.lap(state.global_step)

    def lap(self, step: int) -> float:
        """Steps per second since the last call."""
        now = time.perf_counter()
        rate = (step - self.last[0]) / (now - self.last[1])
        self.last = (step, now)
        return rate


class VlmTrainer(Trainer):
    """transformers' Trainer for models with several losses.

    - Weight decay applies to matrices only: not to gains, biases or a temperature (CLIP, appendix F).
    - Scalars that a subclass passes to `record` are averaged over the steps between two log lines.
    - `samples_per_second` counts the training samples of all ranks.
    - With `push_to_hub` it checks the token when training starts, and pushes nothing. At the end of a recipe
      [`~hf_vlm.hub.push.push_run`] pushes model, results and card in one commit.

    Args:
        eval_collator: Collator of the evaluation data (without augmentation); `data_collator` by default.
    """

    data_collator: DataCollator
    optimizer: Optimizer | None

    def __init__(self, *args, eval_collator: DataCollator | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator: DataCollator = eval_collator or self.data_collator
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._stopwatch = Stopwatch()
        self.add_callback(self._stopwatch)
        self.add_callback(TellEpoch())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with two or more dimensions."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The Trainer's optimiser with `learning_rates` by module, or [`MuonAdamW`] with `muon_learning_rate`.

        Raises:
            ValueError: if both `learning_rates` and `muon_learning_rate` are given.
        """
        if self.args.learning_rates and self.args.muon_learning_rate is not None:
            raise ValueError("learning_rates (of a stage too) work with AdamW only: leave out muon_learning_rate.")
        if self.optimizer is None and self.args.muon_learning_rate is not None:
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            self.optimizer = MuonAdamW(
                trained,
                self.args.muon_learning_rate,
                self.args.learning_rate,
                self.args.weight_decay,
                (self.args.adam_beta1, self.args.adam_beta2),
                self.args.adam_epsilon,
            )
        if self.optimizer is not None or not self.args.learning_rates:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        optimizer.param_groups = groups_by_rate(self.model, optimizer.param_groups, self.args.learning_rates)
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Splits map-style data by the Trainer's sampler, and a stream by its shards."""
        if not isinstance(self.train_dataset, PairStream):
            return super().get_train_dataloader()
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset.split(self.args.process_index, self.args.world_size, workers),
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=True,  # batches must have the same size on all ranks
        )

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Uses the eval collator and never drops the last batch."""
        before = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, self.args.dataloader_drop_last = before

    def _run_epoch(self, **kwargs) -> None:
        """Does nothing if no step is left: a finished run that is started again must not train further."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks the token before training; `push_run` creates the repository."""
        if self.is_world_process_zero():
            HfApi(token=token or self.args.hub_token).whoami()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and never pushes."""
        super().save_model(output_dir, _internal_call=True)

    def push_to_hub(self, *args, **kwargs) -> NoReturn:
        """Refused: transformers would push training_args.bin, a pickle, and replace the card.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "push_to_hub is not supported: save the model, then push its folder with hf_vlm.hub.push.push_folder "
            "or `hf-vlm push`."
        )

    def record(self, name: str, value: torch.Tensor) -> None:
        """Records a scalar for the next log line."""
        self._parts[name].append(value.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the recorded scalars and the throughput to the Trainer's training lines."""
        if "loss" in logs:
            for name, values in self._parts.items():
                logs[name] = torch.stack(values).mean().item()
            self._parts.clear()
            samples = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            logs["samples_per_second"] = round(samples * self._stopwatch.lap(self.state.global_step), 1)
        super().log(logs, start_time)


def groups_by_rate(model: nn.Module, groups: list[dict], rates: dict[str, float]) -> list[dict]:
    """An optimiser's parameter groups, each split by the learning rates of modules.

    Args:
        model: The model that owns the parameters.
        groups: The groups of a new optimiser.
        rates: Learning rates by module name, such as `language_projection`, at any depth; the innermost named module
            decides.

    Raises:
        ValueError: if a named module has no trainable parameter.
    """
    owners, found = {}, set()
    for name, parameter in model.named_parameters():
        owner = next((part for part in reversed(name.split(".")) if part in rates), None)
        owners[parameter] = owner
        if parameter.requires_grad:
            found.add(owner)
    if unknown := [name for name in rates if name not in found]:
        raise ValueError(f"learning_rates: nothing is trained in a module called {unknown[0]}.")
    parted = []
    for group in groups:
        for owner in (None, *rates):
            chosen = [p for p in group["params"] if owners[p] == owner]
            rate = {} if owner is None else {"lr": rates[owner]}
            if chosen:
                parted.append({**group, **rate, "params": chosen})
    return parted


__all__ = ["VlmTrainer", "groups_by_rate"]
