"""Which entries of transformers' mapping are counted apart, and which are well known."""

from __future__ import annotations

_ENCODER = "an encoder, which the mapping holds for use as a decoder"
_SEQ2SEQ = "the decoder of an encoder-decoder"
_SPEECH_OR_IMAGE = "not a text model"

APART: dict[str, str] = {
    **dict.fromkeys(
        [
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xlnet",
            "xmod",
        ],
        _ENCODER,
    ),
    **dict.fromkeys(
        [
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "trocr",
            "whisper",
        ],
        _SEQ2SEQ,
    ),
    **dict.fromkeys(["git", "moshi", "musicgen", "musicgen_melody"], _SPEECH_OR_IMAGE),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a draft head, which reads another model's keys and values",
    ),
}
"""By model type, why the entry is no decoder of text of its own."""

WRAPPERS: dict[str, str] = {
    "dots3_note": "dots3_note_text",
    "fuyu": "persimmon",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "got_ocr2": "qwen2",
    "moss_transcribe_diarize": "qwen3",
}
"""Models that read images or speech beside text, with the decoder inside, which is an entry of its
own: examined with text alone, and counted apart."""

POPULAR: tuple[str, ...] = tuple(
    [
        "llama",
        "mistral",
        "mixtral",
        "ministral3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "phi",
        "phi3",
        "phimoe",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "gpt_bigcode",
        "gpt_oss",
        "opt",
        "bloom",
        "falcon",
        "falcon_h1",
        "mpt",
        "stablelm",
        "starcoder2",
        "codegen",
        "cohere",
        "cohere2",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "deepseek_v2",
        "deepseek_v3",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "ernie4_5",
        "ernie4_5_moe",
        "smollm3",
        "exaone4",
        "seed_oss",
        "minimax_m2",
        "nemotron",
        "nemotron_h",
        "jamba",
        "bamba",
        "lfm2",
        "lfm2_moe",
        "kimi_linear",
        "llama4_text",
    ]
)
"""Well-known open families: those with the most downloads and runtimes, one model type for each
generation of layers."""
