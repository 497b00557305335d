#!/usr/bin/env bash
# Serve a model with vLLM and bsfa: examples/serve_vllm/serve.sh MODEL [options of vllm serve]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export BSFA_CONFIG=${BSFA_CONFIG:-$here/bsfa.toml}
exec vllm serve "$@" --attention-backend CUSTOM
