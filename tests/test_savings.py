"""Mode "packed", pruning and half precision: alone and together the same logits and gradients."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoTokenizer

from ptuning_fast import FastPTuning, functional, packing, pooled_attention, prompt_rows, varlen
from ptuning_fast.additive_mask import takes_additive_mask
from ptuning_fast.docstrings import stdlib_docstrings
from ptuning_fast.pruning import prunable
from ptuning_fast.reference import ReferencePTuning

PACKABLE = ["BERT", "RoBERTa", "XLM-R", "DistilBERT", "ELECTRA", "ALBERT", "ModernBERT", "GPT-2", "OPT", "Llama"]
PACKABLE += ["Qwen2", "Mistral", "Phi", "Gemma", "Gemma 2", "Gemma 3"]
DECODERS = PACKABLE[PACKABLE.index("GPT-2") :]
FULL = ["BERT", "RoBERTa", "XLM-R", "DistilBERT", "ELECTRA", "ALBERT"]
PRUNABLE = ["BERT", "RoBERTa", "XLM-R", "DistilBERT", "ELECTRA", "DeBERTa-v2"]


def base(name):
    model = zoo.build(name)
    return model if model.base_model is model else model.base_model


def build(name, **options):
    torch.manual_seed(3)
    model = base(name)
    if "pooling" not in options:
        options["pooling"] = "last" if name in DECODERS else "first"
    fast = FastPTuning(
        model, zoo.M, 3, init=torch.randn(zoo.M, model.get_input_embeddings().weight.shape[1]), **options
    )
    return fast.train()


def logits_and_gradients(fast, ids, mask):
    logits = fast(ids, mask)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    return logits, *torch.autograd.grad((logits * weight).sum(), [fast.prompt_embeddings, fast.classifier.weight])


def assert_same(actual, expected):
    for one, other in zip(actual, expected):
        assert (one - other).abs().max() <= zoo.TOLERANCE * max(1, other.abs().max())


@pytest.fixture(autouse=True)
def torch_path(monkeypatch):
    """The op itself is tested elsewhere; without a GPU its kernels would be interpreted, at length."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(functional, "kernels", None)


@pytest.fixture(autouse=True)
def no_dropout(monkeypatch):
    """In train mode, so that what training does is what is compared; without its random numbers."""
    build_with_dropout = zoo.build

    def without(name, class_name=None, **settings):
        model = build_with_dropout(name, class_name, **settings)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for key in ("attention_dropout", "dropout", "dropout_prob", "activation_dropout"):
                if isinstance(getattr(module, key, None), float):
                    setattr(module, key, 0.0)
        return model

    monkeypatch.setattr(zoo, "build", without)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["first", "cls", "mean", "last"])
@pytest.mark.parametrize("name", PACKABLE)
def test_packed(name, pooling, side):
    """Against each text alone, in mode "prepend", where there is no padding to be told apart."""
    if name in DECODERS and pooling in ("first", "cls"):
        with pytest.raises(ValueError, match="causal"):
            build(name, pooling=pooling)
        return
    packed, plain = build(name, mode="packed", pooling=pooling), build(name, pooling=pooling)
    ids, mask = zoo.padded(zoo.texts(), side)
    actual = logits_and_gradients(packed, ids, mask)
    logits = torch.cat([plain(text[None]) for text in zoo.texts()])
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    gradients = torch.autograd.grad((logits * weight).sum(), [plain.prompt_embeddings, plain.classifier.weight])
    assert_same(actual, (logits, *gradients))
    assert packed.prune == (name in PRUNABLE and pooling != "mean")


def test_packed_without_a_mask_and_with_types():
    packed, plain = build("BERT", mode="packed"), build("BERT")
    ids = torch.randint(3, zoo.V, (3, 7))
    assert_same([packed(ids)], [plain(ids)])
    types, mask = ids % 2, torch.ones_like(ids)
    assert_same([packed(ids, mask, types)], [plain(ids, mask, types)])
    assert (packed(ids, mask, types) - packed(ids, mask)).abs().max() > 100 * zoo.TOLERANCE
    assert_same([packed(ids[:1], mask[:1])], [plain(ids[:1], mask[:1])])


@pytest.mark.parametrize("pooling", ["first", "cls", "last", "mean"])
def test_texts_without_tokens(pooling):
    packed = build("BERT", mode="packed", pooling=pooling)
    ids, mask = zoo.padded(zoo.texts(), "right")
    expected = packed(ids, mask)
    mask[2] = 0
    logits = packed(ids, mask)
    assert logits.isfinite().all()
    assert_same([logits[[0, 1, 3]]], [expected[[0, 1, 3]]])


@pytest.mark.parametrize("pooling", ["first", "cls", "last"])
@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned(name, pooling):
    ids, mask = zoo.padded(zoo.texts(), "right")
    pruned, plain = build(name, prune=True, pooling=pooling), build(name, pooling=pooling)
    assert pruned.prune and not plain.prune
    assert_same(logits_and_gradients(pruned, ids, mask), logits_and_gradients(plain, ids, mask))
    rows = []
    last = pruned.bert.register_forward_hook(lambda module, args, out: rows.append(out.last_hidden_state.shape[1]))
    pruned(ids, mask)
    assert rows == [1]
    last.remove()


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FULL)
def test_additive_mask(name, side, prune):
    ids, mask = zoo.padded(zoo.texts(), side)
    added, plain = build(name, additive_mask=True, prune=prune), build(name)
    assert added.additive_mask and not plain.additive_mask
    assert_same(logits_and_gradients(added, ids, mask), logits_and_gradients(plain, ids, mask))
    assert_same(added(ids[1:2, :3]), plain(ids[1:2, :3]))
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = added(ids, mask), plain(ids, mask)
    assert (logits - expected).abs().max() <= 0.1 * expected.abs().max()  # three layers of bf16
    eager = build(name, additive_mask=True)
    eager.bert.set_attn_implementation("eager")
    assert_same(logits_and_gradients(eager, ids, mask), logits_and_gradients(plain, ids, mask))


class Asked(TorchDispatchMode):
    """The operations that ask a tensor for its value, for which a host waits, and those that make or turn masks."""

    def __init__(self):
        super().__init__()
        self.syncs, self.masks = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function)
        if name in ("aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"):
            self.syncs.append(name)
        found = [one for one in pytree.tree_leaves((args, kwargs, out)) if torch.is_tensor(one)]
        if any(one.dtype == torch.bool for one in found):
            self.masks.append(name)
        return out


@pytest.mark.parametrize("name", FULL)
def test_nothing_is_asked_of_the_mask(name):
    """In a step of the encoder, forward and backward: no value is waited for, no mask is made. Else both happen."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    counts = []
    for additive_mask in (True, False):
        fast = build(name, additive_mask=additive_mask)
        inputs, *_ = inputs_of(fast, ids, mask)
        with Asked() as asked:
            out = fast.bert(**inputs).last_hidden_state
            torch.autograd.grad(out.sum(), inputs["inputs_embeds"])
        counts.append((len(asked.syncs), len(asked.masks)))
    assert counts[0] == (0, 0)
    assert counts[1][0] >= 1
    assert counts[1][1] > 3


def test_additive_masks_are_for_architectures_that_are_known():
    """Others would take such a mask and be silently wrong, or are given it by no one."""
    for name in set(zoo.ZOO) - set(FULL) - {"T5", "BART"}:
        assert not takes_additive_mask(base(name))
    assert not build("BERT", mode="packed", additive_mask=True).additive_mask
    model = base("BERT")
    model.config._attn_implementation = "flash_attention_2"
    assert not takes_additive_mask(model)
    changed = base("BERT")

    def only_columns(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask if (mask := kwargs["attention_mask"]).dim() == 2 else None}

    changed.register_forward_pre_hook(only_columns, with_kwargs=True)
    assert not takes_additive_mask(changed)


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    """Forward, loss, backward and optimizer, captured once and replayed on other batches, as eager steps have it."""
    runs = []
    for captured in (True, False):
        fast = build("BERT", additive_mask=True, prune=True).cuda()
        trained = [fast.prompt_embeddings, *fast.classifier.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, capturable=True)
        ids, mask = (one.cuda() for one in zoo.padded(zoo.texts(), "right"))
        labels = torch.tensor([0, 1, 2, 1], device="cuda")

        def step(fast=fast, optimizer=optimizer, ids=ids, mask=mask, labels=labels):
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(fast(ids, mask), labels)
            loss.backward()
            optimizer.step()
            return loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
        losses = []
        for shift in range(4):
            ids.copy_((ids + shift) % zoo.V)
            mask.copy_(mask.roll(1, 0))
            if captured:
                graph.replay()
            else:
                loss = step()
            losses.append(loss.item())
        runs.append(losses)
    assert len(set(runs[0])) == 4
    assert max(abs(one - other) for one, other in zip(*runs)) < 1e-4


@pytest.mark.parametrize("mode", ["prepend", "packed"])
@pytest.mark.parametrize("name", ["BERT", "ELECTRA"])
def test_rows_of_the_prompt_alone_are_differentiated(monkeypatch, mode, name):
    """In the first layer, where nothing but the prompt is trained in front of it; else all rows are."""
    if torch.cuda.is_available():
        pytest.skip("for CPUs")
    ids, mask = zoo.padded(zoo.texts(), "right")
    sizes = []
    backward = prompt_rows._Projection.backward

    def counted(ctx, grad):
        sizes.append(len(ctx.saved_tensors[0]))
        return backward(ctx, grad)

    monkeypatch.setattr(prompt_rows._Projection, "backward", staticmethod(counted))
    full, fast = build(name), build(name, mode=mode, prune=True)
    assert_same(logits_and_gradients(fast, ids, mask), logits_and_gradients(full, ids, mask))
    assert sizes == [len(ids) * zoo.M] * 3
    assert all("forward" not in vars(module) for module in fast.bert.modules())
    gradients = []
    for module in (fast, full):
        norm = module.bert.embeddings.LayerNorm
        norm.weight.requires_grad_()
        gradients += torch.autograd.grad(module(ids, mask).logsumexp(1).sum(), norm.weight)
    assert_same(gradients[:1], gradients[1:])
    fast.bert.embeddings.LayerNorm.weight.requires_grad_(False)
    hook = fast.bert.encoder.layer[0].register_forward_pre_hook(lambda *args: None)
    logits_and_gradients(fast, ids, mask)
    hook.remove()
    assert len(sizes) == 3
    logits_and_gradients(fast, ids, mask)
    assert len(sizes) == 6


def test_what_is_not_recognised_runs_in_full():
    for name in set(zoo.ZOO) - set(PRUNABLE) - {"T5", "BART"}:
        assert not prunable(base(name))
    assert not build("ALBERT", prune=True).prune
    assert not build("BERT", prune=True, pooling="mean").prune


def test_a_changed_architecture_is_not_pruned():
    """The trial finds out what the name does not say: here a layer that mixes the rows behind the attention."""
    model = base("BERT")
    assert prunable(model)
    model.encoder.layer[-1].output.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    assert not prunable(model)


@pytest.mark.parametrize("mode", ["prepend", "packed"])
@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "GPT-2", "Llama"])
def test_half_precision_is_autocasts(name, mode):
    """Linear layers stored in bf16 give the bits that autocast's casts of fp32 weights give."""
    options = {"mode": mode, "prune": False}
    half, whole = build(name, precision="bf16", **options), build(name, **options)
    linears = [module for module in half.bert.modules() if isinstance(module, torch.nn.Linear)]
    assert all(module.weight.dtype == torch.bfloat16 for module in linears)
    assert half.prompt_embeddings.dtype == half.classifier.weight.dtype == torch.float32
    ids, mask = zoo.padded(zoo.texts(sorted(zoo.TEXTS)), "right")  # in the order in which they are packed
    with torch.autocast("cpu", torch.bfloat16):
        hidden = whole._encode(*inputs_of(whole, ids, mask))
    assert torch.equal(half._encode(*inputs_of(half, ids, mask)), hidden)
    gradient = logits_and_gradients(half, ids, mask)[1]
    pooled = whole._pool(hidden, *inputs_of(whole, ids, mask))
    logits = F.linear(pooled.float(), whole.classifier.weight, whole.classifier.bias)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (expected,) = torch.autograd.grad((logits * weight).sum(), whole.prompt_embeddings)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "options", [{"mode": "packed"}, {"prune": True}, {"prune": True, "additive_mask": True}], ids=str
)
@pytest.mark.parametrize("name", FULL[:5])
def test_half_precision_with_the_other_savings(name, options):
    """All together are as far from fp32 as autocast by itself is, times three."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    truth = logits_and_gradients(build(name), ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits_and_gradients(build(name), ids, mask)
    together = build(name, precision="bf16", **options)
    assert together.prune
    for one, other, exact in zip(logits_and_gradients(together, ids, mask), plain, truth):
        assert (one - exact).abs().max() <= 3 * (other - exact).abs().max()


def inputs_of(fast, ids, mask):
    """What `_encode` and `_pool` are given in forward."""
    seen = []
    encode = fast._encode
    fast._encode = lambda *args: seen.append(args) or encode(*args)
    try:
        fast(ids, mask)
    finally:
        del fast._encode
    return seen[0]


def test_loss_curves(minilm):
    """Real weights, real text, the reference padded: the same losses, step by step, with all exact savings at once."""
    encoder = AutoModel.from_pretrained(minilm, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts, labels = stdlib_docstrings()
    names = sorted(set(labels))
    losses = []
    for mode in ("reference", "packed"):
        torch.manual_seed(0)
        if mode == "reference":
            module = ReferencePTuning(encoder, 8, len(names)).train()
        else:
            module = FastPTuning(encoder, 8, len(names), mode="packed").train()
            assert module.prune
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
        losses.append([])
        for step in range(6):
            rows = range(step * 97, step * 97 + 64, 8)
            batch = tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            logits = module(batch["input_ids"], batch["attention_mask"])
            loss = F.cross_entropy(logits, torch.tensor([names.index(labels[row]) for row in rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][0] != losses[0][-1]
    # Roundings of another order, through six steps of AdamW, which divides by the size of a gradient.
    assert max(abs(one - other) for one, other in zip(*losses)) < 1e-4


def test_dropout(monkeypatch):
    """The attention's own dropout is handed on in training, and is off in eval mode."""
    monkeypatch.undo()  # with dropout, as built
    seen = []

    def recorded(*args, dropout, **kwargs):
        seen.append(dropout)
        return by_length(*args, dropout=dropout, **kwargs)

    by_length = varlen.by_length
    monkeypatch.setattr(varlen, "by_length", recorded)
    fast = FastPTuning(zoo.build("BERT", attention_probs_dropout_prob=0.25), 3, 2, mode="packed", prune=False).train()
    ids, mask = zoo.padded(zoo.texts(), "right")
    fast(ids, mask)
    assert seen == [0.25] * 3
    seen.clear()
    fast.eval()(ids, mask)
    assert seen == [0.0] * 3


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_dropout_of_the_pooled_row(monkeypatch, mode):
    """Whatever dropout makes of the weights, values are summed up with that, their bias included."""
    functions = SimpleNamespace(linear=F.linear, dropout=lambda weights, p: weights * (1 + p))
    monkeypatch.setattr(pooled_attention, "F", functions)
    model = zoo.build("BERT", attention_probs_dropout_prob=0.25).train()
    for dropout in (one for one in model.modules() if isinstance(one, torch.nn.Dropout)):
        dropout.p = 0.0
    last = model.encoder.layer[-1].attention.self
    last.dropout.p = 0.25
    torch.nn.init.normal_(last.value.bias)
    doubled = copy.deepcopy(model)
    doubled.encoder.layer[-1].attention.self.dropout.p = 0.0
    for one in (
        doubled.encoder.layer[-1].attention.self.value.weight,
        doubled.encoder.layer[-1].attention.self.value.bias,
    ):
        one.mul_(1.25)
    prompt = torch.randn(zoo.M, zoo.D)
    fast, expected = (FastPTuning(one, zoo.M, 3, init=prompt, mode=mode, prune=True) for one in (model, doubled))
    expected.load_state_dict(
        {key: value for key, value in fast.state_dict().items() if "bert." not in key}, strict=False
    )
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert_same([fast(ids, mask)], [expected(ids, mask)])


@pytest.mark.parametrize("how", ["hook", "lora", "forward"])
def test_attention_that_is_more_than_its_weights(how):
    """Then its own forward is called, keys and values and all."""
    plain = build("BERT", mode="packed", prune=False)
    changed = build("BERT", mode="packed")
    value = changed.bert.encoder.layer[-1].attention.self.value, plain.bert.encoder.layer[-1].attention.self.value
    for one in value:
        if how == "hook":
            one.register_forward_hook(lambda module, args, out: out * 2)
        elif how == "forward":
            one.forward = lambda x, one=one: F.linear(x, one.weight * 2, one.bias)
        else:
            one.__class__ = type(
                "LoraLinear", (torch.nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight) * 2}
            )
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert changed.prune
    assert_same([changed(ids, mask)], [plain(ids, mask)])


def test_the_attention_is_put_back():
    fast = build("BERT", mode="packed")
    before = fast.bert.config._attn_implementation
    ids, mask = zoo.padded(zoo.texts(), "right")
    fast(ids, mask)
    assert fast.bert.config._attn_implementation == before
    wrong = ids.clone()
    wrong[1, 2] = zoo.V
    with pytest.raises(IndexError, match=r"input_ids\[1, 2\] is 99"):
        fast(wrong, mask)
    assert fast.bert.config._attn_implementation == before
    assert not fast.bert._forward_pre_hooks
    # The encoder can be used by others in between.
    assert_same([build("BERT")(ids, mask)], [fast(ids, mask)])


def test_layers_that_compute_attention_by_themselves():
    fast = build("BERT", mode="packed", prune=False)
    layer = fast.bert.encoder.layer[1].attention
    layer.forward = lambda hidden, *args, **kwargs: (hidden, None)
    ids, mask = zoo.padded(zoo.texts(), "right")
    with pytest.raises(RuntimeError, match="2 of the 3 layers"):
        fast(ids, mask)


def test_refusals():
    for name in ("DeBERTa-v2", "MPNet", "Bloom"):
        with pytest.raises(TypeError, match=r"computes its attention by itself.*mode='prepend'"):
            build(name, mode="packed", pooling="mean")
    with pytest.raises(TypeError, match="mode='prepend'"):
        FastPTuning(zoo.build("T5", "T5EncoderModel"), 3, mode="packed", pooling="mean")
    with pytest.raises(ValueError, match="one row at least"):
        FastPTuning(base("BERT"), 0, mode="packed")
    with pytest.raises(ValueError, match="precision must be None, 'bf16' or 'fp16'; it is 'int8'"):
        FastPTuning(base("BERT"), 3, precision="int8")
    for options in ({"mode": "packed"}, {"prune": True}):
        fast = build("BERT", **options)
        fast.gradient_checkpointing_enable()
        ids, mask = zoo.padded(zoo.texts(), "right")
        with pytest.raises(ValueError, match="gradient checkpointing"):
            fast(ids, mask)
    fast = build("BERT", mode="packed").train()
    layers = fast.bert.encoder.layer
    layers[0] = checkpoint_wrapper(layers[0])
    with pytest.raises(ValueError, match="gradient checkpointing"):
        fast(ids, mask)


def test_files_and_copies(tmp_path):
    fast = build("BERT", mode="packed").eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    fast.save_pretrained(tmp_path)
    loaded = FastPTuning.from_pretrained(tmp_path, base("BERT"))
    assert (loaded.mode, loaded.prune) == ("packed", True)
    assert torch.equal(loaded(ids, mask), fast(ids, mask))
    assert torch.equal(copy.deepcopy(fast)(ids, mask), fast(ids, mask))
    assert "mode='packed', prune=True, additive_mask=False, precision=None" in repr(fast)
    assert packing.NAME not in repr(fast.bert.config)


def test_attention_with_more_to_it():
    """Attention sinks and chunks: seen in the call, and in the config."""
    from transformers import GptOssConfig, GptOssModel, Llama4TextConfig, Llama4TextModel

    sizes = {"vocab_size": zoo.V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "num_local_experts": 2}
    sinks = GptOssModel(GptOssConfig(**sizes, num_experts_per_tok=1, pad_token_id=0))
    with pytest.raises(TypeError, match=r"asks for attention with s_aux.*mode='prepend'"):
        FastPTuning(sinks, 3, pooling="last", mode="packed")
    assert sinks.config._attn_implementation != packing.NAME
    chunks = Llama4TextModel(
        Llama4TextConfig(**sizes, attention_chunk_size=4, intermediate_size_mlp=32, pad_token_id=0)
    )
    with pytest.raises(TypeError, match="has layers of chunked_attention"):
        FastPTuning(chunks, 3, pooling="last", mode="packed")


def test_compiled():
    fast = build("BERT", mode="packed").eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert_same([torch.compile(fast, backend="aot_eager")(ids, mask)], [fast(ids, mask)])
