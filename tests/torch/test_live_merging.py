"""Folding a live adapter in: whole or not at all, undone to the bit; and modules that other tools replace."""

import copy

import pytest
import torch
import transformers
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, Unsupported, UsageError
from adapterkit.methods import METHODS
from adapterkit.torch import folding
from adapterkit.torch import handle as handles
from adapterkit.torch.forward_hook import ForwardHook


def lora(seed, inputs=16, outputs=8):
    g = torch.Generator().manual_seed(seed)
    return METHODS["lora"](A=torch.randn(2, inputs, generator=g), B=torch.randn(outputs, 2, generator=g))


def two_layers(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).to(dtype)


def adapter(seed=1):
    return Adapter({Target("0"): (lora(seed),), Target("1"): (lora(seed + 1, 8),)})


def bits(model):
    return {name: value.view(torch.int16).clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("trainable", [False, True])
def test_unmerging_gives_back_every_bit(trainable):
    model, x = two_layers(), torch.randn(3, 16, dtype=torch.bfloat16)
    before = bits(model)
    one = ak.torch.inject(model, adapter(1), name="one", trainable=trainable)
    attached = model(x)
    one.merge_(keep=True)
    merged = bits(model)
    two = ak.torch.inject(model, adapter(5), name="two")
    two.merge_(keep=True)
    with pytest.raises(UsageError, match="changed after the merge"):
        one.unmerge_()
    two.unmerge_()
    two.remove()
    assert same(bits(model), merged)
    one.unmerge_()
    assert same(bits(model), before)
    assert torch.equal(model(x), attached)
    assert len(list(one.parameters())) == (4 if trainable else 0)
    assert [p.requires_grad for n, p in model.named_parameters() if "adapterkit" not in n] == [not trainable] * 4
    one.remove()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UsageError, match="keep=True"):
        one.unmerge_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_unmerging_recomputes_every_bit(dtype, size):
    """The exact bits, however much of a weight its change took; and where it is small, without a copy of the weight."""
    torch.manual_seed(0)
    size = min(size, 100) if dtype is torch.float16 else size  # A merge that overflows is refused.
    model, x = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 8)).to(dtype), torch.randn(3, 256).to(dtype)
    bias = METHODS["lora"](A=torch.randn(2, 256), B=torch.randn(128, 2), bias=torch.randn(128), scaling=size)
    handle = ak.torch.inject(model, Adapter({Target("0"): (bias,), Target("1"): (lora(5, 128),)}), weight=0.7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attached = model(x)
    handle.merge_(keep="recompute")
    held = sum(0 if each.before is None else each.before.nbytes for each in handle._merged)
    held += sum(len(each.places) * 10 for each in handle._merged if each.places is not None)
    assert size > 1e-3 or held < 0.8 * sum(value.nbytes for value in before.values())
    ak.torch.inject(model, Adapter({Target("0"): (lora(3, 256, 128),)}), name="other")
    handle.unmerge_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    ak.torch.handles(model)["other"].remove()
    assert torch.equal(model(x).nan_to_num(), attached.nan_to_num())


@pytest.mark.parametrize("keep", ["copy", "recompute"])
def test_unmerging_holds_one_module_at_a_time(monkeypatch, keep):
    """Not all bits from before together: they are as large as the model."""
    model = two_layers()
    handle = ak.torch.inject(model, adapter(1), weight=1e-3)
    before, held, real = bits(model), [], folding.subtracted
    handle.merge_(keep=keep)
    monkeypatch.setattr(folding, "subtracted", lambda hooks, merged: (held.append(len(hooks)), real(hooks, merged))[1])
    handle.unmerge_()
    assert held == [1] * len(model)
    assert same(bits(model), before)


def test_a_failed_unmerge_after_the_adapter_changed_leaves_the_merged_bits(monkeypatch):
    model = two_layers()
    handle = ak.torch.inject(model, adapter(1), trainable=True)
    before, parameters = bits(model), list(handle.parameters())
    handle.merge_(keep="copy")
    merged = bits(model)
    with torch.no_grad():
        parameters[0].add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(ForwardHook, "attach", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handle.unmerge_()
    assert same(bits(model), merged)
    handle.unmerge_()
    assert same(bits(model), before)


@pytest.mark.parametrize("keep", ["copy", "recompute"])
def test_a_model_made_in_inference_mode_is_merged_and_unmerged(keep):
    """torch counts no changes of inference tensors; the checksums notice them."""
    with torch.inference_mode():
        model = two_layers()
        before = bits(model)
        handle = ak.torch.inject(model, adapter())
        handle.merge_(keep=keep)
        merged = bits(model)
        model[0].weight[0, 0] += 1
        with pytest.raises(UsageError, match="changed after"):
            handle.unmerge_()
        model[0].weight.view(torch.int16).copy_(merged["0.weight"])
        handle.unmerge_()
    assert not same(merged, before)
    assert same(bits(model), before)


def test_recomputing_after_the_adapter_changed_is_refused():
    model = two_layers()
    handle = ak.torch.inject(model, adapter(1), trainable=True, weight=1e-3)
    parameters = list(handle.parameters())
    handle.merge_(keep="recompute")
    merged = bits(model)
    with torch.no_grad():
        parameters[0].add_(1)
    with pytest.raises(UsageError, match="cannot be recomputed"):
        handle.unmerge_()
    assert same(bits(model), merged)
    with torch.no_grad():
        parameters[0].sub_(1)


def test_only_sums_are_recomputed():
    model = two_layers(torch.float32)
    handle = ak.torch.inject(model, Adapter({Target("0"): (METHODS["ia3"](l=torch.ones(8)),)}))
    for keep, match in (("recompute", 'keep="copy"'), ("bits", "copy, recompute")):
        with pytest.raises(UsageError) as caught:
            handle.merge_(keep=keep)
        assert match in str(caught.value)
    handle.merge_(keep="copy")
    handle.unmerge_()


def test_weights_changed_after_a_merge_are_not_overwritten():
    model = two_layers()
    handle = ak.torch.inject(model, adapter())
    handle.merge_(keep=True)
    with torch.no_grad():
        model[1].weight.mul_(2)
    changed = bits(model)
    with pytest.raises(UsageError, match="changed after the merge"):
        handle.unmerge_()
    assert same(bits(model), changed)


def test_a_merge_that_fails_half_way_changes_nothing(monkeypatch):
    model, x = two_layers(), torch.randn(3, 16, dtype=torch.bfloat16)
    handle = ak.torch.inject(model, adapter())
    before, y, fold, calls = bits(model), model(x), handles.fold, []

    def failing(hook, parts):
        calls.append(hook)
        fold(hook, parts)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(handles, "fold", failing)
    with pytest.raises(MemoryError):
        handle.merge_()
    assert same(bits(model), before)
    assert torch.equal(model(x), y)
    monkeypatch.undo()
    handle.merge_()
    assert not same(bits(model), before)


@pytest.mark.parametrize("keep", [False, "copy", "recompute"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_merge_that_overflows_the_dtype_changes_nothing(method, keep):
    """float16 ends at 65,504; an infinity that the base already has is no reason to refuse."""
    if (method, keep) == ("dora", "recompute"):
        keep = True
    fields = {"A": torch.full((2, 16), 50.0), "B": torch.full((8, 2), 100.0)}
    if method == "dora":
        fields["magnitude"] = torch.full((8,), 1e6)
    model = two_layers(torch.float16)
    model[0].weight.data[0] = 6e4
    before = bits(model)
    change = Adapter({Target("0"): (METHODS[method](**fields),)})
    handle = ak.torch.inject(model, change)
    with pytest.raises(NotMergeable, match="0: the merge yields a NaN or an infinity in float16"):
        handle.merge_(keep=keep)
    assert same(bits(model), before)
    handle.remove()
    model[0].weight.data[0, 0] = torch.inf
    ak.torch.inject(model, change).merge_(keep=keep)
    assert model[0].weight.isinf().any()


def test_parameters_on_one_memory_are_not_merged():
    model = two_layers(torch.float32)
    model[1].weight = nn.Parameter(model[0].weight.data[:, :8])
    with pytest.raises(NotMergeable, match="shares its memory"):
        ak.torch.inject(model, Adapter({Target("0"): (lora(1),)})).merge_()
    # Side by side in one tensor is no sharing.
    flat = torch.randn(8 * 16 + 8 * 8)
    model[0].weight, model[1].weight = nn.Parameter(flat[:128].view(8, 16)), nn.Parameter(flat[128:].view(8, 8))
    ak.torch.inject(model, Adapter({Target("0"): (lora(1),)}), name="again").merge_()


def test_a_weight_of_a_librarys_own_type_is_not_merged():
    class Packed(torch.Tensor):
        pass

    model = two_layers(torch.float32)
    handle = ak.torch.inject(model, Adapter({Target("0"): (lora(1),)}))
    model[0].weight = nn.Parameter(torch.randn(8, 16).as_subclass(Packed))
    with pytest.raises(NotMergeable, match="Packed"):
        handle.merge_()


def test_a_replaced_module_is_noticed():
    model, x = two_layers(torch.float32), torch.randn(3, 16)
    handle = ak.torch.inject(model, adapter())
    before = model(x)
    kept = model[1]
    model[1] = nn.Linear(8, 8)
    with pytest.raises(Unsupported, match="no longer in the model") as caught:
        model(x)
    assert "handle.remove()" in caught.value.cure
    with pytest.raises(Unsupported, match="no longer in the model"):
        handle.merge_()
    model[1] = nn.Sequential(kept)  # A wrapper still calls the module.
    assert torch.equal(model(x), before)
    handle.remove()
    assert not model._forward_pre_hooks


def test_dynamic_quantization_is_noticed_in_the_copy_it_makes():
    torch.backends.quantized.engine = "fbgemm"
    model, x = two_layers(torch.float32), torch.randn(3, 16)
    ak.torch.inject(model, adapter())
    quantized = copy.deepcopy(model)
    quantized[0] = nn.Linear(16, 8)
    with pytest.raises(Unsupported, match="no longer in the model"):
        quantized(x)
    model(x)


def test_fused_projections_are_noticed():
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8)
    model, x = nn.ModuleDict({"attn": attention}), torch.randn(2, 3, 16)
    model.forward = lambda x: model["attn"](x)
    ak.torch.inject(model, Adapter({Target("attn.to_q"): (lora(1, 16, 16),)}))
    model(x)
    attention.fuse_projections()
    with pytest.raises(Unsupported, match="fused projections"):
        model(x)


def test_a_real_model_merges_and_unmerges():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "tie_word_embeddings": True}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)
    before = bits(model)
    fresh = ak.torch.create(model, "dora", rank=2)
    g = torch.Generator().manual_seed(1)
    handle = ak.torch.inject(model, fresh.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=g)))
    handle.merge_(keep=True)
    assert not same(bits(model), before)
    handle.unmerge_()
    assert same(bits(model), before)
