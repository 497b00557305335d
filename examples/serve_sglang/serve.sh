#!/bin/sh
# Serve a model with SGLang, prefill by bsfa:   sh examples/serve_sglang/serve.sh MODEL [more options of SGLang]
# Needs a Hopper GPU, `pip install sglang` and this package in one environment. BSFA_CONFIG may name another file.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
model=${1:?usage: serve.sh MODEL [options of "sglang serve"]}
shift
export BSFA_CONFIG="${BSFA_CONFIG:-$here/bsfa.toml}"
exec sglang serve --model-path "$model" \
    --prefill-attention-backend bsfa --decode-attention-backend fa3 --page-size 64 "$@"
