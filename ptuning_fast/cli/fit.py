"""The training itself: by one process, or by several that share every batch (`torchrun`, `accelerate launch`)."""

import tempfile
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from .tables import InputError

__all__ = ["fit", "processes"]


def processes(options: Namespace) -> PartialState:
    """This process among those that were started together; a single one where nobody started more.

    Raises:
        InputError: a batch that cannot be split among them.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    if options.batch_size % state.num_processes:
        raise InputError(
            f"a batch of {options.batch_size} texts cannot be split over {state.num_processes} processes: take a "
            f"--batch-size that is a multiple of {state.num_processes}"
        )
    return state


def fit(model: nn.Module, tokenizer: Any, train: list[Any], held_out: list[Any], options: Namespace) -> Trainer:
    """Train `model`; the Trainer that did it. However many processes there are, it is the same training.

    Args:
        train, held_out: all rows, in every process: Accelerate chooses each one's part.
    """
    state = processes(options)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            accelerator_config={"split_batches": True},  # the two above are of all processes together
            seed=options.seed,
            data_seed=options.seed,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            use_cpu=state.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = (Trainer if state.num_processes == 1 else _Together)(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_accuracy,
        )
        if state.num_processes > 1:
            torch.manual_seed(options.seed + state.process_index)  # else all would draw the same dropout
        trainer.train()
    return trainer


class _Together(Trainer):
    """A Trainer of one process among several, whose losses and gradients have the whole batch's as their mean.

    Accelerate fills the last batch up with texts of the first, so that every process gets as many. Those do not count,
    and the others count alike, however many of them a process has.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        processes, state = self.accelerator.num_processes, self.accelerator.gradient_state
        filled_up = state.end_of_dataloader and state.remainder > 0
        texts = state.remainder if filled_up else processes * len(labels)
        own = min(max(texts - self.accelerator.process_index * len(labels), 0), len(labels))
        logits = model(**inputs)
        return F.cross_entropy(logits[:own], labels[:own], reduction="sum") * processes / texts

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The whole batch's loss, which is then the one that is reported."""
        return self.accelerator.reduce(super().training_step(*args, **kwargs), "mean")


def _accuracy(result: Any) -> dict[str, float]:
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()}
