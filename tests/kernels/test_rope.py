import pytest
import torch

from medlora.kernels import reference
from medlora.kernels.rope import rope, rope_, rope_back

SHAPES = [(1, 4, 4, 64), (3, 9, 3, 64), (127, 4, 1, 48)]  # T, H, G, d


def tables(T, d, device):
    angle = torch.arange(T).float()[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    return angle, angle.cos().repeat(1, 2).to(device), angle.sin().repeat(1, 2).to(device)


def fused(T, H, G, d, dtype, device):
    """q and k as views of one qkv buffer."""
    qkv = torch.randn(T, (H + 2 * G) * d, device=device).to(dtype)
    q, k, _ = qkv.split((H * d, G * d, G * d), dim=1)
    return qkv, q.view(T, H, d), k.view(T, G, d)


def test_reference_is_a_complex_rotation(device, close):
    angle, cos, sin = tables(127, 64, device)
    x = torch.randn(127, 3, 64, device=device)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle).to(device)[:, None]
    close(reference.rotate(x, cos, sin), torch.cat((turned.real, turned.imag), dim=-1))


@pytest.mark.parametrize(("T", "H", "G", "d"), SHAPES)
def test_copies_and_gradients(T, H, G, d, dtype, device, close):
    _, cos, sin = tables(T, d, device)
    _, q, k = fused(T, H, G, d, dtype, device)
    dq, dk = torch.randn(T, H, d, device=device).to(dtype), torch.randn(T, G, d, device=device).to(dtype)
    q, k = q.requires_grad_(), k.requires_grad_()
    for x, y, dy, dx in zip(
        (q, k),
        outputs := rope(q, k, cos, sin),
        (dq, dk),
        torch.autograd.grad(outputs, (q, k), (dq, dk)),
        strict=True,
    ):
        x32 = x.detach().float().requires_grad_()
        expected = reference.rotate(x32, cos, sin)
        expected.backward(dy.float())
        close(y, expected)
        close(dx, x32.grad)


@pytest.mark.parametrize(("T", "H", "G", "d"), SHAPES[1:])
def test_in_place_on_a_fused_buffer(T, H, G, d, dtype, device, close):
    _, cos, sin = tables(T, d, device)
    qkv, q, k = fused(T, H, G, d, dtype, device)
    before = qkv.clone()
    expected_q, expected_k = reference.rotate(q.float(), cos, sin), reference.rotate(k.float(), cos, sin)
    rope_(q, k, cos, sin)
    close(q, expected_q)
    close(k, expected_k)
    assert torch.equal(qkv[:, (H + G) * d :], before[:, (H + G) * d :]), "the values were touched"
    expected_q, expected_k = reference.rotate(q.float(), cos, -sin), reference.rotate(k.float(), cos, -sin)
    rope_(q, k, cos, sin, inverse=True)
    close(q, expected_q)
    close(k, expected_k)


@pytest.mark.parametrize(("T", "H", "G", "d"), SHAPES[:2])
def test_all_gradients_into_one_buffer(T, H, G, d, dtype, device, close):
    """Rows with something behind them, which stays; the values' gradient as it is."""
    _, cos, sin = tables(T, d, device)
    dq, dk, dv = (torch.randn(n, T, d, device=device).to(dtype).transpose(0, 1) for n in (H, G, G))
    buffer = torch.randn(T, (H + 2 * G) * d + 8, device=device).to(dtype)
    behind = buffer[:, -8:].clone()
    to_q, to_k, to_v = (part.unflatten(1, (-1, d)) for part in buffer[:, :-8].split((H * d, G * d, G * d), dim=1))
    rope_back((dq, dk, dv), (to_q, to_k, to_v), cos, sin)
    for to, grad in ((to_q, dq), (to_k, dk)):
        before = torch.zeros(grad.shape, device=device, requires_grad=True)
        reference.rotate(before, cos, sin).backward(grad.float())
        close(to, before.grad)
    assert torch.equal(to_v, dv) and torch.equal(buffer[:, -8:], behind)


def test_many_tokens(device, close):
    _, cos, sin = tables(257, 4, device)
    _, q, k = fused(257, 2, 1, 4, torch.float32, device)
    expected = reference.rotate(q, cos, sin)
    rope_(q, k, cos, sin)
    close(q, expected)


def test_tables_of_another_dtype_and_shape(device, close):
    _, cos, sin = tables(3, 64, device)
    q, k = torch.randn(3, 2, 64, device=device), torch.randn(3, 1, 64, device=device)
    y, _ = rope(q, k, cos.bfloat16(), sin.bfloat16())
    close(y, reference.rotate(q, cos.bfloat16(), sin.bfloat16()))
    with pytest.raises(ValueError, match="do not fit"):
        rope(q, k, cos[:2], sin[:2])
    with pytest.raises(ValueError, match="alike"):
        rope(q, k.bfloat16(), cos, sin)
