"""One token's way through a decoder of the Llama kind: for any number of caches on a CPU
(`RowSteps`), and as a step whose launches never change, for a CUDA graph (`DecodeStep`). Knows no
prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamickv.cache import KVCache
from dynamickv.decoding.cpu_ops import CpuOps, PackedOps
from dynamickv.fast.decoder import (
    HeadNorms,
    Ops,
    Rotation,
    Stage,
    linears_of,
    next_logits,
    normed,
    through,
)
from dynamickv.fast.packed import FEW_ROWS
from dynamickv.memory import free_host_memory
from dynamickv.models import LoadedModel

if TYPE_CHECKING:
    from dynamickv.decoding.fast_step import FastStep


class Slots(NamedTuple):
    """One layer's buffers, (heads, room, head_dim), and the slot the token takes in them, (1,)."""

    keys: Tensor
    values: Tensor
    slot: Tensor


class PlainOps(Ops[Slots]):
    """Torch operations on vectors of one token, on any device, the same for every token."""

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        # As a matrix of one row: the kernel, hence the rounding, of the model's own projection.
        return F.linear(x[None], linear.weight, linear.bias)[0]

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: Slots,
        query_heads: int,
    ) -> Tensor:
        """Write into the token's slot."""
        query, key, value = self.split(qkv, rotation, norms, query_heads)
        repeat = store.keys.shape[0] // key.shape[0]
        for buffer, new in ((store.keys, key), (store.values, value)):
            buffer.index_copy_(1, store.slot, new.repeat_interleave(repeat, dim=0).unsqueeze(1))
        return query

    def attend(self, query: Tensor, store: Slots, scaling: float) -> Tensor:
        """Attention over the slots up to the token's own."""
        heads, room, dim = store.keys.shape
        visible = torch.arange(room, device=query.device) <= store.slot
        output = F.scaled_dot_product_attention(
            query.view(1, heads, -1, dim),
            store.keys[None],
            store.values[None],
            attn_mask=visible[None, None, None],
            scale=scaling,
        )
        return output.reshape(-1)


class RememberingOps(Ops[Slots]):
    """Other operations that leave the last queries of every layer behind, for a choice among what
    is held."""

    def __init__(self, ops: PlainOps, asked: dict[int, Tensor], turn: Tensor) -> None:
        """
        Args:
            asked: by the identity of a layer's slots, (remembered, query_heads, head_dim).
            turn: the place that this token's query takes in each, (1,).
        """
        self._ops, self._asked, self._turn = ops, asked, turn

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        return self._ops.linear(x, linear)

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: Slots,
        query_heads: int,
    ) -> Tensor:
        """Write into the token's slot."""
        return self._ops.place(qkv, rotation, norms, store, query_heads)

    def attend(self, query: Tensor, store: Slots, scaling: float) -> Tensor:
        """Attention over the slots up to the token's own; the query stays behind."""
        self._asked[id(store)].index_copy_(0, self._turn, query[None])
        return self._ops.attend(query, store, scaling)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""
        return self._ops.norm(x, weight, eps)

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """Up to three projections of one input."""
        return self._ops.project(x, *linears, residual=residual)

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """silu(gate(x)) * up(x)."""
        return self._ops.gate(x, gate, up)


class RowSteps:
    """Feeds one token to each of several caches, on the CPU in float32.

    A model of precision "fast" brings packed weights. Those of others are packed once so many rows
    were fed that it would have paid, where memory has room for the copy; it lasts as long as this.
    """

    FEW = 3
    """Rows for which packed weights gain nothing."""
    PAYS = 48
    """Rows beyond FEW, over all steps, that gain about what packing takes."""

    def __init__(self, llm: LoadedModel) -> None:
        self._llm = llm
        self._fed = 0
        self._plain = CpuOps.fastest()
        self._packed: PackedOps | None = None
        self._packable = PackedOps.available()
        self._fast: CpuOps | None = None
        self._step: FastStep | None = None
        if llm.packed is not None:
            # As in prefill.py: numba takes a second to load.
            from dynamickv.decoding.fast_ops import FastOps
            from dynamickv.decoding.fast_step import FastStep

            llm.packed.prepare(linears_of(llm), few=True)
            self._fast = FastOps(llm.packed)
            if FastStep.takes(llm, llm.packed):
                self._step = FastStep(llm, llm.packed)

    @torch.inference_mode()
    def __call__(
        self, caches: Sequence[KVCache], token_ids: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """What changes is in the caches.

        Args:
            caches: `plain`, of a model that is `steppable`; each grows by its token.
            positions: true positions of the tokens.

        Returns:
            next-token logits, (caches, vocabulary).
        """
        decoder: Any = self._llm.model.model
        ops = self._ops(len(caches))
        padding = [0] * (ops.least_rows - len(caches))
        x = decoder.embed_tokens(torch.tensor([*token_ids, *padding]))
        rotation = decoder.rotary_emb(x, torch.tensor([*positions, *padding])[:, None])
        layers = list(zip(*(cache.whole_layers() for cache in caches), strict=True))
        if self._step is not None and len(caches) <= FEW_ROWS:
            x = self._step(x, rotation, layers)
            return ops.speak(x, decoder.norm, self._llm.model.lm_head)
        logits = next_logits(self._llm, ops, x, rotation, layers)
        return logits[: len(caches)].contiguous()

    def _ops(self, rows: int) -> CpuOps:
        if self._fast is not None:
            return self._fast
        self._fed += max(0, rows - self.FEW)
        if self._packable and self._packed is None and self._fed >= self.PAYS:
            size: int = self._llm.model.get_memory_footprint()  # type: ignore[no-untyped-call]
            self._packable = free_host_memory() > 2 * size
            self._packed = PackedOps() if self._packable else None
        return self._packed if self._packed is not None and rows >= self.FEW else self._plain


class DecodeStep:
    """One greedy token through one stage of a decoder: into the first one goes a token id, out of
    the last come the next token id and its log-probability, and between them goes a `message`.

    For capture: all that changes from step to step lives on the device: `token`, `position`,
    `slots`, `message`. Calling it enqueues the same work every time. A stage that is the whole
    decoder leaves the token that it chose in `token`, so that it can be called again at once.
    """

    def __init__(
        self,
        llm: LoadedModel,
        cache: KVCache,
        position: int,
        room: int,
        ops: PlainOps,
        stage: Stage | None = None,
        remember: int = 0,
    ) -> None:
        """Reserve room.

        Args:
            cache: `plain`.
            position: true position of the next token, whatever the cache dropped.
            room: steps to make room for.
            stage: which part; by default the whole of a model on one device.
            remember: how many of the last queries of every layer stay, see `asked`.
        """
        self._llm = llm
        decoder: Any = llm.model.model
        self.stage = stage or Stage(llm.device, range(len(decoder.layers)), True, True, True)
        device = self.stage.device
        layers = [cache.whole_layers()[index] for index in self.stage.layers]
        lengths = [layer.length for layer in layers]
        self._first_slots = torch.tensor(lengths, dtype=torch.long, device=device)
        self._first_position = position
        self.slots = self._first_slots.clone()
        """Where the next key and value of each layer go, (layers,)."""
        self.position = torch.empty(1, 1, dtype=torch.long, device=device)
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        weight = decoder.embed_tokens.weight
        self._sizes = [weight.shape[1], llm.geometry.head_dim, llm.geometry.head_dim]
        self.message = torch.zeros(sum(self._sizes), dtype=weight.dtype, device=device)
        """What the stage before sends: the token's hidden state, and the cosines and sines of its
        position."""
        self.chosen = torch.empty(2, dtype=torch.float64, device=device)
        """(token id, log-probability) after a step of the last stage."""
        self._stores = [
            Slots(keys[0], values[0], self.slots[index : index + 1])
            for index, (keys, values) in enumerate(layer.reserve(room) for layer in layers)
        ]
        self._turn = torch.zeros(1, dtype=torch.long, device=device)
        shape = remember, llm.geometry.num_query_heads, llm.geometry.head_dim
        self._asked = [torch.zeros(shape, dtype=weight.dtype, device=device) for _ in self._stores]
        self._ops: Ops[Slots] = ops
        if remember:
            kept = {id(s): asked for s, asked in zip(self._stores, self._asked, strict=True)}
            self._ops = RememberingOps(ops, kept, self._turn)
        self._remember = remember
        self.rewind()

    @property
    def whole(self) -> bool:
        """Whether the stage is the whole decoder."""
        return self.stage.embeds and self.stage.speaks

    def rewind(self, steps: int = 0) -> None:
        """Back to after so many steps, with token 0; what was written since is overwritten by the
        next steps."""
        torch.add(self._first_slots, steps, out=self.slots)
        self.position.fill_(self._first_position + steps)
        self._turn.fill_(steps % max(self._remember, 1))
        self.token.zero_()

    def asked(self, steps: int) -> list[Tensor]:
        """The last queries that are remembered after so many steps, per layer of the stage,
        (query_heads, at most remember, head_dim), the newest last."""
        last = range(max(steps - self._remember, 0), steps)
        places = torch.tensor([step % self._remember for step in last], device=self._turn.device)
        return [asked[places].transpose(0, 1) for asked in self._asked]

    def __call__(self) -> Tensor:
        """Feed `token` or `message`, move `position` and `slots` on; the message for the next
        stage, or the logits, with `chosen` written."""
        decoder: Any = self._llm.model.model
        if self.stage.embeds:
            x = decoder.embed_tokens(self.token)[0]
            cos, sin = decoder.rotary_emb(x, self.position)
            rotation = cos.view(-1), sin.view(-1)
        else:
            x, *rest = torch.split(self.message, self._sizes)
            rotation = rest[0], rest[1]
        layers = [decoder.layers[index] for index in self.stage.layers]
        x = through(self._llm, self._ops, x, rotation, layers, self._stores)
        self.position += 1
        self.slots += 1
        if self._remember:
            self._turn.add_(1).remainder_(self._remember)
        if self.stage.norms:
            x = normed(self._llm, self._ops, x)
        if not self.stage.speaks:
            return torch.cat([x, *rotation])
        logits = self._ops.project(x, self._llm.model.lm_head)
        token_id = logits.argmax()
        wide = logits.float()
        if self.whole:
            self.token.copy_(token_id.view(1))
        self.chosen[0] = token_id
        self.chosen[1] = wide.index_select(0, token_id.view(1))[0] - wide.logsumexp(dim=-1)
        return logits
