"""The chunked loss: equal to the whole one, exact where it must be, and never holding the logits of all rows."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from peft_pretraining.batch import IGNORED
from peft_pretraining.model import loss as loss_module
from peft_pretraining.model.build import build_model
from peft_pretraining.model.loss import head_loss_sum, rows_per_chunk, token_loss_sum
from qgalore import LowRankOptimizer
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage import chunks
from qgalore.storage.quantized_weight import QuantizedWeight

ROWS, HIDDEN, VOCAB = 50, 12, 37


def operands(dtype=torch.float64, rows=ROWS, hidden=HIDDEN, vocab=VOCAB):
    """Hidden states and head that want gradients, and targets of which every seventh is ignored."""
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=draw).to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(vocab, hidden, generator=draw)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=draw)
    targets[::7] = IGNORED
    return h, weight, targets


def whole_loss(h, weight, targets):
    """The oracle, in float64."""
    return F.cross_entropy(h.double() @ weight.double().T, targets, ignore_index=IGNORED, reduction="sum")


def relative_error(value, oracle):
    return ((value.double() - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize("chunk_rows", [1, 16, 49, 50, 1000])
def test_equals_the_whole_loss(chunk_rows):
    """16 and 49 do not divide the 50 rows. 0.37: the factor that arrives in backward."""
    h, weight, targets = operands()
    expected = whole_loss(h, weight, targets)
    d_h, d_weight = torch.autograd.grad(0.37 * expected, (h, weight))
    loss = head_loss_sum(h, weight, targets, chunk_rows=chunk_rows)
    (0.37 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(h.grad, d_h, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weight.grad, d_weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("elements", [1, 64 * ROWS, 10**6])
def test_by_words_it_is_the_same(elements, monkeypatch):
    """Three chunks of 64 words, of which the last is short, or all at once."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", elements)
    h, weight, targets = operands(vocab=150)
    expected = whole_loss(h, weight, targets)
    d_h, d_weight = torch.autograd.grad(0.37 * expected, (h, weight))
    loss = head_loss_sum(h, weight, targets, by_words=True)
    (0.37 * loss).backward()
    for ours, theirs in ((loss, expected), (h.grad, d_h), (weight.grad, d_weight)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("elements", [64 * ROWS, 10**6])
def test_a_quantized_head_is_decoded_by_words(elements, monkeypatch):
    """The same loss and gradients as of its values, which never exist whole."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", elements)
    h, weight, targets = operands(torch.float32, vocab=150)
    quantized = QuantizedWeight.from_float(weight.detach()).requires_grad_()
    values = quantized.dequantize().detach().requires_grad_()
    expected = torch.autograd.grad(0.37 * head_loss_sum(h, values, targets, by_words=True), (h, values))
    monkeypatch.setattr(QuantizedWeight, "_decode", None)
    loss = head_loss_sum(h, quantized, targets, by_words=True)
    found = torch.autograd.grad(0.37 * loss, (h, quantized))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("by_words", [False, True])
def test_bfloat16_by_words_is_no_worse(by_words):
    h, weight, targets = operands(torch.bfloat16, rows=200, hidden=64, vocab=700)
    expected = whole_loss(h, weight, targets)
    d_h, d_weight = torch.autograd.grad(0.37 * expected, (h, weight))
    loss = head_loss_sum(h, weight, targets, by_words=by_words)
    (0.37 * loss).backward()
    assert loss.dtype == torch.float32 and relative_error(loss, expected) < 1e-3
    assert h.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert relative_error(h.grad, d_h) < 4e-3 and relative_error(weight.grad, d_weight) < 4e-3


def test_by_words_extremes_stay_finite_and_bad_numbers_are_passed_on():
    h, weight, targets = operands(torch.float32)
    with torch.no_grad():
        weight[3] = 1e4
    head_loss_sum(h, weight, targets, by_words=True).backward()
    assert h.grad.isfinite().all() and weight.grad.isfinite().all()
    h, weight, targets = operands(torch.float32)
    with torch.no_grad():
        weight[3] = torch.inf
    head_loss_sum(h, weight, targets, by_words=True).backward()
    assert h.grad.isnan().all() and weight.grad.isnan().all()
    h, weight, targets = operands(torch.float32)
    loss = head_loss_sum(h, weight, torch.full_like(targets, IGNORED), by_words=True)
    loss.backward()
    assert loss == 0 and not h.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("rows, vocab, chosen", [(512, 2**16, True), (2**15, 2**15, False), (64, 2**12, False)])
def test_a_gpu_takes_words_where_they_are_many(rows, vocab, chosen):
    """Planned on the meta device: dW exists once, in the model's dtype, where the loss is made by words."""
    h = torch.empty(rows, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(vocab, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    names = {type(head_loss_sum(h, weight, targets).grad_fn).__name__}
    with chunks.meta_stands_for("cpu"):
        names.add("CPU " + type(head_loss_sum(h, weight, targets).grad_fn).__name__)
    assert names == {"HeadLossByWordsBackward" if chosen else "_HeadLossBackward", "CPU _HeadLossBackward"}


def test_without_gradients_the_same_loss():
    h, weight, targets = operands()
    with torch.no_grad():
        loss = head_loss_sum(h, weight, targets, chunk_rows=16)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole_loss(h, weight, targets).detach(), rtol=1e-10, atol=1e-10)


def test_all_ignored_is_zero_with_zero_gradients():
    h, weight, targets = operands()
    loss = head_loss_sum(h, weight, torch.full_like(targets, IGNORED), chunk_rows=16)
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any() and not weight.grad.any()


def test_logits_far_apart_stay_finite():
    h, weight, targets = operands(torch.float32)
    loss = head_loss_sum(1e4 * h, weight, targets, chunk_rows=16)
    loss.backward()
    assert loss.isfinite() and h.grad.isfinite().all() and weight.grad.isfinite().all()


def test_bfloat16_is_as_good_as_its_last_bits():
    """torch's own chunked loss returns bfloat16: 3% off at 2048 rows. dW in 64 chunks shows a bfloat16 accumulator."""
    h, weight, targets = operands(torch.bfloat16, rows=2048, hidden=32, vocab=100)
    expected = whole_loss(h, weight, targets)
    d_h, d_weight = torch.autograd.grad(expected, (h, weight))
    loss = head_loss_sum(h, weight, targets, chunk_rows=32)
    loss.backward()
    assert loss.dtype == torch.float32 and h.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert relative_error(loss, expected) < 2e-4
    assert relative_error(h.grad, d_h) < 4e-3
    assert relative_error(weight.grad, d_weight) < 5e-3


def test_the_gradient_arrives_by_ordinary_accumulation():
    """Per-layer updates live in post-accumulate hooks; micro-batches add up in .grad."""
    h, weight, targets = operands()
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for _ in range(2):
        head_loss_sum(h, weight, targets, chunk_rows=16).backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], 2 * seen[0])


def test_a_second_backward_is_refused():
    h, weight, targets = operands()
    loss = head_loss_sum(h, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation put out, inside autograd functions and backward too."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def tiny_model(**changes):
    sizes = dict(vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return build_model(LlamaConfig(**(sizes | changes)), device="cpu", dtype=torch.float32, seed=0)


def token_batch(model, rows=4, length=64):
    tokens = torch.randint(0, model.config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:].clone()


def test_logits_never_exist_whole(monkeypatch):
    """Chunks of 64 rows: no output of any operation reaches rows x vocab elements, in forward or backward."""
    monkeypatch.setattr("peft_pretraining.model.loss.CHUNK_ELEMENTS", 64 * 512)
    model = tiny_model()
    input_ids, targets = token_batch(model)
    with LargestTensor() as chunked:
        token_loss_sum(model, input_ids, targets).backward()
    with LargestTensor() as whole:
        logits = model(input_ids).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert whole.elements == 4 * 64 * 512
    assert chunked.elements == 64 * 512


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_gets_the_gradient_of_the_ordinary_road(tied):
    model = tiny_model(tie_word_embeddings=tied)
    input_ids, targets = token_batch(model)
    targets[:, -3:] = IGNORED
    expected = whole_loss(
        model.model(input_ids).last_hidden_state.flatten(0, 1), model.lm_head.weight, targets.flatten()
    )
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    token_loss_sum(model, input_ids, targets).backward()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert relative_error(parameter.grad, gradient.double()) < 1e-5, name


def test_chunks_suit_the_vocabulary():
    assert rows_per_chunk(32_000) == 512
    assert rows_per_chunk(4_096) == 4_096
    assert rows_per_chunk(1_000_000) == 64


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_head_has_no_gradient_and_none_is_computed(frozen):
    """In bfloat16, a float32 tensor of the head's shape would be it."""
    h, weight, targets = operands(torch.bfloat16)

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.update({(tuple(result.shape), result.dtype)} if isinstance(result, torch.Tensor) else set())
            return result

    made: set = set()
    with Made():
        head_loss_sum(h, weight.detach() if frozen else weight, targets, chunk_rows=16).backward()
    (d_h,) = torch.autograd.grad(whole_loss(h, weight, targets), h)
    assert relative_error(h.grad, d_h.double()) < 0.01
    assert (((VOCAB, HIDDEN), torch.float32) in made) == (not frozen)


@pytest.mark.parametrize("rows", [1, 5, 333])
def test_a_gradient_that_is_used_up_stays_in_the_memory_of_its_sum(rows, monkeypatch):
    """The same gradient, in chunks of any number of rows. One that is summed over micro-batches has its own size."""
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", rows * 16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator).bfloat16()
    targets = torch.randint(0, 333, (40,), generator=generator)
    start = torch.randn(333, 16, generator=generator).bfloat16()
    seen = []
    for accumulation in (None, 1, 2):  # None: no updates inside backward
        weight = torch.nn.Parameter(start.clone())
        weight.register_post_accumulate_grad_hook(lambda p: seen.append((p.grad.clone(), p.grad.untyped_storage())))
        if accumulation is not None:
            PerLayerUpdates(LowRankOptimizer([weight], lr=0.0), accumulation=accumulation)
        (head_loss_sum(hidden, weight, targets, chunk_rows=16) / 40).backward()
    gradients, storages = zip(*seen, strict=True)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert [storage.nbytes() // start.numel() for storage in storages] == [2, 4, 2]
