#!/usr/bin/env bash
# A completion, a chat, and a chat as a stream, with nothing but curl. Start a server first:
#   make serve
#   examples/curl.sh [URL]
# A server that wants a key gets it from PAGEDSERVE_API_KEY.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
key=${PAGEDSERVE_API_KEY:-none}

post() {
    curl --fail-with-body --silent --show-error --no-buffer "$url/v1/$1" \
        -H "Authorization: Bearer $key" -H "Content-Type: application/json" -d "$2"
    echo
}

model=$(curl --fail --silent --show-error "$url/v1/models" -H "Authorization: Bearer $key" |
    grep -o '"id": *"[^"]*"' | head -n 1 | cut -d '"' -f 4)

post completions '{
    "model": "'"$model"'", "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0
}'

post chat/completions '{
    "model": "'"$model"'", "max_tokens": 32, "temperature": 0,
    "messages": [{"role": "user", "content": "What is 17 + 25?"}]
}'

post chat/completions '{
    "model": "'"$model"'", "max_tokens": 64, "seed": 7,
    "stream": true, "stream_options": {"include_usage": true},
    "messages": [{"role": "user", "content": "Tell me a short story."}]
}'
