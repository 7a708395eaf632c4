"""Every argument that a forward of transformers takes: is it behind a prompt what it is behind the prompt's own tokens?

python tests/sweep_arguments.py                           every class that can be built, some 600 (half an hour)
python tests/sweep_arguments.py BertForMaskedLM T5Model   these alone, with what was refused and why

A PromptedModel's prompt is made of tokens, so a model that has those tokens in its input_ids is the truth. An argument
that `VALUES` has no value for is counted as untried.
"""

import argparse
import copy
import inspect
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import sweep
import torch
import transformers
from sweep import ATTEMPTS, NEEDS, SETTINGS, V, Verdict, off, small
from torch import Tensor
from transformers.utils import logging

from ptuning_fast import PromptedModel
from ptuning_fast.models.info import has_decoder

M, B, N, NEW = 4, 3, 9, 6  # virtual tokens, rows, columns, tokens of a decoder
SIZE, REGIONS = 16, 4  # pixels of an image; regions of an image
TOLERANCE = 3e-4  # relative to the largest output
SECONDS = 60  # for one class; a few are slow to be made
OTHERS = {"image_size": SIZE, "patch_size": 8, "num_labels": 3, "vision_feature_layer": -1, "projection_dim": 32}
OTHERS |= {"max_2d_position_embeddings": 64, "visual_embedding_dim": 32, "visual_feat_dim": 32}
# What a call of the wrong kind is not given: the prompt takes its place, or it is another kind of call.
NOT_TRIED = {"self", "kwargs", "input_ids", "attention_mask", "inputs_embeds", "past_key_values", "cache", "mems"}
NOT_TRIED |= {"state", "cache_params", "past_buckets_states", "end_positions", "input_features_mask", "return_dict"}


class Given(NamedTuple):
    """An argument behind a prompt, the same where the prompt's tokens are in the input_ids, and what goes with it."""

    here: Any
    behind_tokens: Any
    also: Any  # {name: Given}


class Late(BaseException):
    """Raised in the middle of anything."""


class Asked(NamedTuple):
    """A model, of which the values of its arguments are."""

    model: Any
    random: torch.Generator

    @property
    def width(self) -> int:
        return getattr(self.model.config.get_text_config(), "hidden_size", 32)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def below(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=self.random)


def same(value: Any, **also: Given) -> Given:
    """What is not of the text's columns."""
    return Given(value, value, also)


def moved(columns: Tensor, **also: Given) -> Given:
    """Numbers of columns."""
    return Given(columns, torch.where(columns < 0, columns, columns + M), also)


def per_token(value: Tensor, of_prompt: float = 0, **also: Given) -> Given:
    """[B, N, ...], before which the prompt's tokens have `of_prompt`."""
    before = torch.full((B, M, *value.shape[2:]), of_prompt, dtype=value.dtype)
    return Given(value, torch.cat([before, value], 1), also)


def labels(asked: Asked) -> list[Given]:
    name = type(asked.model).__name__
    if has_decoder(asked.model):
        return [same(asked.below(100, B, NEW) + 3), same(asked.below(100, B, N) + 3)]
    if "ForSequenceClassification" in name or "QuestionAnswering" in name or "NextSentence" in name:
        return [same(torch.tensor([0, 1, 1])), same((asked.numbers(B, asked.model.config.num_labels) > 0).float())]
    if "MultipleChoice" in name:
        return []
    of = (
        asked.model.config.num_labels
        if "TokenClassification" in name
        else 2
        if "Electra" in name and "PreTraining" in name
        else V
    )
    found = asked.below(of, B, N)
    found[:, 0] = found[0, 3] = -100  # a prompt's last token would predict the first
    return [per_token(found, -100)]


def answers(asked: Asked) -> list[Given]:
    start, end = torch.tensor([1, 2, 0]), torch.tensor([3, 5, 0])
    place = same if has_decoder(asked.model) else moved
    beyond = torch.tensor([1, N + 50, 2])
    return [
        place(start, end_positions=place(end)),
        place(start[:, None], end_positions=place(end[:, None])),
        place(beyond, end_positions=place(beyond + 1)),
    ]


def without(given: Given, mask: Tensor) -> Given:
    """Labels, of padding none, where they are of tokens."""
    if given.here.shape != mask.shape or given.behind_tokens.shape == mask.shape:
        return given
    return per_token(given.here.masked_fill(mask == 0, -100), -100)


def states(asked: Asked, rows: int) -> Tensor:
    return asked.numbers(B, rows, asked.width)


def seen(rows: int) -> Tensor:
    """[B, rows], a mask."""
    mask = torch.ones(B, rows).long()
    mask[0, rows // 2 :] = 0
    return mask


def regions(asked: Asked, rows: int, *also: str) -> dict[str, Given]:
    """Where regions of an image are, which LXMERT needs; `also` the rows themselves."""
    if "Lxmert" not in type(asked.model).__name__:
        return {}
    found = {"visual_pos": same(asked.numbers(B, rows, 4))}
    return found | {name: same(asked.numbers(B, rows, 32)) for name in also}


def entities(asked: Asked) -> list[Given]:
    places = torch.full((B, 2, 5), -1)
    places[:, 0, 0], places[:, 0, 1], places[:, 1, 0] = 2, 3, 5
    also = {"entity_position_ids": moved(places)}
    if "EntitySpan" in type(asked.model).__name__:
        also |= {"entity_start_positions": moved(torch.tensor([[2, 5]] * B))}
        also |= {"entity_end_positions": moved(torch.tensor([[3, 5]] * B))}
    ids = asked.below(8, B, 2) + 1
    return [same(ids, **also), same(ids)]


def types(asked: Asked) -> list[Given]:
    of = getattr(asked.model.config.get_text_config(), "type_vocab_size", 2)
    return [per_token(asked.below(of if isinstance(of, int) and of > 0 else 2, B, N))]


def pixels(asked: Asked) -> list[Given]:
    size = asked.model.config
    size = getattr(size, "image_size", None) or getattr(getattr(size, "vision_config", None), "image_size", SIZE)
    size = size if isinstance(size, int) else size[0]
    image = asked.numbers(B, 3, size, size)
    return [same(image), same(image.bfloat16()), same(torch.zeros_like(image)), same([*image])]


def places_of_targets(asked: Asked) -> list[Given]:
    here, behind = torch.zeros(B, 1, N), torch.zeros(B, 1, M + N)
    here[..., -1] = behind[..., -1] = 1
    return [Given(here, behind, {})]


def flags(_: Asked) -> list[Given]:
    return [same(True), same(False)]


VALUES: dict[str, Callable[[Asked], list[Given]]] = {
    name: values
    for names, values in {
        "position_ids": lambda _: [Given(torch.arange(N).expand(B, -1), torch.arange(M + N).expand(B, -1), {})],
        "token_type_ids mm_token_type_ids moe_mm_token_type_ids": types,
        "langs bbox input_shape_ids input_pronunciation_ids": lambda a: [
            per_token(a.below(1, B, N)),
            per_token(a.below(9, B, N, 4).sort(-1)[0]),
        ],
        "task_type_ids table_mask": lambda a: [per_token(a.below(2, B, N))],
        "lang_ids": lambda _: [same(torch.zeros(B).long())],
        "global_attention_mask": lambda a: [per_token(torch.eye(1, N).long().repeat(B, 1))],
        "xpath_tags_seq xpath_subs_seq": lambda a: [per_token(a.below(5, B, N, 50))],
        "question_lengths": lambda _: [moved(torch.full((B, 1), 3)), same(torch.full((B, 1), 3))],
        "output_attentions output_hidden_states use_cache output_router_logits return_loss is_decoder use_mems": flags,
        "interpolate_pos_encoding num_hashes": lambda _: [same(True), same(2)],
        "logits_to_keep": lambda _: [
            *map(same, (2, 0, torch.tensor([-1]), torch.tensor([-3, -1]))),
            moved(torch.tensor([0, 4])),
        ],
        "encoder_hidden_states": lambda a: [same(states(a, rows)) for rows in (7, N)],
        "encoder_attention_mask": lambda a: [
            same(seen(rows), encoder_hidden_states=same(states(a, rows))) for rows in (7, N)
        ],
        "next_sentence_label sentence_order_label": lambda a: [
            same(torch.tensor([0, 1, 1]), labels=per_token(a.below(V, B, N), -100))
        ],
        "start_positions": answers,
        "p_mask input_mask": lambda _: [per_token(torch.eye(1, N).repeat(B, 1))],
        "cls_index": lambda _: [moved(torch.ones(B).long())],
        "is_impossible": lambda _: [same(torch.tensor([0.0, 1.0, 0.0]))],
        "labels": labels,
        "decoder_input_ids": lambda a: [same(a.below(100, B, rows) + 3) for rows in (5, N)],
        "decoder_attention_mask": lambda a: [same(seen(N), decoder_input_ids=same(a.below(100, B, N) + 3))],
        "decoder_position_ids": lambda a: [
            same(torch.arange(N).repeat(B, 1), decoder_input_ids=same(a.below(100, B, N) + 3))
        ],
        "decoder_inputs_embeds": lambda a: [same(states(a, rows)) for rows in (5, N)],
        "encoder_outputs": lambda a: [same((states(a, N),)), same((states(a, M + N),))],
        "perm_mask": lambda _: [Given(torch.zeros(B, N, N), torch.zeros(B, M + N, M + N), {})],
        "target_mapping": places_of_targets,
        "lengths": lambda _: [Given(torch.full((B,), N), torch.full((B,), M + N), {})],
        "entity_ids": entities,
        "entity_attention_mask entity_token_type_ids": lambda _: [same(torch.ones(B, 2).long())],
        "numeric_values numeric_values_scale": lambda a: [per_token(a.numbers(B, N).abs() + 1)],
        "float_answer": lambda a: [same(a.numbers(B))],
        "aggregation_labels": lambda _: [same(torch.tensor([0, 1, 1]))],
        "bbox_first_token_mask": lambda _: [per_token(torch.ones(B, N).bool())],
        "visual_embeds visual_feats": lambda a: [
            same(a.numbers(B, rows, 32), **regions(a, rows)) for rows in (REGIONS, N)
        ],
        "visual_attention_mask": lambda a: [
            same(seen(REGIONS), visual_embeds=same(a.numbers(B, REGIONS, 32))),
            same(seen(REGIONS), visual_feats=same(a.numbers(B, REGIONS, 32)), **regions(a, REGIONS)),
        ],
        "image_text_alignment": lambda a: [
            moved(a.below(4, B, REGIONS, 2), visual_embeds=same(a.numbers(B, REGIONS, 32)))
        ],
        "pixel_values": pixels,
        "image_embeds": lambda a: [same(states(a, REGIONS))],
        "input_features input_values": lambda a: [same(a.numbers(B, 16, 64)), same(a.numbers(B, 64))],
    }.items()
    for name in names.split()
}


def build(name: str) -> Any:
    """The model with random weights, frozen, in eval mode."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    attempts = [(settings, runs) for runs in (True, False) for settings in ATTEMPTS]  # some run with more than ids only
    for settings, runs in attempts:
        try:
            made = small(config_class, SETTINGS | OTHERS | settings | NEEDS.get(config_class.model_type, {}))
            return sweep.built(made, name, "eager", most=1e7, runs=runs)
        except Exception as error:
            last = error
    raise last


def call(model: Any, **arguments: Any) -> dict[str, Any]:
    """What comes out, by name; of a model in a random state that is the same each time."""
    inner = model.model if isinstance(model, PromptedModel) else model
    own = {"decoder_input_ids", "decoder_inputs_embeds"} & arguments.keys()
    finds = "labels" in arguments and "Conditional" in type(inner).__name__
    if has_decoder(inner) and not own and not finds:
        arguments["decoder_input_ids"] = torch.arange(3, 3 + NEW).repeat(len(arguments["input_ids"]), 1)
    torch.manual_seed(5)
    with torch.no_grad():
        return dict(copy.deepcopy(model)(**arguments))


def differences(actual: dict[str, Any], expected: dict[str, Any], mask: Tensor) -> list[str]:
    """Outputs that are others, but for those of padding: of other columns than the text's, in rows without any."""
    found = []
    for name in expected:
        if any(part in name for part in ("past", "cache", "mems", "attentions", "router", "state_")):
            continue
        if name == "loss" and "start_logits" in expected and (mask == 0).any():
            continue  # it goes over padding's columns, too, whose outputs mean nothing
        if name not in actual:
            if name != "pooler_output":  # of one row, so a packed batch has none
                found.append(f"{name} is missing")
            continue
        pairs = [(actual[name], expected[name])]
        if isinstance(expected[name], (tuple, list)):
            pairs = list(zip(actual[name], expected[name]))
        for one, other in pairs:
            if not (torch.is_tensor(one) and torch.is_tensor(other)):
                continue
            if one.dim() == other.dim() > 1 and other.shape[1] == one.shape[1] + M:
                other = other[:, M:]
            if one.shape == other.shape and one.dim() > 1 and len(one) == B:
                kept = mask != 0 if one.shape[1] == N else mask.all(1)
                one, other = one[kept], other[kept]
            worst = off(*(each.double().nan_to_num(posinf=1e9, neginf=-1e9) for each in (one, other)))
            if worst > TOLERANCE and (one.numel() or other.numel()):
                found.append(f"{name} {worst:.1e}")
    return found


def judge(prompted: Any, given: dict[str, Given], ids: Tensor, tokens: Tensor, mask: Tensor) -> Verdict:
    """Of the arguments `given`, behind a prompt that is made of `tokens`."""
    expected: dict[str, Any] | str
    ids = ids.masked_fill(mask == 0, 0)
    text = {"input_ids": ids, "attention_mask": mask}
    whole = {"input_ids": torch.cat([tokens, ids], 1), "attention_mask": torch.cat([torch.ones_like(tokens), mask], 1)}
    if "position_ids" in given:  # as of texts without padding, in which they may say where others begin
        whole["attention_mask"] = text["attention_mask"] = None
    try:
        expected = call(prompted.model, **whole, **{name: one.behind_tokens for name, one in given.items()})
    except Exception as error:
        expected = f"{type(error).__name__}: {error}"
    try:
        here = {name: one.here for name, one in given.items()}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            actual = call(prompted, **text, **here)
    except (TypeError, ValueError) as error:
        return Verdict("refused" if isinstance(expected, dict) else "-", str(error))
    except Exception as error:
        return Verdict("fails" if isinstance(expected, dict) else "-", f"{type(error).__name__}: {error}")
    if isinstance(expected, str):
        return Verdict("taken", f"though behind tokens: {expected}")
    if "logits_to_keep" in given:  # Moshi keeps those of its last states, too
        expected.pop("last_hidden_state", None)
    if type(prompted.model).__name__ == "XLNetForSequenceClassification" and (mask == 0).any():
        expected.pop("loss", None)  # behind ids it reads the last column, be it padding; behind a prompt the last token
    found = differences(actual, expected, mask)
    if not found:
        return Verdict("equal")
    about = [str(one.message) for one in said if one.category is UserWarning]
    return Verdict("warned" if about else "WRONG", ", ".join([*found[:4], *about]))


def arguments_of(name: str) -> tuple[dict[str, Verdict], list[str]] | str:
    """{argument and its n-th value: verdict}, and arguments that were not tried; or why there is nothing to try."""
    try:
        model = build(name)
        random = torch.Generator().manual_seed(1)
        tokens, ids = (torch.randint(10, 100, shape, generator=random) for shape in ((1, M), (B, N)))
        prompted = PromptedModel(model, M, init=model.get_input_embeddings()(tokens[0]).float()).eval()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    tokens, found, untried = tokens.expand(B, -1), {}, []
    whole, ragged = torch.ones(B, N).long(), torch.ones(B, N).long()
    ragged[0, 5:] = ragged[1, 7:] = 0
    for kind, mask in {"": whole, ", padded": ragged}.items():
        needs = regions(Asked(model, random), REGIONS, "visual_feats")
        found[f"nothing{kind}"] = judge(prompted, needs, ids, tokens, mask)
        if found[f"nothing{kind}"].word not in ("equal", "-"):
            break  # without arguments it is sweep.py's
        for argument in inspect.signature(model.forward).parameters.keys() - NOT_TRIED:
            if argument not in VALUES:
                untried.append(argument)
                continue
            for number, one in enumerate(VALUES[argument](Asked(model, random))):
                given = {**needs, argument: one, **one.also}
                if "labels" in given:
                    given["labels"] = without(given["labels"], mask)
                found[f"{argument} {number}{kind}"] = judge(prompted, given, ids, tokens, mask)
    return found, sorted({*untried})


def classes() -> list[str]:
    """The classes of transformers whose forward takes embeddings in the place of ids."""
    found = []
    for name in dir(transformers):
        one = getattr(transformers, name, None) if name[0].isupper() else None
        if not (inspect.isclass(one) and issubclass(one, transformers.PreTrainedModel)):
            continue
        takes = inspect.signature(one.forward).parameters.keys()
        if {"input_ids", "inputs_embeds"} <= takes and one.config_class is not None:
            found.append(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, late)
    count: dict[str, int] = {}
    not_built, never = [], set()
    for name in arguments.classes or classes():
        signal.alarm(SECONDS)
        try:
            found = arguments_of(name)
        except Late:
            found = f"takes more than {SECONDS} seconds"
        signal.alarm(0)
        if isinstance(found, str):
            not_built.append(name)
            print(f"{name}: not tried: {found[:150]}", flush=True)
            continue
        verdicts, untried = found
        never |= {*untried}
        told = {
            what: one for what, one in verdicts.items() if arguments.classes or one.word in ("WRONG", "fails", "taken")
        }
        for one in verdicts.values():
            count[one.word] = count.get(one.word, 0) + 1
        print(f"{name}: {len(verdicts)} calls", flush=True)
        for what, one in told.items():
            print(f"    {what}: {one.word} {one.why[:200]}", flush=True)
    print(f"{count}; {len(not_built)} classes not tried; arguments without a value: {', '.join(sorted(never))}")
    return int(count.get("WRONG", 0) > 0)


def late(*_: Any) -> None:
    raise Late


if __name__ == "__main__":
    sys.exit(main())
