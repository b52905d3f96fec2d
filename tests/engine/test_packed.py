"""Packed weights give back what a GGUF file gave each weight, and stand in for linear layers only
where they are asked to."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Format
from torch import nn

from dynamickv.fast.packed import FastProducts, PackedWeights, has_fast_products
from tests.engine.test_codes import quantized, weights

needs_fast = pytest.mark.skipif(not has_fast_products(), reason="needs bfloat16 instructions")


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


@needs_fast
def test_of_a_head_of_codes_a_prompt_packs_codes_alone() -> None:
    first, head = layers(False)
    model = nn.ModuleList([first, head])
    model.get_output_embeddings = lambda: head  # type: ignore[assignment]
    packed = PackedWeights(model)
    packed.prepare([(first,), (head,)], few=False)
    assert packed.nbytes == 64 * 256 * 2 + 64 * 256 * 5 // 8
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(packed.logits(x, head), head(x), rtol=1e-5, atol=1e-4)
        assert packed.nbytes == 64 * 256 * 2 + 64 * 256 * 5 // 8
