"""The base of all trainers: weight decay by shape, separate losses and throughput in the log, exact resume."""

import re
import shutil
import time
import zlib
from collections import defaultdict
from collections.abc import Sized
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollator, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..data.batches.pairs import PairDataset, PairStream
from ..data.batches.questions import QuestionDataset
from ..files import hold_folder
from .muon import MuonAdamW
from .resume import begin_checkpoint, compare_runs, last_checkpoint, saved_shapes, seal_checkpoint

# Training arguments of a resumed run, by how they are compared with the checkpoint's: see `compare_runs`.
ORDER = ("seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy")
STREAM_ORDER = ("per_device_train_batch_size", "dataloader_num_workers", "world_size")
KEPT = ("learning_rate", "learning_rates", "muon_learning_rate", "weight_decay", "adam_beta1", "adam_beta2")
TAKEN = (
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "bf16", "fp16"),
)


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
        self.run_arguments: dict[str, dict[str, Any]] = {}  # of the recipe, stored in checkpoints: model and data
        self._facts: dict[str, dict[str, Any]] = {}
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
        """Splits map-style data by the Trainer's sampler, and a stream by its shards.

        Raises:
            ValueError: if there are fewer rows than one step needs.
        """
        if not isinstance(self.train_dataset, PairStream):
            if isinstance(self.train_dataset, Sized):
                self.check_num_rows(len(self.train_dataset))
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

    def check_num_rows(self, rows: int) -> None:
        """Refuses data with fewer rows than a step needs.

        Raises:
            ValueError: if there are no rows, or `dataloader_drop_last` drops all of them.
        """
        batch = self.args.train_batch_size * self.args.world_size
        if rows == 0:
            raise ValueError("There is no row to train on: check the sources.")
        if self.args.dataloader_drop_last and rows < batch:
            raise ValueError(
                f"There are {rows} rows to train on, fewer than a batch of {batch}, and dataloader_drop_last drops "
                "them: lower per_device_train_batch_size, or set dataloader_drop_last to false."
            )

    def check_negatives(self) -> None:
        """Refuses a contrastive loss without negatives: it would be 0 whatever the model does.

        Raises:
            ValueError: if a batch of all ranks has fewer than two rows, or the data has.
        """
        if self.train_dataset is None:  # to evaluate only
            return
        rows = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        batch = self.args.train_batch_size * self.args.world_size
        if batch < 2 or (rows is not None and rows < 2):
            given = f"a batch has {batch}" if batch < 2 else f"the training data has {rows}"
            raise ValueError(f"A contrastive loss compares a pair with others and needs two rows, but {given}.")

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Uses the eval collator and never drops the last batch."""
        before = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, self.args.dataloader_drop_last = before

    # --- runs that are interrupted and resumed

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Trains, from a checkpoint if one is given; no other process can train into the same folder.

        Raises:
            ValueError: if the checkpoint is of another run, or another process holds the output folder.
            KeyboardInterrupt: with the step as its message.
        """
        with hold_folder(self.args.output_dir):
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_checkpoint(self.args.output_dir)
                if resume_from_checkpoint is None:
                    raise ValueError(f"{self.args.output_dir} has no whole checkpoint to resume from.")
            self._facts = self.run_facts()
            if resume_from_checkpoint:
                self._compare_weights(resume_from_checkpoint)
                compare_runs(resume_from_checkpoint, self._facts, not self.args.ignore_data_skip)
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"Interrupted at step {self.state.global_step}.") from None

    def run_facts(self) -> dict[str, dict[str, Any]]:
        """What a resumed run is compared with; see [`compare_runs`]."""
        values = {**self.args.to_dict(), "world_size": self.args.world_size}
        is_stream = not isinstance(self.train_dataset, Sized)
        order = {name: values[name] for name in (*ORDER, *(STREAM_ORDER if is_stream else ()))}
        order["rows"] = None if is_stream else len(self.train_dataset)
        order["rows of a step"] = (
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        )
        rates = self.args.learning_rates or {}
        fixed = {
            "optim": str(values["optim"]),
            "Muon": self.args.muon_learning_rate is not None,
            "modules with learning_rates": sorted(rates),
            "trained parameters": sum(p.requires_grad for p in self.model.parameters()),
        }
        if isinstance(self.model, PeftModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            fixed["weights under the adapter"] = fingerprint(self.model)
        return {
            "fixed": {**fixed, **self.run_arguments.get("fixed", {})},
            "order": {**order, **self.run_arguments.get("order", {})},
            "kept": {name: values[name] for name in KEPT},
            "taken": {name: values[name] for name in TAKEN},
        }

    def _compare_weights(self, checkpoint: str) -> None:
        """Refuses weights of other names or shapes, of which the Trainer would load those that fit."""
        saved = saved_shapes(checkpoint)
        if saved is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        model = self.accelerator.unwrap_model(self.model)
        own = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
        advice = "Choose another output_dir."
        for name, shape in saved.items():
            if name not in own:
                raise ValueError(f"{checkpoint} holds {name}, which this model does not have. {advice}")
            if list(own[name].shape) != shape:
                given = tuple(own[name].shape)
                raise ValueError(f"{checkpoint}: {name} has shape {tuple(shape)}, in this model {given}. {advice}")
        kept = {own[name].data_ptr() for name in saved}  # names that share a tensor are saved once
        ignored = model.base_model if isinstance(model, PeftModel) else model
        for name, tensor in own.items():
            left_out = any(re.search(key, name) for key in ignored._keys_to_ignore_on_save or ())
            if name not in saved and tensor.data_ptr() not in kept and not left_out:
                raise ValueError(f"{checkpoint} does not hold {name}, which this model has. {advice}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Syncs a checkpoint to disk before older ones are deleted."""
        output_dir = self._get_output_dir(trial)
        folder = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save:
                begin_checkpoint(folder)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each rank saves its random state
            if self.args.should_save:
                seal_checkpoint(folder, self._facts)
        except (OSError, SafetensorError, RuntimeError) as error:
            free = shutil.disk_usage(output_dir).free / 2**20
            raise OSError(
                f"{folder} could not be saved ({str(error).splitlines()[0]}); {free:,.0f} MiB are free. "
                "Make room, then run the same command again."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also sets the rate of the next step by the schedule of this run, which may be longer than the saved one."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if checkpoint is not None and isinstance(scheduler, LambdaLR):
            for group, rate, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = rate * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    def _run_epoch(self, **kwargs) -> None:
        """Does nothing if no step is left: a finished run that is started again must not train further.

        Raises:
            RuntimeError: if the data ended before the epoch did.
        """
        before = self.state.global_step
        if before >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)
        done = self.state.global_step
        expected = min(self.state.max_steps, (kwargs["epoch"] + 1) * kwargs["num_update_steps_per_epoch"])
        was_stopped = self.control.should_training_stop or self.control.should_epoch_stop
        if done == before or (done < expected and not was_stopped and isinstance(self.train_dataset, Sized)):
            raise RuntimeError(
                f"The training data ended after step {done}, but the epoch has {expected - before} more steps from "
                f"step {before}: check the data and its collator."
            )

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


@torch.no_grad()
def fingerprint(model: nn.Module) -> int:
    """A number of a model's frozen weights: the first values of each, so that large models take no time."""
    value = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            start = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)  # equal for all dtypes of a run
            value = zlib.crc32(start.view(torch.uint8).numpy().tobytes(), value)
    return value


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
