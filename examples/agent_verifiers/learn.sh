#!/bin/sh
# The measured run of README.md: examples/agent_verifiers/learn.sh SEED FOLDER MODEL [override of the RL run ...]
# VERIFIERS_PYTHON names the interpreter of verifiers' virtual environment, which has uv beside it.
set -eu
seed=$1 folder=$2 model=$3 python=${PYTHON:-python} port=${PORT:-8100}
shift 3
here=$(dirname "$0")
export MEGATRON_RL_GATEWAY_KEY="${MEGATRON_RL_GATEWAY_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}"
mkdir -p "$folder"
"$VERIFIERS_PYTHON" "$here/server.py" problems backwards_v1 > "$folder/problems.jsonl"
PATH="$(dirname "$VERIFIERS_PYTHON"):$PATH" PYTHONPATH= \
    "$VERIFIERS_PYTHON" "$here/server.py" play backwards_v1 "http://127.0.0.1:$port" 6 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
"$python" -m megatron_rl.cli rl experiment=quickstart run.name=verifiers_rl "run.dir=$folder/rl" "run.seed=$seed" \
    "model.path=$model" data.source=jsonl "data.path=$folder/problems.jsonl" 'observe.metrics=[]' run.steps=12 \
    optimizer.lr=1e-3 algo.phi=128 rollout.prompts_per_step=8 rollout.responses_per_prompt=4 eval.problems=32 \
    eval.every_steps=0 \
    rollout.agent.kind=http "rollout.agent.port=$port" "$@"
wait $server
