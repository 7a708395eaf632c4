"""What a trained prompt is written as: an adapter, on the hub too, an ordinary checkpoint, rows for a runtime."""

import copy
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ..files import adapter, card, hub, peft
from ..files.base_model import check_base, load_head, lost_adapter, settings_of
from ..files.weights import warn_of_weights, without_adapter
from ..models import unwrapped
from ..models.families import is_written_in
from ..models.trial import quietly
from . import heads, merged

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Saving"]


def _whole(encoder: Any) -> Any:
    """`encoder`, or a copy with whole parameters where they are sharded."""
    parameters = dict(encoder.named_parameters())
    gathered = adapter.whole(parameters)
    if all(gathered[name] is parameter for name, parameter in parameters.items()):
        return encoder
    memo: dict[int, Any] = {id(one): nn.Parameter(gathered[name]) for name, one in parameters.items()}
    encoder = copy.deepcopy(encoder, memo)  # without parts and their gradients, which are not to be copied
    for name in parameters:
        place, _, last = name.rpartition(".")
        setattr(encoder.get_submodule(place), last, encoder.get_parameter(name))  # an LSTM keeps a list of them, too
    return encoder


class Saving(nn.Module):
    """The part of a SoftPrompt that writes it and reads it back."""

    model: Any
    prompt_embeddings: nn.Parameter
    encoder: Any
    base_model: str
    _new: frozenset[str]  # names of the model's parameters that its checkpoint had not, and that go with the prompt
    _perhaps: frozenset[str]  # and of those that it may not have had, which are written, and not missed
    _came_with: frozenset[str] = frozenset()  # names of the model's parameters that its adapter brought
    _came_as: frozenset[str] = frozenset()  # and PEFT's names of the modules that these are of

    def final_prompt(self) -> Tensor:
        """The prompt as it is merged and served: [m, d] or [K, m, d], without the encoder's dropout.

        Where FSDP2 has sharded the parameters they are gathered, so every process must call this.

        Raises:
            ValueError: the first FSDP has it in parts; pruning, a parametrization or an `embeddings` of a subclass's
                makes it of other parameters.
        """
        return self._made_by(lambda encoder: encoder)

    def _made_by(self, change: Callable[[Any], Any]) -> Tensor:
        """The prompt, by what `change` makes of the encoder."""
        self.state_dict()  # for which FSDP2 shards what a forward has left whole, and in half precision
        adapter.check_whole(self.prompt_embeddings)
        self._check_plain()
        with torch.no_grad():
            prompt = adapter.whole({"": self.prompt_embeddings})[""]
        if self.encoder is None:
            return prompt
        encoder = change(_whole(self.encoder))
        with quietly(encoder):
            return encoder(prompt)

    def _check_encoder(self, rows: Tensor) -> None:
        """ValueError where whoever reads a file would not make `rows` of what is in it, as of an encoder's hooks."""
        read = None
        with suppress(AttributeError, RuntimeError):  # of one's own, or with other layers
            read = self._made_by(lambda encoder: encoder.as_read())
        if read is None or not torch.allclose(read.float(), rows.float(), rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ValueError(
                "encoder is not as it was made (an activation, a hook, layers of your own), and a file has the "
                "parameters of P-tuning's alone: save what it makes, "
                "SoftPrompt(model, m, init=prompt.final_prompt()), or keep state_dict() to train on"
            )

    def _check_plain(self) -> None:
        """ValueError where the prompt is made of its parameters otherwise than whoever reads a file makes it."""
        made: Any = self
        if not is_written_in(getattr(made.embeddings, "__func__", made.embeddings), "ptuning_fast."):
            raise ValueError(
                f"embeddings() of this {type(self).__name__} is not SoftPrompt's, and a file has its parameters alone: "
                "save what it makes, SoftPrompt(model, m, init=prompt.embeddings().detach())"
            )
        parametrized = any(map(parametrize.is_parametrized, self.modules()))
        if parametrized or prune.is_pruned(self) or "prompt_embeddings" not in self._parameters:
            raise ValueError(
                f"the prompt's parameters are made of others ({', '.join(self.state_dict())}): make them ones again, "
                "by prune.remove(module, name) or parametrize.remove_parametrizations(module, name) of torch.nn.utils, "
                "or save SoftPrompt(model, m, init=prompt.embeddings().detach())"
            )

    def _kept(self) -> tuple[peft.Saved, Tensor, bool]:
        """All that is written, the prompt as the model sees it, and whether this process is the one to write it."""
        rows = self.final_prompt()
        if self.encoder is not None:
            self._check_encoder(rows)
        parameters, head = self.state_dict(), heads.head_of(self.model)
        of_model = unwrapped(self.model).state_dict()
        more = self._new | self._perhaps
        head |= {name: one for name, one in of_model.items() if name in more}  # in one order in all processes
        modules = heads.modules_of(self.model, head) | self._came_as
        head |= {name: one for name, one in of_model.items() if name in self._came_with}
        for name in head:
            if not without_adapter(unwrapped(self.model), name):
                copied = "has a copy in its place (PEFT's modules_to_save): give the model its adapter first, "
                copied += "PromptedModel(get_peft_model(model, ...)), or unload() the adapter before saving"
                merged = "has an adapter merged into it for now: call unmerge_adapter() before saving"
                raise ValueError(f"{name} {copied if 'original_module' in name else merged}")
        config = peft.peft_config(self.model, self.base_model, rows.shape[-2], rows.shape[-1], modules)
        encoder = None if self.encoder is None else self.encoder.settings
        bank = len(rows) if rows.dim() == 3 else None
        settings = {"num_prompts": bank, "encoder": encoder} | settings_of(self.model)
        saved = peft.Saved(adapter.whole(parameters), adapter.whole(head), config, settings)
        return saved, rows, adapter.is_first([*parameters.values(), *head.values()])

    @torch.no_grad()
    def embeddings_for(self, text_ids: Tensor | list[int], prompt_index: int | None = None) -> Tensor:
        """The prompt and one text as a runtime takes them that reads embeddings: vLLM's `{"prompt_embeds": ...}`.

        Args:
            text_ids: [n] token ids, as the model's tokenizer gives them.
            prompt_index: which of `num_prompts`.

        Returns:
            [m + n, d] on the CPU, in the dtype of the model's embeddings, scaled as the model scales them.

        Raises:
            ValueError: ids of more than one text; a `prompt_index` missing, or with one prompt.
        """
        table = self.model.get_input_embeddings()
        ids = torch.as_tensor(text_ids, dtype=torch.int64, device=self.prompt_embeddings.device)
        if ids.dim() != 1:
            raise ValueError(f"text_ids must be those of one text, [n]; they are {list(ids.shape)}")
        rows, text = self.final_prompt(), table(ids)
        if (prompt_index is None) != (rows.dim() == 2):
            raise ValueError(
                f"prompt_index is {prompt_index}, and the prompt {list(rows.shape)}: it chooses from a bank"
            )
        return torch.cat([(rows if prompt_index is None else rows[prompt_index]).to(text), text]).cpu()

    def save_pretrained(self, folder: str | Path, *, figures: dict[str, Any] | None = None) -> None:
        """Write the prompt, and a classifier's head with it, as an adapter that `peft.PeftModel.from_pretrained` loads.

        What PEFT does not know of (an encoder, a bank) is in the same file, so that training can go on from here. A
        README.md, the hub's model card, says what it is and how to load it, with `figures` as a table.

        Parameters that FSDP2 has sharded are gathered: every process must then call this, and the first one writes.

        Raises:
            ValueError: a folder with an adapter of another kind in it (LoRA), or a model; a head into which PEFT's
                `merge_adapter` has put a LoRA for now. Nothing is written.
        """
        saved, rows, first = self._kept()
        if first:
            with adapter.saving(Path(folder)):
                peft.save(folder, saved, rows)
                card.write_adapter(folder, unwrapped(self.model), saved.config, saved.settings, figures)

    def save_pretrained_merged(
        self, folder: str | Path, tokenizer: Any, *, names: list[str] | None = None, post_processor: bool = True
    ) -> dict[str, str]:
        """Write model and tokenizer with the prompt in their vocabulary: an ordinary checkpoint, for any runtime.

        `AutoModelForCausalLM` and `AutoTokenizer` load it, `pipeline` serves it. The tokenizer puts the virtual tokens
        before each text and each chat by itself, and what the model is then given is what this prompt gives it. They
        are never generated. Neither `model` nor `tokenizer` is changed; a tied head is written as one of its own. What
        a merge into the same folder wrote before is replaced once the new one is whole; one that is killed while its
        files are moved leaves no weights, and so nothing that loads.

        Args:
            tokenizer: the model's, a fast one.
            names: what the tokens are called, `<|name_0|>`, ...: `["prompt"]`, or one for each prompt of a bank,
                `["prompt_0", ...]`. A bank's have a tokenizer each, in folders of these names.
            post_processor: without, `tokenizer(text)` gives what it gave (as converters to GGUF want it), and the
                prompt is put before a text as a string; chat templates have it all the same.

        Returns:
            For each name, that string: the virtual tokens, and what the tokenizer itself puts before a text (BOS). It
            is for tokenizing with `add_special_tokens=False`.

        Raises:
            TypeError: a model whose vocabulary cannot hold the prompt (an encoder-decoder, quantized, sharded, with an
                adapter of PEFT's), or a slow tokenizer, with what to do instead.
            ValueError: another model's tokenizer, or one whose ids have a gap; names that are taken; a folder that
                holds an adapter, or a model that no merge has written.
        """
        if isinstance(tokenizer, (str, os.PathLike)) or not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"the folder comes first, and then the tokenizer itself; {tokenizer!r} is given as that")
        return merged.save(folder, self.model, tokenizer, self.final_prompt(), names, post_processor)

    def push_to_hub(self, repo_id: str, *, figures: dict[str, Any] | None = None, **options: Any) -> str:
        """Upload what `save_pretrained` writes to a repository on the hub, which is made if it is not there.

        Args:
            options: `private`, `token`, `revision`, `commit_message`, `create_pr`.

        Returns:
            The commit's address.
        """
        return hub.push(repo_id, lambda folder: self.save_pretrained(folder, figures=figures), **options)

    @classmethod
    def from_pretrained(cls, model: Any, folder: str | Path, *, any_base: bool = False) -> "Self":
        """The prompt that `save_pretrained` wrote, or PEFT's (PROMPT_TUNING, P_TUNING), ready to be used or trained on.

        In eval mode: `train()` gives an encoder its dropout back. A head that was saved with it is loaded into `model`.

        Args:
            folder: a folder, or a repository on the hub ("user/name").
            any_base: take an adapter that was trained on a model of another name, or with other weights, of which there
                is a warning. (Of folders the last part is compared: `runA/checkpoint-500` passes for
                `runB/checkpoint-500`.)

        Raises:
            FileNotFoundError: no adapter in `folder`.
            ValueError: an adapter of another kind, or for a model of another name, type or width.
        """
        if isinstance(model, (str, Path)):
            raise TypeError(f"the model comes first, and then the folder; {model!r} is given as the model")
        folder = hub.local(folder)
        saved = peft.load(folder)
        check_base(model, saved, folder, any_base)
        tensors, head, config, settings = saved
        options = {f"encoder_{key}": value for key, value in (settings.get("encoder") or {}).items() if key != "kind"}
        kind = (settings.get("encoder") or {}).get("kind")
        start = torch.zeros(tensors["prompt_embeddings"].shape[-2:])
        rng = torch.random.get_rng_state()
        prompt = cls(model, len(start), init=start, num_prompts=settings.get("num_prompts"), encoder=kind, **options)
        torch.random.set_rng_state(rng)
        for name, parameter in prompt.named_parameters():
            if name in tensors:
                parameter.data = parameter.data.to(tensors[name].dtype)
        try:
            prompt.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"the adapter in {folder} is damaged: {error}") from None
        load_head(model, head, folder)
        merged_since = lost_adapter(model, settings)  # if at all: check_base has said so
        for name in [] if merged_since else sorted(prompt._new - head.keys())[:1]:
            warnings.warn(
                f"{name} of {type(unwrapped(model)).__name__} is new, as the checkpoint has none, and the adapter in "
                f"{folder} brings none: it is not what the prompt was trained with",
                stacklevel=2,
            )
        if not (any_base or merged_since):
            warn_of_weights(model, settings, folder)
        prompt._came_with, prompt._came_as = frozenset(head), frozenset(config.get("modules_to_save") or ())
        return prompt.eval()
