"""Packed weights give back what a GGUF file gave each weight, and stand in for linear layers only
where they are asked to."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Format
from gguf import quants
from torch import nn

from dynamickv.fast.packed import FastProducts, PackedWeights, four_bits, has_fast_products

needs_fast = pytest.mark.skipif(not has_fast_products(), reason="needs bfloat16 instructions")


def weights(outputs: int = 64, inputs: int = 256) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


def quantized(kind: Format, weight: torch.Tensor) -> torch.Tensor:
    """What a file of that kind gives back for these weights."""
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))


def of_super_blocks(outputs: int = 32, inputs: int = 512) -> torch.Tensor:
    """Weights as Q4_K holds them: per 256 a scale and a least value, per 32 six bits of each."""
    made = torch.Generator().manual_seed(2)
    blocks = (outputs, inputs // 256, 8, 32)
    codes = torch.randint(0, 16, blocks, generator=made)
    scale = torch.randint(1, 64, (*blocks[:3], 1), generator=made) * 0.0007
    least = torch.randint(0, 64, (*blocks[:3], 1), generator=made) * 0.0031
    return (codes * scale - least).float().view(outputs, inputs)


def rebuilt(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    blocks = codes.view(codes.shape[0], -1, 32) - 8
    return (blocks * scale[..., None] + zero[..., None]).view_as(codes)


@pytest.mark.parametrize("kind", [Format.Q4_0, Format.Q4_1, None])
def test_four_bit_weights_are_found_again(kind: Format | None) -> None:
    weight = of_super_blocks() if kind is None else quantized(kind, weights())
    found = four_bits(weight)
    assert found is not None
    codes = found[0]
    assert codes.dtype == torch.int32
    assert 0 <= int(codes.min()) <= int(codes.max()) <= 15
    torch.testing.assert_close(rebuilt(*found), weight, atol=1e-6, rtol=1e-5)


def test_blocks_of_one_value_and_of_few_levels_are_found_again() -> None:
    weight = torch.zeros(16, 64)
    weight[:, 3], weight[2] = 0.5, -0.25
    weight[5, ::2], weight[5, 1::4] = 0.3, 0.6
    found = four_bits(weight)
    assert found is not None
    torch.testing.assert_close(rebuilt(*found), weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [Format.Q5_0, Format.Q8_0, None])
def test_weights_of_more_bits_have_none(kind: Format | None) -> None:
    assert four_bits(weights() if kind is None else quantized(kind, weights())) is None


def test_one_block_of_more_bits_is_enough_to_have_none() -> None:
    weight = quantized(Format.Q4_1, weights(256))
    weight[-1, -32:] = weights()[0, :32]
    assert four_bits(weight) is None


@pytest.mark.parametrize("shape", [(24, 64), (32, 48)])
def test_shapes_without_a_kernel_have_none(shape: tuple[int, int]) -> None:
    assert four_bits(torch.zeros(shape)) is None


def layers(bias: bool) -> nn.ModuleList:
    made = nn.ModuleList([nn.Linear(256, 64, bias=bias) for _ in range(2)])
    for one in made:
        one.weight.data = quantized(Format.Q4_1, weights()) * (1 + len(str(one)) % 3)
    return made


@needs_fast
@pytest.mark.parametrize("rows", [1, 4, 5, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_products_round_as_bfloat16_ones_do(rows: int, bias: bool) -> None:
    first, second = layers(bias)
    packed = PackedWeights(nn.ModuleList([first, second]))
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        expected = torch.cat([first(x), second(x)], dim=-1)
        product = packed.product(x, first, second).float()
        assert (product - expected).norm() < 0.006 * expected.norm()
        if not bias:
            gated = packed.gated(x, first, second).float()
            exact = F.silu(first(x)) * second(x)
            assert (gated - exact).norm() < 0.01 * exact.norm()


@needs_fast
def test_bytes_are_those_of_the_copies_made() -> None:
    first, second = layers(False)
    packed = PackedWeights(nn.ModuleList([first, second]))
    assert packed.nbytes == 0
    packed.prepare([(first,)], few=False)
    assert packed.nbytes == 64 * 256 * 2
    packed.prepare([(second,)], few=True)
    assert packed.nbytes == 64 * 256 * 2 + 64 * 256 // 2 + 64 * 8 * 2 * 2


@needs_fast
def test_products_are_replaced_inside_the_block_and_in_its_thread_alone() -> None:
    linear, unknown = layers(True)
    x = weights(8)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        plain, other = linear(x), unknown(x)
        with FastProducts(PackedWeights(linear)):
            seen["inside"] = linear(x)
            thread = threading.Thread(
                target=lambda: seen.update(elsewhere=torch.no_grad()(linear)(x))
            )
            thread.start()
            thread.join()
            assert torch.equal(unknown(x), other)
            assert torch.equal(linear(x.double().float()), seen["inside"])
        assert torch.equal(linear(x), plain)
    assert seen["inside"].dtype == torch.float32
    assert not torch.equal(seen["inside"], plain)
    assert torch.equal(seen["elsewhere"], plain)
