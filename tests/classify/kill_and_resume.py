"""`transformers.Trainer` with FastPTuning, killed at random points and resumed from its last checkpoint.

    python tests/classify/kill_and_resume.py --kills 20

trains once undisturbed and once killed (SIGKILL) again and again, and compares bit by bit what each step said its loss
was, each evaluation, and what was trained in the end. Exit status 0: all the same.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import zoo
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, logging

from ptuning_fast import FastPTuning
from ptuning_fast.files import adapter
from ptuning_fast.texts.docstrings import PACKAGES, stdlib_docstrings

STEPS_BETWEEN_KILLS, STEPS_BETWEEN_CHECKPOINTS = 12, 3
MOST_DONE_AGAIN = 2 * STEPS_BETWEEN_CHECKPOINTS + 2
"""Lines of the journal a kill: from the last checkpoint on or the one before, where that was cut off; evaluations."""


def rows(count=90):
    """Docstrings, letter by letter, and the numbers of their packages."""
    texts, labels = stdlib_docstrings()
    step = len(texts) // count
    return [
        {"input_ids": [3 + ord(letter) % 96 for letter in text[:40]], "labels": PACKAGES.index(label)}
        for text, label in list(zip(texts, labels))[: count * step : step]
    ]


def collate(batch):
    ids, mask = zoo.padded([torch.tensor(row["input_ids"]) for row in batch], "right")
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in batch])}


class Journal(TrainerCallback):
    """A line for everything that the Trainer logs, on disk before the next step."""

    def __init__(self, file):
        self.file = file

    def on_log(self, args, state, control, logs, **kwargs):
        kept = {key: logs[key] for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy") if key in logs}
        if kept:
            with open(self.file, "a") as file:
                file.write(json.dumps({"step": state.global_step} | kept) + "\n")


def checkpoints(folder):
    """Those in `folder`, the newest first."""
    return sorted(folder.glob("checkpoints/checkpoint-*"), key=lambda one: -int(one.name.split("-")[1]))


def is_whole(checkpoint):
    """A Trainer writes trainer_state.json last."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False


def train(folder, steps):
    """From the last checkpoint in `folder` on, if there is one."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = FastPTuning(zoo.build("BERT"), 4, len(PACKAGES), mode="packed").train()  # with dropout, as it comes
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        save_steps=STEPS_BETWEEN_CHECKPOINTS,
        save_total_limit=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    texts = rows()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=texts[::2] + texts[1::4],  # 68, so that a pass ends with half a batch
        eval_dataset=texts[3::4],
        data_collator=collate,
        callbacks=[Journal(folder / "journal.jsonl")],
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
    )
    trainer.remove_callback(PrinterCallback)
    last = next(filter(is_whole, checkpoints(folder)), None)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.save_pretrained(folder / "adapter")


def start(folder, steps):
    """A process of its own, forked so that imports are paid once."""
    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, steps))
    process.start()
    return process


def journal(folder):
    file = folder / "journal.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def train_with_kills(folder, steps, kills, generator):
    """The steps after which it was killed, and how many of these cut a checkpoint off."""
    killed, cut = [], 0
    while len(killed) < kills:
        process, lines = start(folder, steps), len(journal(folder))
        wanted = lines + generator.randrange(1, STEPS_BETWEEN_KILLS)
        while process.is_alive() and len(journal(folder)) < wanted:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))  # anywhere in a step, an evaluation or a checkpoint that is written
        process.kill()
        process.join()
        if process.exitcode != -9:
            raise SystemExit(f"the process ended by itself with status {process.exitcode}, after {len(killed)} kills")
        killed.append(journal(folder)[-1]["step"])
        cut += not all(map(is_whole, checkpoints(folder)[:1]))
    process = start(folder, steps)
    process.join()
    if process.exitcode:
        raise SystemExit(f"resumed after {kills} kills, it ended with status {process.exitcode}")
    return killed, cut


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the points at which it is killed")
    options = parser.parse_args()
    steps = STEPS_BETWEEN_KILLS * (options.kills + 2)
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")
        process = start(whole, steps)
        process.join()
        if process.exitcode:
            raise SystemExit(f"the undisturbed training ended with status {process.exitcode}")
        points, cut = train_with_kills(killed, steps, options.kills, random.Random(options.seed))
        expected = {(line["step"], "loss" in line): line for line in journal(whole)}
        lines = journal(killed)
        different = [line for line in lines if line != expected[line["step"], "loss" in line]]
        missing = expected.keys() - {(line["step"], "loss" in line) for line in lines}
        (tensors, settings), (others, other_settings) = (adapter.load(one / "adapter") for one in (whole, killed))
        same = settings == other_settings and all(torch.equal(tensors[name], others[name]) for name in tensors)
    again = len(lines) - len(expected)
    print(f"killed {len(points)} times, after the steps {points}; {cut} times while a checkpoint was written")
    print(
        f"{steps} steps and {len(expected) - steps} evaluations, {again} of them done again: {len(different)} differ, "
        f"{len(missing)} are missing; the adapter is {'the same' if same else 'another'}"
    )
    for line in different[:5]:
        print("  ", line, "undisturbed:", expected[line["step"], "loss" in line])
    return int(bool(different or missing) or not same or again > MOST_DONE_AGAIN * len(points))


if __name__ == "__main__":
    sys.exit(main())
