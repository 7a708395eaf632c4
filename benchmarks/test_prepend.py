"""The stage alone: lookup, prompt and mask, forward and forward + backward, by everyone who does it."""

import pytest
import torch
from measure import DEVICE, measure

from ptuning_fast import prepend_prompt

GPU = DEVICE.type == "cuda"
V = 30522
SHAPES = {  # B, n, m, d
    "launch-bound": (1, 16, 10, 768),
    "bert-base": (32, 128, 20, 768),
    "bert-large-long": (16, 492, 20, 1024),
    ("llm" if GPU else "llm-2-rows"): (8 if GPU else 2, 2048, 100, 4096),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16} if GPU else {"fp32": torch.float32}
DIRECTIONS = ("forward", "forward+backward")
BATCHES = 8


def torch_cat(embedding, prompt):
    """The lines that a user writes."""

    def stage(input_ids, attention_mask):
        batch_size = input_ids.shape[0]
        tokens = embedding(input_ids)
        inputs_embeds = torch.cat([prompt.unsqueeze(0).expand(batch_size, -1, -1), tokens], dim=1)
        prompt_mask = torch.ones(batch_size, prompt.shape[0]).to(attention_mask.device)
        return inputs_embeds, torch.cat([prompt_mask, attention_mask], dim=1)

    return stage


def compiled(embedding, prompt):
    """The same lines under torch.compile, compiled for the shape at hand."""
    torch._dynamo.reset()
    return torch.compile(torch_cat(embedding, prompt))


def peft(embedding, prompt):
    """PEFT's own prompt tuning, around a model that is an embedding and returns what it is called with."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'ptuning-fast[bench]'")
    from transformers import PreTrainedConfig, PreTrainedModel

    class Returned(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.embedding = embedding

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, inputs_embeds=None, attention_mask=None, **kwargs):
            return inputs_embeds, attention_mask

    m, d = prompt.shape
    model_config = PreTrainedConfig(hidden_size=d, vocab_size=V, num_hidden_layers=1, num_attention_heads=1)
    settings = peft.PromptTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=m,
        token_dim=d,
        num_layers=1,
        num_attention_heads=1,
    )
    model = peft.get_peft_model(Returned(model_config), settings).to(DEVICE)
    model.prompt_encoder["default"].embedding.weight = prompt
    return lambda input_ids, attention_mask: model(input_ids=input_ids, attention_mask=attention_mask)


def liger(embedding, prompt):
    """Liger-Kernel's embedding, with torch.cat."""
    reason = "Liger-Kernel is not installed: pip install 'ptuning-fast[bench]'"
    module = pytest.importorskip("liger_kernel.transformers.experimental.embedding", reason=reason)
    if not GPU:
        pytest.skip("Liger-Kernel's embedding needs a GPU")
    rows = module.LigerEmbedding(1, embedding.weight.shape[1]).to(DEVICE)
    rows.weight = embedding.weight
    return torch_cat(rows, prompt)


def fast(embedding, prompt):
    def stage(input_ids, attention_mask):
        out = prepend_prompt(input_ids, attention_mask, weight=embedding.weight, prompt=prompt)
        return out["inputs_embeds"], out["attention_mask"]

    return stage


IMPLEMENTATIONS = {
    "torch.cat": torch_cat,
    "torch.compile": compiled,
    "PEFT": peft,
    "Liger": liger,
    "ptuning-fast": fast,
}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def stage(shape, dtype):
    """The frozen table, the prompt, and random batches with ragged masks."""
    B, n, m, d = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, d, generator=generator).to(DEVICE, DTYPES[dtype])
    embedding = torch.nn.Embedding.from_pretrained(weight, freeze=True)
    prompt = torch.nn.Parameter(torch.randn(m, d, generator=generator).to(DEVICE, DTYPES[dtype]))
    batches = []
    for _ in range(BATCHES):
        ids = torch.randint(V, (B, n), generator=generator)
        lengths = torch.randint(1, n + 1, (B, 1), generator=generator)
        batches.append((ids.to(DEVICE), (torch.arange(n) < lengths).long().to(DEVICE)))
    upstream = torch.randn(B, m + n, d, generator=generator).to(DEVICE, DTYPES[dtype])
    return embedding, prompt, batches, upstream


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_prepend(benchmark, request, stage, shape, dtype, direction, name):
    embedding, prompt, batches, upstream = stage
    B, n, m, d = SHAPES[shape]

    def caller(implementation, shift):
        """A function of the round's number; two with another `shift` never get the same batch in the same round."""

        def forward(number):
            with torch.no_grad():
                return implementation(*batches[(number + shift) % BATCHES])

        def forward_backward(number):
            inputs_embeds, _ = implementation(*batches[(number + shift) % BATCHES])
            return torch.autograd.grad(inputs_embeds, prompt, upstream)

        return forward if direction == "forward" else forward_backward

    implementation = IMPLEMENTATIONS[name](embedding, prompt)
    match = check(implementation, torch_cat(embedding, prompt), batches, prompt, upstream)

    size = prompt.element_size()
    moved = 2 * B * (m + n) * d * size + 2 * batches[0][0].nbytes  # rows and masks, read and written
    if direction == "forward+backward":
        moved += (B + 1) * m * d * size  # the prompt rows' gradient, read, and its sum
    benchmark.group = f"{shape} {SHAPES[shape]} {dtype} {direction}"
    benchmark.extra_info |= {
        "benchmark": "stage",
        "implementation": name,
        "shape": shape,
        "sizes": {"B": B, "n": n, "m": m, "d": d},
        "dtype": dtype,
        "direction": direction,
        "match": match,
    }
    ours = caller(fast(embedding, prompt), BATCHES // 2)
    measure(benchmark, request.config, caller(implementation, 0), ours, copied=moved // 2)


def check(implementation, reference, batches, prompt, upstream):
    """How the result compares with that of `reference`; AssertionError where it is another one."""
    gradients = []
    for batch in batches[:2]:
        inputs_embeds, mask = implementation(*batch)
        expected_embeds, expected_mask = reference(*batch)
        assert torch.equal(inputs_embeds, expected_embeds)
        assert torch.equal(mask.to(expected_mask.dtype), expected_mask)
        for embeds in (inputs_embeds, expected_embeds):
            gradients.append(torch.autograd.grad(embeds, prompt, upstream)[0].double())
    # Sums over the batch against the same in fp64: B roundings of the dtype at most, each of half a unit.
    truth = upstream[:, : len(prompt)].double().sum(0)
    unit = torch.finfo(upstream.dtype).eps * upstream[:, : len(prompt)].double().abs().sum(0)
    for gradient in gradients:
        assert ((gradient - truth).abs() <= len(upstream) * unit).all()
    errors = [(gradient - truth).abs().max().item() for gradient in gradients[:2]]
    return f"equal, gradient off by {errors[0]:.1g} (torch.cat's by {errors[1]:.1g})"
