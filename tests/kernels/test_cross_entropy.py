import pytest
import torch

from medlora.kernels import cross_entropy, reference
from medlora.kernels.cross_entropy import cross_entropy_, linear_cross_entropy


def inputs(T, D, V, dtype, device):
    """Logits of about unit size, and a third of the labels ignored."""
    hidden = torch.randn(T, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype)
    labels = torch.randint(V, (T,), device=device)
    labels[1::3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("labelled", [None, "exact", "bound"])
@pytest.mark.parametrize(("T", "D", "V"), [(1, 96, 33), (3, 96, 1000), (127, 576, 333)])
def test_loss_and_gradients(T, D, V, labelled, dtype, device, close):
    hidden, weight, labels = inputs(T, D, V, dtype, device)
    h32, w32 = (t.float().requires_grad_() for t in (hidden, weight))
    expected = reference.linear_cross_entropy(h32, w32, labels)
    (expected * 0.5).backward()

    count = int((labels != -100).sum())
    bound = {None: None, "exact": count, "bound": min(count + 2, T)}[labelled]
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=32, labelled=bound)
    (loss * 0.5).backward()
    assert loss.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert abs(loss - expected) <= tolerance * expected
    close(hidden.grad, h32.grad, roundings=3)  # logits, their gradient and the product are each rounded
    # chunks may be larger than their sum, so the weight's gradient is measured as a whole
    assert (weight.grad - w32.grad).norm() <= tolerance * w32.grad.norm()
    assert not hidden.grad[labels == -100].any()


@pytest.mark.parametrize("V", [8192, 8193, 20000])
def test_vocabulary_of_several_blocks(V, device, close):
    hidden, weight, labels = inputs(3, 16, V, torch.float32, device)
    labels[0] = V - 1
    h32 = hidden.clone().requires_grad_()
    expected = reference.linear_cross_entropy(h32, weight, labels)
    expected.backward()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    close(loss, expected)
    close(hidden.grad, h32.grad)


def test_many_rows(device, close):
    hidden, weight, labels = inputs(2049, 16, 32, torch.float32, device)
    loss = linear_cross_entropy(hidden, weight, labels)
    close(loss, reference.linear_cross_entropy(hidden, weight, labels))


def test_kernel_on_one_chunk(dtype, device, close):
    logits = torch.randn(7, 333, device=device).mul(5).to(dtype)
    labels = torch.tensor([0, 332, -100, 5, 6, -100, 7], device=device)
    twin = logits.float().clone()
    expected = reference.cross_entropy_(twin, labels)
    kept = logits.clone()
    assert torch.equal(cross_entropy_(kept, labels, grad=False), cross_entropy_(logits.clone(), labels))
    assert torch.equal(kept, logits), "the logits were overwritten without grad"
    losses = cross_entropy_(logits, labels)
    close(losses, expected)
    close(logits, twin)


def test_reference_gradient_is_autograd(close):
    logits = torch.randn(7, 333, requires_grad=True)
    labels = torch.tensor([0, 332, -100, 5, 6, -100, 7])
    reference.cross_entropy(logits, labels).sum().backward()
    overwritten = logits.detach().clone()
    reference.cross_entropy_(overwritten, labels)
    close(overwritten, logits.grad)


def test_huge_logits_stay_finite(device):
    logits = torch.full((2, 9000), -1e4, device=device)
    logits[0, 8999] = logits[1, 3] = 3e4
    losses = cross_entropy_(logits, torch.tensor([8999, 0], device=device))
    assert losses.tolist() == [0.0, 4e4]
    assert logits[0].abs().max() == 0 and logits[1, 0] == -1 and logits[1, 3] == 1


def test_nothing_labelled(device):
    hidden, weight, labels = inputs(3, 96, 33, torch.float32, device)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels.fill_(-100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_label_outside_the_vocabulary_shows(device):
    losses = cross_entropy_(torch.zeros(2, 33, device=device), torch.tensor([33, 1], device=device))
    assert losses.isnan().tolist() == [True, False]


def test_no_more_logits_than_a_chunk(device, monkeypatch):
    sizes = []
    kernel = cross_entropy.cross_entropy_
    monkeypatch.setattr(
        cross_entropy,
        "cross_entropy_",
        lambda part, *a, **k: sizes.append(len(part)) or kernel(part, *a, **k),
    )
    hidden, weight, labels = inputs(127, 96, 33, torch.float32, device)
    linear_cross_entropy(hidden, weight, labels, chunk=32)
    assert max(sizes) == 32 and sum(sizes) == int((labels != -100).sum())


def test_refuses_what_does_not_fit(device):
    hidden, weight, labels = inputs(3, 96, 33, torch.float32, device)
    for bad in (
        (hidden, weight.bfloat16(), labels),
        (hidden, weight[:, :5], labels),
        (hidden, weight, labels[:2]),
    ):
        with pytest.raises(ValueError, match="expected hidden"):
            linear_cross_entropy(*bad)
