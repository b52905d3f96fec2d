"""What is compiled computes what torch does, rounded once."""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamickv.fast.decoder import _rotate
from dynamickv.neighbours import openmp

kernels = pytest.importorskip("dynamickv.fast.kernels", reason="needs numba")
bits = kernels.bits
attention = pytest.importorskip("dynamickv.fast.attention", reason="needs numba")
team = pytest.importorskip("dynamickv.fast.team", reason="needs numba")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_norm_is_rms_norm(dtype: torch.dtype, rounding: float) -> None:
    x, weight = random(3, 96) * 4, random(96, seed=1)
    out = torch.empty(3, 96, dtype=dtype)
    kernels.norm(x.numpy(), weight.numpy(), 1e-5, bits(out))
    expected = F.rms_norm(x, (96,), weight, 1e-5)
    torch.testing.assert_close(out.float(), expected, rtol=rounding, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_adds_unrounded(dtype: torch.dtype) -> None:
    x, more = random(2, 64), random(2, 64, seed=1).to(dtype)
    expected = x + more
    kernels.add(x.numpy(), bits(more))
    assert torch.equal(x, expected)


def test_rounding_is_to_the_nearest_and_of_two_to_the_even_one() -> None:
    x = torch.tensor([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.3, 1e-30, 0.0, 7e30]])
    weight = torch.ones(8)
    normal = torch.empty(1, 8, dtype=torch.bfloat16)
    # Rows whose norm is 1, so that weights are what is rounded.
    kernels.norm(torch.ones(1, 8).numpy(), (weight * x[0]).numpy(), 0.0, bits(normal))
    assert torch.equal(normal, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_place_rotates_and_writes_every_copy_of_every_row(rows: int, dtype: torch.dtype) -> None:
    dim, query_heads, kv_heads = 16, 6, 2
    qkv = random(rows, (query_heads + 2 * kv_heads) * dim).to(dtype)
    cos, sin = random(rows, dim, seed=1), random(rows, dim, seed=2)
    query = torch.empty(rows, query_heads, dim)
    kept, table = [], []
    for row in range(rows):
        # Rows of unlike format, copies, room and slot.
        held = (torch.bfloat16, torch.float32)[row % 2]
        copies, room, slot = 1 + 2 * (row % 2), 5 + row, 3 - row
        keys, values = torch.zeros(2, kv_heads * copies, room, dim, dtype=held)
        kept.append((keys, values, copies, slot))
        places = keys.data_ptr(), values.data_ptr()
        table.append([*places, len(keys), room, slot, held == torch.bfloat16])
    kernels.place(bits(qkv), cos.numpy(), sin.numpy(), query.numpy(), np.array(table, np.int64))
    heads = qkv.float().view(rows, -1, dim)
    turned = _rotate(heads[:, :-kv_heads], (cos[:, None], sin[:, None]))
    torch.testing.assert_close(query, turned[:, :query_heads], rtol=1e-6, atol=1e-6)
    for row, (keys, values, copies, slot) in enumerate(kept):
        expected = turned[row, query_heads:].repeat_interleave(copies, dim=0)
        rounding = 2**-8 if keys.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(keys[:, slot].float(), expected, rtol=rounding, atol=1e-6)
        own = heads[row, -kv_heads:].repeat_interleave(copies, dim=0).to(keys.dtype)
        assert torch.equal(values[:, slot], own)
        untouched = [place for place in range(keys.shape[1]) if place != slot]
        assert not keys[:, untouched].any()
        assert not values[:, untouched].any()


@pytest.mark.parametrize("instruction", [False, True])
def test_both_ways_of_rounding_are_torch_s(instruction: bool) -> None:
    if instruction and not kernels.rounds_by_instruction():
        pytest.skip("the CPU has no instruction for it")
    numba = pytest.importorskip("numba")
    fit = kernels.rounding(instruction=instruction)

    @numba.njit("void(float32[::1], uint16[::1])", fastmath=True)
    def rounded(x: Any, out: Any) -> None:
        for i in range(len(x)):
            out[i] = fit(x[i], out[i])

    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -7e30, 1e-30])
    x = torch.cat([random(1000) * 100, ties])
    out = torch.empty(len(x), dtype=torch.bfloat16)
    rounded(x.numpy(), bits(out))
    assert torch.equal(out, x.bfloat16())


def test_powers_of_two_are_right_to_a_twentieth_of_a_rounding() -> None:
    numba = pytest.importorskip("numba")

    @numba.njit("void(float32[::1])", fastmath=True)
    def powers(x: Any) -> None:
        for i in range(len(x)):
            x[i] = kernels.power_of_two(x[i])

    x = torch.cat([torch.linspace(-126, 127, 20001), torch.arange(-126.0, 128)])
    found = x.clone()
    powers(found.numpy())
    torch.testing.assert_close(found.double(), torch.exp2(x.double()), rtol=1.02e-4, atol=0)
    assert torch.equal(found[-254:], torch.exp2(x[-254:]))


HEADS = [(3, 3, 64), (1, 4, 32), (4, 1, 80), (2, 2, 16), (1, 7, 128), (2, 5, 24), (1, 9, 96)]
"""KV heads, queries for each, and their size: whole registers and not, in fours and not."""


def held_of(length: int, heads: int, group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """A token's queries, and keys and values in buffers with room behind `length`."""
    query = random(heads * group, dim) * 5
    keys, values = random(2, 1, heads, length + 11, dim, seed=length)
    keys[:, :, length:] = values[:, :, length:] = torch.nan
    return query, keys, values


def attended_by_us(
    query: Tensor, keys: Tensor, values: Tensor, length: int, scaling: float
) -> Tensor:
    out = torch.empty(1, *query.shape)
    attention.attend(query[None], [(keys, values, length)], scaling, out)
    return out.flatten()


def attention_of(query: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    grouped = query.view(1, keys.shape[1], -1, keys.shape[3])
    held = keys[:, :, :length], values[:, :, :length]
    return F.scaled_dot_product_attention(grouped, *held, scale=0.3).reshape(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 15, 16, 129, 511, 512, 1501])
@pytest.mark.parametrize(("heads", "group", "dim"), HEADS)
def test_attend_is_attention_to_what_is_held(
    length: int,
    heads: int,
    group: int,
    dim: int,
    threads: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, keys, values = held_of(length, heads, group, dim)
    keys, values = keys.to(dtype), values.to(dtype)
    out = attended_by_us(query, keys, values, length, 0.3)
    expected = attention_of(query, keys.float(), values.float(), length)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_row_attends_to_its_own_cache(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query_heads, dim = 12, 32
    rows = [(40, 3), (1, 12), (700, 4), (1501, 3), (9, 1)]
    queries = random(len(rows), query_heads, dim) * 5
    held = []
    for row, (length, heads) in enumerate(rows):
        _, keys, values = held_of(length, heads, query_heads // heads, dim)
        dtype = (torch.bfloat16, torch.float32)[row % 2]
        held.append((keys.to(dtype), values.to(dtype), length))
    # As they come from heads that were split.
    asked = queries.transpose(0, 1).contiguous().transpose(0, 1)
    out = torch.empty(queries.shape)
    attention.attend(asked, held, 0.3, out)
    for row, (keys, values, length) in enumerate(held):
        expected = attention_of(queries[row], keys.float(), values.float(), length)
        torch.testing.assert_close(out[row].flatten(), expected, rtol=2e-5, atol=5e-5)


def test_attend_takes_one_thread_where_torch_has_another_runtime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, keys, values = held_of(1501, *HEADS[0])
    several = attended_by_us(query, keys, values, 1501, 0.3)
    monkeypatch.setattr(team, "openmp", lambda: None)
    alone = attended_by_us(query, keys, values, 1501, 0.3)
    torch.testing.assert_close(alone, several, rtol=2e-5, atol=5e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another runtime there")
def test_the_threads_are_those_of_torch() -> None:
    assert openmp() is not None


@pytest.mark.parametrize("spoil", [Tensor.bfloat16, Tensor.half, lambda keys: keys.transpose(2, 3)])
def test_threads_are_not_let_at_keys_that_they_cannot_read(spoil: Any) -> None:
    query, keys, values = held_of(1500, 3, 3, 1511)
    with pytest.raises(TypeError, match="keys and values must be"):
        attended_by_us(query, spoil(keys), values, 1500, 0.3)
    with pytest.raises(TypeError, match="queries must be float32"):
        attended_by_us(query.half(), keys, values, 1500, 0.3)


@pytest.mark.parametrize(
    ("query_heads", "dim", "length", "caches"),
    [(9, 64, 30, 1), (9, 64, 0, 1), (8, 64, 9, 1), (9, 32, 9, 1), (9, 64, 9, 2), (9, 64, 9, 0)],
)
def test_shapes_that_do_not_fit_are_refused(
    query_heads: int, dim: int, length: int, caches: int
) -> None:
    _, keys, values = held_of(9, 3, 3, 64)
    out = torch.empty(1, query_heads, dim)
    with pytest.raises(ValueError, match="cannot attend to"):
        attention.attend(random(1, query_heads, dim), [(keys, values, length)] * caches, 0.3, out)


@pytest.mark.parametrize(("name", "features"), [("generic", None), (None, "+avx2")])
def test_a_cpu_that_numba_is_told_is_not_asked_for_more(
    name: str | None, features: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "CPU_NAME", name)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    assert not kernels.rounds_by_instruction()


@pytest.mark.parametrize("shape", [(2, 9, 64), (1, 8, 64), (1, 9, 32)])
def test_attention_is_not_written_where_it_does_not_fit(shape: tuple[int, ...]) -> None:
    _, keys, values = held_of(9, 3, 3, 64)
    with pytest.raises(ValueError, match="do not attend into"):
        attention.attend(random(1, 9, 64), [(keys, values, 9)], 0.3, torch.empty(shape))
    narrow = torch.empty(1, 9, 64, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="must be contiguous float32"):
        attention.attend(random(1, 9, 64), [(keys, values, 9)], 0.3, narrow)


def test_several_callers_attend_at_once() -> None:
    asked = [held_of(1000 + number, *HEADS[0]) for number in range(4)]

    def attended(number: int) -> None:
        length = 1000 + number
        expected = attention_of(*asked[number], length)
        for _ in range(20):
            out = attended_by_us(*asked[number], length, 0.3)
            torch.testing.assert_close(out, expected, rtol=2e-5, atol=5e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attended, range(4)))


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same() -> None:
    made: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", made)
    assert kernels.compiled("int64(int64)")(made["double"])(4) == 8


FAST = Path(kernels.__file__).parent
COMPILED = sorted(path.stem for path in FAST.glob("*.py") if "\nMADE_OF = " in path.read_text())


def made_of(name: str) -> set[str]:
    """The files of its folder that a file's functions are made of."""
    tree = ast.parse((FAST / f"{name}.py").read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    parts = {
        module.rpartition(".")[2] for module in modules if module.startswith("dynamickv.fast.")
    }
    return parts.union(*map(made_of, parts))


@pytest.mark.parametrize("name", COMPILED)
def test_files_made_of_these_functions_change_with_them(name: str) -> None:
    parts = b"".join((FAST / f"{part}.py").read_bytes() for part in sorted(made_of(name)))
    wanted = hashlib.sha256(parts).hexdigest()[:12]
    noted = importlib.import_module(f"dynamickv.fast.{name}").MADE_OF
    assert noted == wanted, f'write MADE_OF = "{wanted}" into {name}.py'


def test_what_is_compiled_of_other_files_names_their_digest() -> None:
    assert COMPILED == [
        "attention",
        "causal",
        "few_rows",
        "heads",
        "softmax",
        "step",
        "sums",
        "tiled",
    ]
