"""The command line: `ptuning-fast train` and `ptuning-fast predict`, or `python -m ptuning_fast ...`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """The options; the defaults train on an embedded encoder and text, without a download."""
    main = argparse.ArgumentParser(
        prog="ptuning-fast", description="Prompt tuning: of a text classifier, or of a language model."
    )
    commands = main.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a prompt and save it", formatter_class=_Formatter)
    train.add_argument(
        "--task", choices=["classify", "lm"], default="classify", help="a classifier, or a language model's prompt"
    )
    train.add_argument("--model", help="hub id or folder of a model (default: the embedded MiniLM encoder)")
    train.add_argument(
        "--train-file", help="CSV, TSV, JSON or Parquet; for lm .txt, too (default: docstrings of Python's own library)"
    )
    train.add_argument("--eval-file", help="held-out texts, likewise (default: a fifth of the training texts)")
    train.add_argument("--text-column", help="column of the texts (default: text)")
    train.add_argument("--label-column", help="column of the labels (default: label)")
    train.add_argument("--prompt-column", help="lm: column of what is to be continued (default: prompt), and")
    train.add_argument("--completion-column", help="lm: how (default: completion), where a file has both")
    train.add_argument("--output", default="prompt-tuning-adapter", help="folder for the adapter")
    train.add_argument("--overwrite", action="store_true", help="replace an adapter, or a training that was cut off")
    train.add_argument("--resume", action="store_true", help="go on with the training in --output that was cut off")
    train.add_argument("--save-steps", type=_whole(1), default=20, help="from one checkpoint to the next")
    train.add_argument("--report-to", default="none", help="tensorboard, wandb, ...: where the Trainer logs to")
    train.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="speed beside torch.cat, at the end (default: without --model and --train-file)",
    )
    train.add_argument(
        "--mode",
        choices=["auto", "prepend", "packed", "shared"],
        default="auto",
        help="packed leaves the padding out: the same up to rounding, and faster; shared, of lm, the prompts of all "
        "texts but one, too; prepend is the torch.cat layout, for models that these refuse; auto is what a model takes",
    )
    train.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="of the frozen weights; fp32: as they are stored",
    )
    train.add_argument("--prompt-length", type=_whole(0), default=16, help="virtual tokens")
    train.add_argument("--init", default="vocab", help="what the prompt starts as: normal, vocab or a text")
    train.add_argument(
        "--pooling", choices=["first", "cls", "mean", "last"], help="what is classified (mean; last of a decoder)"
    )
    train.add_argument(
        "--max-length", type=_whole(1), help="tokens that longer texts are cut to (default: 128; lm: 512)"
    )
    train.add_argument("--epochs", type=_above_zero, default=1.0, help="passes over the training texts")
    train.add_argument("--learning-rate", type=_above_zero, default=5e-3, help="AdamW's, falling to 0 linearly")
    train.add_argument("--batch-size", type=_whole(1), default=32, help="texts a step")
    train.add_argument(
        "--seed", type=_whole(0, 2**32 - 1), default=0, help="of the prompt, the split and the order of the texts"
    )

    predict = commands.add_parser("predict", help="read texts, write what comes of them", formatter_class=_Formatter)
    predict.add_argument("--adapter", required=True, help="folder that train wrote")
    predict.add_argument("--model", help="the model, where it is not where it was trained")
    predict.add_argument("--file", help="CSV, TSV, JSON, Parquet, or .txt, a text a line (default: standard input)")
    predict.add_argument("--text-column", help="column of the texts (default: text; lm: or else prompt)")
    predict.add_argument("--output", help="file for the labels (default: standard output)")
    predict.add_argument("--scores", action="store_true", help="write each label's probability behind it")
    predict.add_argument("--max-new-tokens", type=_whole(1), help="lm: of each continuation (default: 64)")
    predict.add_argument("--batch-size", type=_whole(1), default=32, help="texts at a time")
    return main


def _whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between {least} and {most}")
        return value

    whole.__name__ = "whole number"
    return whole


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when it went well, 2 and one line on standard error when the input cannot be used."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # a label that a terminal has no letters for is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    from ..texts.tables import InputError
    from . import predict, train

    try:
        (train if options.command == "train" else predict).run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        left = options.command == "train" and Path(options.output, "checkpoints").exists()
        print("interrupted" + ": the same command with --resume goes on" * left, file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if options.command == "predict" else 1  # whoever reads labels may stop; training was cut off
    except Exception as error:
        if type(error) is not Exception:
            raise
        print(f"error: {error}", file=sys.stderr)  # tokenizers': a text that the tokenizer has no tokens for
        return 2
    return 0
