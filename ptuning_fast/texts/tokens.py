"""The tokens of a text that is to be continued, of what is to stand behind it, and the text of what does."""

from typing import Any

__all__ = ["before", "behind", "continued", "ends"]


def before(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each text that is to be continued: without the end that some tokenizers add."""
    behind = _added_behind(tokenizer)
    return [list(ids[: len(ids) - behind]) for ids in tokenizer(prompts, verbose=False)["input_ids"]]


def _added_behind(tokenizer: Any) -> int:
    """How many tokens, asked of a text that has a token, and no special one: a prompt may have none."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for text in map(tokenizer.decode, range(len(tokenizer))):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids and special.isdisjoint(ids):
            whole = tokenizer(text)["input_ids"]
            return next((end for end in range(len(whole)) if whole[: len(whole) - end][-len(ids) :] == ids), 0)
    return 0


def behind(prompt: str, completion: str, tokenizer: Any) -> list[int]:
    """The tokens of a completion as they stand behind its prompt; where a token is of both, behind another text.

    By itself, some tokenizers would put a space before it (Llama 2's).
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    for before in (prompt, "\n", ".", "a"):
        first = ids(before) if before else []
        both = ids(before + completion)
        # An unknown token may be of both: it is the same one, whatever it stands for.
        parted = first[-1] != tokenizer.unk_token_id if first else not before
        if parted and both[: len(first)] == first:
            return both[len(first) :]
    return ids(completion)


def continued(before: list[int], new_tokens: list[int], tokenizer: Any) -> str:
    """The text of new tokens, as it stands behind that of those before: decoded alone, it may lose a space."""
    first, whole = (str(tokenizer.decode(ids)) for ids in (before, [*before, *new_tokens]))
    return whole.removeprefix(first) if whole.startswith(first) else str(tokenizer.decode(new_tokens))


def ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that a continuation ends with: the first is the one that training appends.

    What a model names may be but what its class has by default, which is an ordinary token here.
    """
    own = model.generation_config.eos_token_id
    known = [token for token in (own if isinstance(own, list) else [own]) if token in tokenizer.added_tokens_decoder]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *known]) if token is not None]
