"""Manual: budgets given layer by layer, for people who want to beat the methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dynamickv.methods.base import ScoredMethod
from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.parameters import require_integer
from dynamickv.methods.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Manual(ScoredMethod):
    """Score like SnapKV; keep `budgets[layer]` tokens in each layer, observation window included.

    Without budgets every layer keeps `capacity`; with them capacity is their mean, rounded down.
    """

    name: ClassVar[str] = "Manual"
    capabilities: ClassVar[Capabilities] = replace(
        ScoredMethod.capabilities, layer_budgets=True, decoding=False
    )
    capacity: int = 0
    budgets: Sequence[int] = ()
    """Prompt tokens kept per layer and head, one number per layer."""

    def __post_init__(self) -> None:
        if isinstance(self.budgets, str) or not isinstance(self.budgets, Sequence):
            raise ValueError(f"budgets must be a list of tokens per layer, got {self.budgets!r}")
        object.__setattr__(self, "budgets", tuple(self.budgets))
        require_integer("window_size", self.window_size, 1, "token")
        for layer, budget in enumerate(self.budgets):
            require_integer(f"budgets[{layer}]", budget, self.window_size, "token")
        if self.budgets:
            object.__setattr__(self, "capacity", sum(self.budgets) // len(self.budgets))
        elif self.capacity == 0 and not isinstance(self.capacity, bool):
            raise ValueError("Manual needs budgets, one number of tokens per layer; give a list")
        ScoredMethod.__post_init__(self)

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters by name, JSON-ready."""
        return {**super().parameters, "budgets": list(self.budgets)}

    @property
    def least_capacity(self) -> int:
        """Given budgets may be the window alone."""
        return self.window_size if self.budgets else self.window_size + 1

    def fits(self, prompt_length: int) -> bool:
        """A prompt that every layer has room for is kept whole."""
        return prompt_length <= min(self.budgets or (self.capacity,))

    def start(self, num_layers: int) -> Selection:
        """Check that there is one budget per layer."""
        if self.budgets and len(self.budgets) != num_layers:
            raise ValueError(
                f"budgets has {len(self.budgets)} numbers and the model {num_layers} layers; "
                "give one number per layer"
            )
        return ScoredMethod.start(self, num_layers)

    def first_budget(self, layer: int, num_layers: int, prefix_length: int) -> int:
        """The given budget without the window."""
        return (self.budgets[layer] if self.budgets else self.capacity) - self.window_size
