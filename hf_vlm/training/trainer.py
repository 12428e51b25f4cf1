"""What every trainer here shares: weight decay by shape, loss parts and throughput in the log, exact resume."""

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
    """Tells the data set which epoch begins; a stream counts its passes itself.

    The Trainer's own data loaders tell only their sampler when there are several ranks or an epoch is resumed.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Called by the Trainer before the first batch of an epoch, or of the rest of one."""
        if isinstance(train_dataloader.dataset, PairDataset | QuestionDataset):
            train_dataloader.dataset.set_epoch(int(state.epoch))


class Stopwatch(TrainerCallback):
    """Counts steps a second from the start of a run, new or resumed, and then from one log line to the next."""

    def __init__(self) -> None:
        self.last: tuple[int, float] = (0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Called by the Trainer when it has restored the step of a resumed run."""
        self.lap(state.global_step)

    def lap(self, step: int) -> float:
        """Steps a second since the last call."""
        now = time.perf_counter()
        rate = (step - self.last[0]) / (now - self.last[1])
        self.last = (step, now)
        return rate


class VlmTrainer(Trainer):
    """transformers' Trainer for models with several parts of the loss.

    - Weight decay acts on matrices only: not on gains, biases, or a temperature (CLIP, appendix F).
    - What a subclass hands to `record` is averaged over the steps between two log lines.
    - `samples_per_second` counts the training samples of all ranks between two log lines.
    - `push_to_hub` makes it ask for the token's owner at the start, nothing more: at the end of a recipe, when results
      and card are there, [`~hf_vlm.hub.push.push_run`] pushes them all in one commit.

    Args:
        eval_collator: Collator of the evaluation data, which is not augmented; `data_collator` by default.
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
        """Names of the parameters with two dimensions or more."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The Trainer's optimiser, with `learning_rates` for parts; or [`MuonAdamW`] with `muon_learning_rate`.

        Raises:
            ValueError: if both are given.
        """
        if self.args.learning_rates and self.args.muon_learning_rate is not None:
            raise ValueError("learning_rates, which a stage may set, are AdamW's: leave out muon_learning_rate.")
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
        """Map-style data is shared out by the Trainer's sampler, a stream by its shards."""
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
            drop_last=True,  # ranks must agree on the size of a batch
        )

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """The evaluation data by its own collator, and to its last row whatever is dropped of the training data."""
        before = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, self.args.dataloader_drop_last = before

    def _run_epoch(self, **kwargs) -> None:
        """Nothing where no step is left: a finished run that is started again must not do one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Lets a wrong token end the run before it begins; the repository is made by the push itself."""
        if self.is_world_process_zero():
            HfApi(token=token or self.args.hub_token).whoami()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves, and never pushes."""
        super().save_model(output_dir, _internal_call=True)

    def push_to_hub(self, *args, **kwargs) -> NoReturn:
        """Refused: it would push training_args.bin, a pickle, and replace the card.

        Raises:
            ValueError: always.
        """
        raise ValueError("Save the model, then push its folder by hf_vlm.hub.push.push_folder or `hf-vlm push`.")

    def record(self, name: str, value: torch.Tensor) -> None:
        """Keeps a scalar for the next log line."""
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
    """An optimiser's parameter groups, each parted by the learning rates of modules.

    Args:
        model: Whose parameters they are.
        groups: The groups of a new optimiser.
        rates: Learning rates by the name of a module, such as `language_projection`, wherever it is in the model; a
            module within another one counts for itself.

    Raises:
        ValueError: if no parameter is trained in a module of that name.
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
