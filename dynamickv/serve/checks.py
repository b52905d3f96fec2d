"""What a compressed cache cannot serve, refused in one sentence before the model computes.

Knows what is asked for and what is held; no layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamickv.models import Geometry
from dynamickv.reading.generate_call import GenerateCall


def require_servable(call: GenerateCall, geometry: Geometry) -> None:
    """Raise ValueError for a `generate` of beams, or one that crosses longrope's switch."""
    if (getattr(call.options, "num_beams", None) or 1) > 1:
        raise ValueError(
            f"num_beams={call.options.num_beams} exchanges rows of the cache, which a "
            "compressed one cannot; generate without beam search (num_beams=1, or sampling)"
        )
    switch, length = geometry.switch, call.token_ids.shape[1]
    most = getattr(call.options, "max_length", None)
    if switch and length <= switch and most and most > switch:
        raise ValueError(
            f"the answer would cross {switch:,} tokens, where this model turns all keys by "
            f"other frequencies; lower max_new_tokens to {switch - length} or read a prompt "
            "that is longer already"
        )


def require_continuation(
    call: GenerateCall, seen: int, fed: Sequence[Tensor], token_ids: Tensor | None, width: int
) -> None:
    """Raise ValueError unless a new `generate` goes on from what a cache holds.

    Args:
        seen: positions that the cache has seen.
        fed: token ids of the passes so far, (rows, tokens) each; nothing of what was not fed as
            tokens, nor of what came before it.
        token_ids: what the model is fed now, (rows, width); None where it is not fed tokens.
    """
    held = sum(ids.shape[1] for ids in fed)
    if token_ids is None or held < seen:
        raise ValueError(
            f"this cache holds {seen} tokens, and with inputs_embeds, before or now, it is unknown "
            "whether they are the beginning of what is given; call cache.reset() and give it whole"
        )
    length = call.token_ids.shape[1]
    new = length - seen
    before = torch.cat(list(fed), dim=1)
    known = call.token_ids.to(before.device)
    goes_on = new > 0 and width >= new and torch.equal(known[:, :seen], before)
    if not goes_on and length != width:
        raise ValueError(
            f"this cache holds {seen} tokens that are not the beginning of the "
            f"{length} given; call cache.reset() before another prompt"
        )
    if not goes_on and torch.equal(known[:, :held], before[:, :length]):
        raise ValueError(
            f"this cache holds all {length} tokens of the prompt already; give what follows "
            "them too, or call cache.reset()"
        )


def require_same_rows(
    seen: int,
    held: Tensor,
    rows: int,
    width: int,
    mask: Tensor | None,
    positions: Tensor | None,
) -> None:
    """Raise ValueError for other rows than those held, and for tokens that do not follow them.

    Args:
        held: hidden tokens before each held row's first, (rows,).
    """
    if rows != len(held):
        raise ValueError(
            f"the batch has {rows} sequences and this cache holds {len(held)}; "
            "call cache.reset() before other prompts"
        )
    first = seen - int(held[0])
    if positions is not None and positions.dim() == 2 and int(positions[0, 0]) != first:
        raise ValueError(
            f"{width} tokens are fed at position {int(positions[0, 0])} to a cache that holds "
            f"{first}; call cache.reset() before another prompt"
        )
    padding = padding_of(mask)
    if padding is None or mask is None:
        return
    if mask.shape[1] != seen + width:
        raise ValueError(
            f"{width} tokens are fed to a cache that holds {seen}, and the attention "
            f"mask has {mask.shape[1]}; call cache.reset() before another prompt"
        )
    if held.tolist() != padding.tolist():
        raise ValueError(
            "the attention mask hides padding other than the prompts'; "
            "pad the prompts alone, on the left"
        )


def require_readable(padding: Tensor, width: int, prompt_end: int, adaptive: bool) -> None:
    """Raise ValueError for fresh prompts that cannot be read as the rows of one batch.

    Args:
        padding: hidden tokens before each row's first, (rows,).
        width: tokens that the first pass feeds.
        prompt_end: positions, padding included, with which the prompts end.
        adaptive: whether the heads of a layer may keep different numbers.
    """
    if prompt_end > width and bool(padding.any()):
        raise ValueError(
            "prompts of unlike length cannot be read in chunks; leave out prefill_chunk_size, "
            "or generate the prompts one by one"
        )
    if bool((padding >= width).any()):
        raise ValueError("a row of the batch is padding alone; leave out empty prompts")
    if len(padding) > 1 and adaptive:
        raise ValueError(
            f"head_budgets='adaptive' serves one prompt at a time, and the batch has "
            f"{len(padding)}; generate them one by one, or use head_budgets='uniform'"
        )


def padding_of(mask: Tensor | None) -> Tensor | None:
    """Hidden tokens before each row's first, (rows,), None without a mask of tokens.

    Raises:
        ValueError: tokens are hidden elsewhere.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    shown = mask.bool()
    padding = shown.shape[1] - shown.sum(dim=1)
    places = torch.arange(shown.shape[1], device=mask.device)
    if not torch.equal(shown, places >= padding[:, None]):
        raise ValueError(
            "the attention mask hides padding between or behind tokens, which a compressed cache "
            "cannot tell from text; pad prompts on the left"
        )
    return padding.cpu()
