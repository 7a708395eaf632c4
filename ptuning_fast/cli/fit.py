"""The training itself: by one process, or by several that share every batch (`torchrun`, `accelerate launch`)."""

import json
import os
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..texts.tables import InputError

__all__ = ["last_checkpoint", "trainer_of"]


def last_checkpoint(folder: Path) -> str | None:
    """The newest in `folder` that is whole: a Trainer writes trainer_state.json last, and does without the rest."""
    numbers = {int(one.name[11:]): one for one in folder.glob("checkpoint-*") if one.name[11:].isdecimal()}
    for _, checkpoint in sorted(numbers.items(), reverse=True):
        if not all(any(map(_ends_well, checkpoint.glob(name))) for name in _PARTS):
            continue
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


_PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")


def _ends_well(file: Path) -> bool:
    """Whether nothing was cut off from it; torch.save writes ZIP files, which have their table at the end."""
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def trainer_of(model: nn.Module, collator: Any, train: list[Any], held_out: list[Any], options: Namespace) -> Trainer:
    """The Trainer of `model`. However many processes there are, it is the same training but for dropout.

    Args:
        train, held_out: all rows, in every process: Accelerate chooses each one's part.
    """
    state = PartialState()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(options.output, "runs")))
    try:
        arguments = TrainingArguments(
            output_dir=str(Path(options.output, "checkpoints")),
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
            save_steps=options.save_steps,
            save_total_limit=2,  # one is whole where the newest was cut off
            logging_steps=5,
            logging_first_step=True,
            report_to=options.report_to,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = _Together(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collator,
            compute_metrics=_accuracy,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError((str(error).splitlines() or ["?"])[0]) from None
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_LossInBar)
    if state.num_processes > 1:
        torch.manual_seed(options.seed + state.process_index)  # else all would draw the same dropout
    return trainer


class _LossInBar(ProgressCallback):
    """The progress bar, with the last loss in it instead of lines between; and what else there is at the last step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step >= state.max_steps:
            control.should_log = True
            # Resumed from the end of a part of an epoch, a Trainer goes one step further.
            control.should_save &= args.num_train_epochs % 1 == 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class _Together(Trainer):
    """A Trainer that may be one among several, whose losses and gradients have the whole batch's as their mean.

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
        processes = self.accelerator.num_processes
        if not model.training or processes == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = self._own(inputs.pop("labels"))
        items = self.accelerator.reduce((labels != -100).sum(), "sum")
        if self.model_accepts_loss_kwargs:
            return model(**inputs, labels=labels, num_items_in_batch=items)["loss"] * processes
        return F.cross_entropy(model(**inputs), labels, reduction="sum") * processes / items

    def _own(self, labels: Tensor) -> Tensor:
        """`labels`, with -100 for the rows that the batch was filled up with.

        Every process has as many, and the last batch has as many of all as are left. (Accelerate's own `remainder` is
        not known in an epoch that a resumed training begins within.)
        """
        state, accelerator = self.accelerator.gradient_state, self.accelerator
        if accelerator.num_processes == 1 or not state.end_of_dataloader:
            return labels
        whole, labels = len(labels) * accelerator.num_processes, labels.clone()
        left = len(state.active_dataloader.dataset) % whole or whole
        labels[max(left - accelerator.process_index * len(labels), 0) :] = -100
        return labels

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The whole batch's loss, which is then the one that is reported."""
        return self.accelerator.reduce(super().training_step(*args, **kwargs), "mean")

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        """Every process's is there before the file by which a checkpoint is known to be whole."""
        super()._save_rng_state(*args, **kwargs)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """One line where it cannot be written."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # PyTorch, safetensors and tokenizers each have another for a full disk
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # the bar ends its line
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["?"])[0]
            raise InputError(
                f"cannot save a checkpoint in {self.args.output_dir}: {reason}; once it can be, the same command with "
                "--resume goes on"
            ) from None

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Of a language model behind its prompt, the mean over all labels."""
        model: Any = self.accelerator.unwrap_model(self.model).eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for batch in self.get_eval_dataloader():
            labels = self._own(batch.pop("labels"))
            items = (labels != -100).sum()
            if items:
                total += torch.stack([model.prompt.loss(**batch, labels=labels, mode=model.mode) * items, items])
        loss, items = self.accelerator.reduce(total, "sum").tolist()
        if not items:
            raise InputError("no held-out text has a token that could be predicted: each has one alone")
        return loss / items


def _accuracy(result: Any) -> dict[str, float]:
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()}
