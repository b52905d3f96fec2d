"""The codes that a GGUF file gave weights are found again in what was read from it."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType as Format
from gguf import quants

from dynamickv.fast.codes import TOGETHER, Coded, coded


def weights(outputs: int = 64, inputs: int = 256) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


def quantized(kind: Format, weight: torch.Tensor) -> torch.Tensor:
    """What a file of that kind gives back for these weights."""
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))


def of_super_blocks(bits: int, outputs: int = 32, inputs: int = 512) -> torch.Tensor:
    """Weights as Q4_K and Q5_K hold them: per 256 a scale and a least value, per 32 six bits of
    each."""
    made = torch.Generator().manual_seed(2)
    blocks = (outputs, inputs // 256, 8, 32)
    codes = torch.randint(0, 2**bits, blocks, generator=made)
    scale = torch.randint(1, 64, (*blocks[:3], 1), generator=made) * 0.0007
    least = torch.randint(0, 64, (*blocks[:3], 1), generator=made) * 0.0031
    return (codes * scale - least).float().view(outputs, inputs)


def rebuilt(weight: Coded) -> torch.Tensor:
    """The weights that codes stand for, from their bytes."""
    blocks, groups, _ = weight.data.shape
    numbers = 2 if weight.bits == 4 else 3
    data, scales = weight.data[..., : -32 * numbers], weight.data[..., -32 * numbers :].contiguous()
    if weight.bits == 4:
        # Eight inputs of an output in four bytes, the first in the lowest bits.
        pairs = data.reshape(blocks, groups, 4, 16, 4)
        nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).view(blocks, groups, 4, 16, 8)
        codes = nibbles.permute(0, 3, 1, 2, 4).reshape(blocks, 16, groups, 32).float()
    else:
        signed = data.contiguous().view(torch.int8).view(blocks, groups, 32, 16)
        codes = signed.permute(0, 3, 1, 2).float()
    *scale, least = scales.view(torch.float16).float().view(blocks, groups, numbers, 16).unbind(2)
    halves = (
        torch.stack([scale[0], scale[-1]], dim=-1).transpose(1, 2).repeat_interleave(16, dim=-1)
    )
    whole = codes * halves + least.transpose(1, 2)[..., None]
    return whole.reshape(weight.outputs, weight.inputs)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (Format.Q4_0, 4),
        (Format.Q4_1, 4),
        (Format.Q5_0, 8),
        (Format.Q5_1, 8),
        (Format.Q8_0, 8),
    ],
)
def test_weights_of_a_file_are_found_again(kind: Format, bits: int) -> None:
    weight = quantized(kind, weights())
    found = coded(weight)
    assert found is not None
    assert found.bits == bits
    torch.testing.assert_close(rebuilt(found), weight, atol=1e-7, rtol=1e-6)


def of_six_bits(outputs: int = 32, inputs: int = 512) -> torch.Tensor:
    """Weights as Q6_K holds them: per 256 a scale, per 16 eight bits of it."""
    made = torch.Generator().manual_seed(2)
    blocks = (outputs, inputs // 256, 16, 16)
    codes = torch.randint(-32, 32, blocks, generator=made)
    scale = torch.randint(-128, 128, (*blocks[:3], 1), generator=made) * 0.0007
    return (codes * scale).float().view(outputs, inputs)


def test_weights_whose_halves_have_scales_of_their_own_are_found_again() -> None:
    weight = of_six_bits()
    found = coded(weight)
    assert found is not None
    assert found.bits == 8
    torch.testing.assert_close(rebuilt(found), weight, atol=0, rtol=2.0**-11)


@pytest.mark.parametrize("bits", [4, 5])
def test_scales_that_no_float16_holds_are_rounded_to_one(bits: int) -> None:
    weight = of_super_blocks(bits)
    found = coded(weight)
    assert found is not None
    assert found.bits == (4 if bits == 4 else 8)
    # An eighth of what bfloat16 would round.
    torch.testing.assert_close(rebuilt(found), weight, atol=2.0**-11 * 1.6, rtol=0)


def test_blocks_of_one_value_and_of_few_levels_are_found_again() -> None:
    weight = torch.zeros(16, 64)
    weight[:, 3], weight[2] = 0.5, -0.25
    weight[5, ::2], weight[5, 1::4] = 0.3, 0.6
    found = coded(weight)
    assert found is not None
    torch.testing.assert_close(rebuilt(found), weight, atol=2.0**-11 * 0.6, rtol=0)


def test_weights_of_other_formats_have_none() -> None:
    assert coded(weights()) is None
    assert coded(weights().bfloat16().float()) is None
    assert coded(weights().double()) is None


@pytest.mark.parametrize("spoiled", [1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("kind", [Format.Q4_1, Format.Q8_0])
def test_one_block_of_another_format_is_enough_to_have_none(kind: Format, spoiled: float) -> None:
    weight = quantized(kind, weights(256))
    weight[-1, -32:] = weights()[0, :32] * spoiled
    assert coded(weight) is None


@pytest.mark.parametrize("size", [1e-9, 1e7])
def test_scales_beyond_float16_have_none(size: float) -> None:
    assert coded(quantized(Format.Q4_1, weights()) * size) is None


def test_least_weights_beyond_float16_have_none() -> None:
    codes = 300.0 * torch.randint(0, 16, (16, 64), generator=torch.Generator().manual_seed(3))
    assert coded(codes + 60_000) is not None
    assert coded(codes + 70_000) is None


def test_a_least_weight_of_next_to_nothing_is_one() -> None:
    codes = torch.arange(16).repeat(16, 4).float()
    weight = codes * 0.0035 + 9e-10
    found = coded(weight)
    assert found is not None
    torch.testing.assert_close(rebuilt(found), weight, atol=1e-9, rtol=2.0**-11)


def test_more_weights_than_are_looked_at_together_are_found_again() -> None:
    weight = quantized(Format.Q4_1, weights(8192, 320))
    assert weight.numel() > 32 * TOGETHER
    found = coded(weight)
    assert found is not None
    torch.testing.assert_close(rebuilt(found), weight, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shape", [(24, 64), (32, 48)])
def test_shapes_that_are_no_blocks_have_none(shape: tuple[int, int]) -> None:
    assert coded(torch.zeros(shape)) is None


def test_bytes_are_five_and_nine_and_a_half_bits_a_weight() -> None:
    for kind, bits in ((Format.Q4_1, 5), (Format.Q8_0, 9.5)):
        found = coded(quantized(kind, weights()))
        assert found is not None
        assert found.nbytes == 64 * 256 * bits / 8


def test_matrices_of_several_formats_are_one_of_the_widest() -> None:
    parts = [quantized(kind, weights(16)) for kind in (Format.Q4_1, Format.Q8_0, Format.Q5_1)]
    parts.append(of_six_bits(16, 256))
    found = coded(*parts)
    assert found is not None
    assert (found.bits, found.outputs, found.inputs) == (8, 64, 256)
    torch.testing.assert_close(rebuilt(found), torch.cat(parts), atol=1e-7, rtol=2.0**-11)
    assert coded(parts[0], weights(16)) is None
    alike = coded(parts[0], parts[0])
    assert alike is not None
    assert alike.bits == 4
    torch.testing.assert_close(rebuilt(alike), torch.cat([parts[0]] * 2), atol=1e-7, rtol=1e-6)
