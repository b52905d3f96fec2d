"""What an answer's tokens read of the prompt in the full cache, and how much of it every method
kept.

A decoding step's attention is the mean over query heads of its attention weights. The whole answer
is fed to a copy of the full cache in one pass, and the weights are computed from the queries and
keys that the model's own attention was given, so any kind of layer that attends is read.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamickv.cache import prune
from dynamickv.decoding.decode import extend
from dynamickv.memory import ATTENDING, memory_watched
from dynamickv.methods import FullKV
from dynamickv.models import LoadedModel
from dynamickv.reading.observe import Seen, watched
from dynamickv.reading.prefill import whole_prompt
from dynamickv.records import LayerObservation, Prefill, Retention
from dynamickv.scoring import attention_shares

SHARE_STEPS = 255
MOST_POSITIONS = 64
LEAST_POSITIONS = 4
"""Strongest positions that are kept per token and layer."""
SENT_BYTES = 300_000
"""About how many bytes the strongest positions may take as they are sent, in base64."""
_WEIGHTS = 2**25
"""Attention weights computed at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What each answer token's decoding step read; quantised arrays over (token, layer, ...)."""

    layers: list[int]
    """Places of the layers that attend, ascending."""
    positions: int
    """Length of the prompt in tokens."""
    index: np.ndarray
    """Prompt positions, strongest first, (tokens, layers, strongest), uint16 or uint32."""
    share: np.ndarray
    """Their attention, uint8 of the same shape: (share / 255) ** 2 of all attention of the step,
    own answer and sinks included; 0 where nothing was read."""
    document: np.ndarray
    """uint8 (tokens, layers): share / 255 of all attention goes to the document. The prompt's first
    token is left out, which draws attention whatever it says."""
    surviving: list[np.ndarray]
    """For every retention, uint8 (tokens, layers): of that attention to the document, share / 255
    goes to positions that the retention's heads kept; 255 in layers that no method compresses."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: arrays in base64, little-endian, in C order."""
        tokens, _, strongest = self.index.shape
        return {
            "tokens": tokens,
            "layers": self.layers,
            "positions": self.positions,
            "strongest": strongest,
            "index_bytes": self.index.itemsize,
            "index": _base64(self.index),
            "share": _base64(self.share),
            "document": _base64(self.document),
            "surviving": [_base64(array) for array in self.surviving],
            "seconds": self.seconds,
        }


@torch.inference_mode()
def reads(
    llm: LoadedModel,
    prefill: Prefill,
    token_ids: Sequence[int],
    retentions: Sequence[Retention | np.ndarray] = (),
    *,
    question: str | None = None,
) -> Reads:
    """What every token of an answer read of the prompt, by the attention of FullKV's own decoding
    step: the one that produced the token, whose query is the token before it.

    One pass over the answer. Measured with SmolLM2-135M on a CPU (2,843 tokens, 64 answer tokens,
    six retentions): 8 % of the prefill's time; as JSON 318 KB, 157 KB gzipped.

    Args:
        token_ids: FullKV's answer, at least one token.
        retentions: what methods kept: of this prefill, or boolean (layers of the model, heads,
            prompt positions) as `Run.retained.unpack` gives it.
        question: for a prefill of a document alone, where it was not given then.

    Returns:
        rows in the order of `token_ids`. In layers that no method compresses the first token's row
        is empty: a prefill does not keep their last query.

    Raises:
        ValueError: an answer of no tokens, or one that does not fit behind the prompt.
    """
    started = time.perf_counter()
    prompt = whole_prompt(llm, prefill.prompt, question)
    later = prompt.token_ids[prefill.length :]
    if not token_ids:
        raise ValueError("an answer of no tokens reads nothing; give at least one token")
    if prompt.length + len(token_ids) - 1 > llm.geometry.max_positions:
        raise ValueError(
            f"an answer of {len(token_ids):,} tokens does not fit behind {prompt.length:,} in "
            f"{llm.geometry.max_positions:,} positions; give fewer"
        )
    first, last = prompt.document_span
    heads = llm.geometry.num_query_heads
    table = _Table(
        tokens=len(token_ids),
        length=prompt.length,
        document=(max(first, 1), last),
        kept=[_masks(kept, prefill, prompt.length) for kept in retentions],
        strongest=max(
            LEAST_POSITIONS,
            min(
                MOST_POSITIONS,
                prompt.length,
                SENT_BYTES // (4 * len(token_ids) * llm.geometry.num_layers),
            ),
        ),
    )
    if not later:
        for place, layer in zip(prefill.places, prefill.layers, strict=True):
            table.take(place, place, 0, _last_row(layer))
    fed = [*later, *token_ids[:-1]]
    if fed:
        block = max(8, min(64, _WEIGHTS // (heads * prompt.length)))
        block = 1 if llm.geometry.stepwise else block
        done = 0

        def on_attention(seen: Seen) -> None:
            skip = max(len(later) - 1 - done, 0)
            if skip < seen.attended.queries.shape[2]:
                rows = _rows(seen, skip)
                table.take(seen.place, seen.source, done + skip - len(later) + 1, rows)

        every = FullKV().select(prefill.layers)
        with memory_watched(ATTENDING), watched(on_attention):
            cache = prune(prefill, every, len(fed))
            for done in range(0, len(fed), block):
                extend(llm, cache, fed[done : done + block], prefill.length + done)
    llm.synchronize()
    return table.reads(time.perf_counter() - started)


def _last_row(layer: LayerObservation) -> Tensor:
    """Weights of the prompt's last query, (num_query_heads, 1, prompt_length)."""
    sinks = layer.sinks
    return attention_shares(
        layer.queries[:, -1:],
        layer.keys,
        layer.scaling,
        layer.softcap,
        sinks if sinks is None or sinks.dim() == 1 else sinks[:, -1:],
        None if layer.bias is None else layer.bias[:, -1:],
    )


def _rows(seen: Seen, skip: int) -> Tensor:
    """Weights of all but the first `skip` queries, (num_query_heads, queries, held)."""
    read = seen.attended
    sinks, bias, visible = read.sinks_of(0), read.bias, seen.visible
    return attention_shares(
        read.queries[0, :, skip:],
        read.keys[0],
        read.scaling,
        read.softcap,
        sinks if sinks is None or sinks.dim() == 1 else sinks[:, skip:],
        None if bias is None else bias[0, :, skip:],
        None if visible is None else visible[..., skip:, :],
    )


def _masks(kept: Retention | np.ndarray, prefill: Prefill, length: int) -> dict[int, Tensor]:
    """What is kept per place of the model, boolean (heads, length)."""
    device = prefill.logits.device
    if isinstance(kept, np.ndarray):
        whole = torch.from_numpy(np.ascontiguousarray(kept)).to(device)
        return {place: whole[place] for place in prefill.places}
    masks = {}
    for place, heads in zip(prefill.places, kept.indices, strict=True):
        mask = torch.zeros(len(heads), length, dtype=torch.bool, device=device)
        mask[:, prefill.length :] = True
        for head, positions in enumerate(heads):
            mask[head, positions] = True
        masks[place] = mask
    return masks


@dataclass(slots=True, kw_only=True)
class _Table:
    """Collects layer after layer; rows arrive in blocks."""

    tokens: int
    length: int
    document: tuple[int, int]
    kept: list[dict[int, Tensor]]
    strongest: int
    found: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """Per place: positions, shares, document, and surviving shares of every retention."""

    def take(self, place: int, source: int | None, token: int, weights: Tensor) -> None:
        """Some tokens' weights in one layer.

        Args:
            source: the compressed layer whose keys they were, None where nobody compresses them.
            token: the first of them.
            weights: (num_query_heads, tokens, held), the last positions up to the last token.
        """
        rows = weights.shape[1]
        ahead = self.length + token + rows - 1 - weights.shape[2]
        # Heads that share a choice are summed first: what follows is then a group's size cheaper.
        heads = self._heads(source, len(weights))
        read = weights.view(heads, -1, rows, weights.shape[2]).sum(dim=1)
        read = read[..., : max(self.length - ahead, 0)] / len(weights)
        mean = read.sum(dim=0)
        first = min(max(self.document[0] - ahead, 0), read.shape[2])
        last = min(max(self.document[1] - ahead, 0), read.shape[2])
        document = mean[:, first:last].sum(dim=-1)
        into = self._of(place)
        most = min(self.strongest, mean.shape[1])
        best = mean.topk(most, dim=-1)
        span = slice(token, token + rows)
        into[0][span, :most] = (best.indices + ahead).cpu().numpy()
        into[1][span, :most] = _steps(best.values.sqrt())
        into[2][span] = _steps(document)
        if source is None or not self.kept:
            return
        every = range(heads)
        kept = [masks[source] for masks in self.kept]
        chosen = torch.stack(
            [mask[[head * len(mask) // heads for head in every]] for mask in kept], dim=-1
        )
        seen = chosen[:, ahead + first : ahead + last].to(read.dtype)
        held = torch.bmm(read[..., first:last], seen).sum(dim=0)
        share = torch.where(document > 0, held.t() / document.clamp_min(1e-30), 1.0)
        for number, row in enumerate(_steps(share)):
            into[3 + number][span] = row

    def _heads(self, source: int | None, query_heads: int) -> int:
        """Groups of query heads that every retention treats alike."""
        if source is None:
            return 1
        heads = max((len(masks[source]) for masks in self.kept), default=1)
        return heads if query_heads % heads == 0 else query_heads

    def _of(self, place: int) -> list[np.ndarray]:
        if place not in self.found:
            wide = np.uint16 if self.length <= 2**16 else np.uint32
            self.found[place] = [
                np.zeros((self.tokens, self.strongest), wide),
                np.zeros((self.tokens, self.strongest), np.uint8),
                np.zeros(self.tokens, np.uint8),
                *(np.full(self.tokens, SHARE_STEPS, np.uint8) for _ in self.kept),
            ]
        return self.found[place]

    def reads(self, seconds: float) -> Reads:
        """All of it."""
        layers = sorted(self.found)
        index, share, document, *surviving = (
            np.stack(arrays, axis=1) for arrays in zip(*map(self.found.get, layers), strict=True)
        )
        return Reads(
            layers=layers,
            positions=self.length,
            index=index,
            share=share,
            document=document,
            surviving=surviving,
            seconds=seconds,
        )


def _steps(shares: Tensor) -> np.ndarray:
    """0..1 -> 0..255, uint8."""
    return (shares.clamp(0, 1) * SHARE_STEPS).round().to(torch.uint8).cpu().numpy()


def _base64(array: np.ndarray) -> str:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(np.ascontiguousarray(little).tobytes()).decode("ascii")
