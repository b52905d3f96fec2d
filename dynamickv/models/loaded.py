"""A model that is ready to run, with its tokenizer and its geometry."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from dynamickv.fast.decoder import held_dtype
from dynamickv.fast.packed import PackedWeights
from dynamickv.models.geometry import Geometry
from dynamickv.models.rope import forget_longer_sequences
from dynamickv.reading.observe import backend_of, set_observed
from dynamickv.transfer import synchronize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZATIONS = ("4bit", "8bit")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run; nothing in it changes while it is used."""

    name: str
    revision: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    geometry: Geometry
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    """Tokens that end an answer."""
    packed: PackedWeights | None = field(default=None, repr=False, compare=False)
    """What precision "fast" multiplies with."""

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str,
        packed: PackedWeights | None = None,
    ) -> LoadedModel:
        """Describe a transformers model and let its attention be observed."""
        geometry = Geometry.of(model.config)
        set_observed(model)
        forget_longer_sequences(model)
        stop = model.generation_config.eos_token_id if model.generation_config else None
        stops = list(stop) if isinstance(stop, list) else [stop]
        # Fine-tunes often end a turn with the tokenizer's token and keep their base's settings.
        if stop is None or getattr(tokenizer, "chat_template", None):
            stops.append(getattr(tokenizer, "eos_token_id", None))
        return cls(
            name=name,
            revision=revision,
            model=model.eval(),  # type: ignore[no-untyped-call]
            tokenizer=tokenizer,
            geometry=geometry,
            stop_ids=frozenset(int(token) for token in stops if token is not None),
            packed=packed,
        )

    @property
    def device(self) -> torch.device:
        """Where the embedding layer is, hence where token ids go."""
        embedding = self.model.get_input_embeddings()
        # Offloaded weights lie elsewhere than where accelerate brings them to work.
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return next(embedding.parameters()).device if device is None else torch.device(device)

    @property
    def dtype(self) -> str:
        """Number format of the weights and of what is computed, such as "float32", or "bfloat16
        with 4bit weights" where the two differ."""
        computed = str(self.model.dtype).removeprefix("torch.")
        return f"{computed} with {self.quantization} weights" if self.quantization else computed

    @property
    def held_dtype(self) -> torch.dtype:
        """Number format in which keys and values are held."""
        return held_dtype(self)

    @property
    def precision(self) -> str:
        """ "fast" where a prompt's products round as bfloat16 ones do, "exact" where they are the
        model's."""
        return "exact" if self.packed is None else "fast"

    @property
    def quantization(self) -> str | None:
        """How the weights are packed: "4bit", "8bit", another method's name, or None."""
        config = getattr(self.model.config, "quantization_config", None)
        if config is None:
            return None
        read = config.get if isinstance(config, dict) else partial(getattr, config)
        for name in QUANTIZATIONS:
            if read(f"load_in_{name}", False):
                return name
        method = read("quant_method", "quantized")
        return str(getattr(method, "value", method))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, packed copies included."""
        copies = 0 if self.packed is None else self.packed.nbytes
        return copies + int(self.model.get_memory_footprint())  # type: ignore[no-untyped-call]

    @property
    def attention(self) -> str:
        """Attention backend, such as "sdpa"."""
        return backend_of(self.model)

    def synchronize(self) -> None:
        """Wait until the device has finished, so that clocks tell the truth."""
        synchronize(self.device)
