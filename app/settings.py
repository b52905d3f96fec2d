"""The methods' parameters that a visitor can set, in one table: the form's widgets, what is
checked, what travels to the engine and back, and the what-if panel all follow from it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import dynamickv as dkv

CAPACITIES = (8, 2048)
"""Bounds of a capacity that is typed; the slider starts where the what-if panel's does."""
DEFAULT_CAPACITY = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One parameter: its field in the form, and its control in the what-if panel."""

    name: str
    """As the methods call it."""
    label: str = ""
    """In the form."""
    info: str = ""
    choices: tuple[tuple[str, str], ...] = ()
    """(shown, value) where it is one of a few; otherwise it is a number."""
    whole: bool = False
    """Counts something: a whole number of at least 1."""
    what_if: dict[str, Any] = field(default_factory=dict)
    """Label, and min, max and step or options, in the what-if panel."""


ALL = (
    Setting(
        name="capacity",
        label="Capacity (tokens per layer)",
        whole=True,
        what_if={"label": "Capacity", "min": 16, "max": 2048, "step": 8},
    ),
    Setting(
        name="window_size",
        label="Window size",
        info="last tokens: they vote, and stay",
        whole=True,
        what_if={"label": "Window", "min": 1, "max": 64, "step": 1},
    ),
    Setting(
        name="kernel_size",
        label="Kernel size",
        info="pooling width, odd",
        whole=True,
        what_if={"label": "Kernel", "min": 1, "max": 31, "step": 2},
    ),
    Setting(
        name="pooling",
        label="Pooling",
        choices=(("max", "max"), ("avg", "avg")),
        what_if={"label": "Pooling", "options": ["max", "avg"]},
    ),
    Setting(
        name="granularity",
        label="One choice per",
        choices=(("KV head", "kv_head"), ("query head (larger cache)", "query_head")),
        what_if={"label": "One choice per", "options": ["kv_head", "query_head"]},
    ),
    Setting(
        name="r_max",
        label="r_max",
        info="first cap, times mean",
        what_if={"label": "r_max", "min": 1, "max": 30, "step": 0.5},
    ),
    Setting(
        name="update_interval",
        label="Update interval",
        info="DynamicKV, in layers",
        whole=True,
        what_if={"label": "Update interval", "min": 1, "max": 16, "step": 1},
    ),
    Setting(
        name="tau1",
        label="tau1",
        info="CAKE, of the entropy",
        what_if={"label": "tau1", "min": 0.2, "max": 3, "step": 0.1},
    ),
    Setting(
        name="tau2",
        label="tau2",
        info="CAKE, of the variance",
        what_if={"label": "tau2", "min": 0.2, "max": 3, "step": 0.1},
    ),
    Setting(
        name="gamma",
        label="gamma",
        info="CAKE, weight of the variance",
        what_if={"label": "gamma", "min": 10, "max": 400, "step": 10},
    ),
    Setting(
        name="alpha",
        label="alpha",
        info="LAVa, share every head keeps",
        what_if={"label": "alpha", "min": 0, "max": 1, "step": 0.05},
    ),
    # The what-if panel's alone.
    Setting(
        name="head_budgets",
        what_if={"label": "Heads' shares", "options": ["uniform", "adaptive"]},
    ),
)
LABELS = {
    **{setting.name: setting.label for setting in ALL if setting.label and "_" in setting.name},
    "max_new_tokens": "Longest answer",
    "decode_budget": "Decode budget",
    "decode_buffer": "Decode buffer",
}
"""How the form calls the numbers whose names are not words."""
SETTINGS = tuple(setting.name for setting in ALL if setting.label)
"""What the form can set."""
ADVANCED = tuple(setting for setting in ALL if setting.label and setting.name != "capacity")
"""Those behind the form's fold."""
WHAT_IF_SETTINGS = tuple(setting.name for setting in ALL if setting.what_if)
"""What the what-if panel can set."""
WHOLE = tuple(setting.name for setting in ALL if setting.whole)


def offered_methods() -> list[str]:
    """Registered methods that a form can ask for: those given layer by layer need a view."""
    return [
        name
        for name, method in dkv.METHODS.items()
        if "budgets" not in {f.name for f in fields(method)}
    ]


def method_settings() -> dict[str, list[str]]:
    """The names of every offered method's parameters, without those that it ignores."""
    return {
        name: [f.name for f in fields(dkv.METHODS[name]) if f.name not in dkv.METHODS[name].ignored]
        for name in offered_methods()
    }


def form_defaults() -> dict[str, Any]:
    """What the form shows before anyone touches it: DynamicKV's defaults, and of a setting that
    DynamicKV has not, that of the first offered method that has it.
    """
    found = defaults(dkv.DynamicKV)
    for method in offered_methods():
        own = defaults(dkv.METHODS[method])
        found |= {name: own[name] for name in SETTINGS if name in own and name not in found}
    return found


def defaults(method: type[dkv.CompressionMethod]) -> dict[str, Any]:
    """A method's parameters that have a default."""
    return {f.name: f.default for f in fields(method) if f.default is not MISSING}


def what_if_form() -> dict[str, Any]:
    """What the what-if panel offers: methods with the settings each takes, what drawn budgets leave
    open, how each setting is set, and the defaults.
    """
    shown = form_defaults()

    def offered(name: str, setting: str) -> bool:
        # Elsewhere the panel's default would not be the method's: LAVa parts heads unasked.
        own = defaults(dkv.METHODS[name])
        return setting not in own or setting not in shown or own[setting] == shown[setting]

    drawn = {f.name for f in fields(dkv.Manual)} - {"capacity"}
    return {
        "methods": {
            name: [s for s in WHAT_IF_SETTINGS if s in taken and offered(name, s)]
            for name, taken in method_settings().items()
            if name != "FullKV"
        },
        "drawn": [name for name in WHAT_IF_SETTINGS if name in drawn],
        "controls": {setting.name: setting.what_if for setting in ALL if setting.what_if},
        "defaults": shown,
    }
