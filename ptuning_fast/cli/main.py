"""The command line: `python -m ptuning_fast train` and `python -m ptuning_fast predict`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence


def parser() -> argparse.ArgumentParser:
    """The options; the defaults train on an embedded encoder and text, without a download."""
    main = argparse.ArgumentParser(prog="python -m ptuning_fast", description="Prompt tuning for text classification.")
    commands = main.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter

    train = commands.add_parser("train", help="train a prompt and save it", formatter_class=formatter)
    train.add_argument("--model", help="hub id or folder of an encoder (default: the embedded MiniLM)")
    train.add_argument("--train-file", help="CSV, JSON lines or Parquet (default: docstrings of Python's own library)")
    train.add_argument("--eval-file", help="held-out texts, likewise (default: a fifth of the training texts)")
    train.add_argument("--text-column", default="text", help="column of the texts")
    train.add_argument("--label-column", default="label", help="column of the labels")
    train.add_argument("--output", default="prompt-tuning-adapter", help="folder for the adapter")
    train.add_argument(
        "--mode",
        choices=["auto", "prepend", "packed"],
        default="auto",
        help="packed leaves the padding out: the same up to rounding, and faster; prepend is the torch.cat layout, for "
        "models that packed refuses; auto is packed where the model can be packed",
    )
    train.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the frozen linear layers"
    )
    train.add_argument("--prompt-length", type=_whole(0), default=16, help="virtual tokens")
    train.add_argument("--init", default="vocab", help="what the prompt starts as: normal, vocab or a text")
    train.add_argument(
        "--pooling", choices=["first", "cls", "mean", "last"], help="what is classified (mean; last of a decoder)"
    )
    train.add_argument("--max-length", type=_whole(1), default=128, help="tokens that longer texts are cut to")
    train.add_argument("--epochs", type=_above_zero, default=1.0, help="passes over the training texts")
    train.add_argument("--learning-rate", type=_above_zero, default=5e-3, help="AdamW's, falling to 0 linearly")
    train.add_argument("--batch-size", type=_whole(1), default=32, help="texts a step")
    train.add_argument(
        "--seed", type=_whole(0, 2**32 - 1), default=0, help="of the prompt, the split and the order of the texts"
    )

    predict = commands.add_parser("predict", help="read texts, write labels", formatter_class=formatter)
    predict.add_argument("--adapter", required=True, help="folder that train wrote")
    predict.add_argument("--model", help="the encoder, where it is not where it was trained")
    predict.add_argument("--file", help="CSV, JSON lines, Parquet, or .txt, a text a line (default: standard input)")
    predict.add_argument("--text-column", default="text", help="column of the texts")
    predict.add_argument("--output", help="file for the labels (default: standard output)")
    predict.add_argument("--scores", action="store_true", help="write each label's probability behind it")
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
    from . import predict, train
    from .tables import InputError

    try:
        (train if options.command == "train" else predict).run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was saved" if options.command == "train" else "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if options.command == "predict" else 1  # whoever reads labels may stop; training was cut off
    return 0
