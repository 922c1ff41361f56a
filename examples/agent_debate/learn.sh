#!/bin/sh
# The measured run of README.md: examples/agent_debate/learn.sh SEED FOLDER [override of the RL run ...]
set -eu
seed=$1 folder=$2 python=${PYTHON:-python}
shift 2
if [ ! -d "$folder/sft/hf" ]; then
    "$python" -m examples.agent_debate.debate "$folder" "$seed"
    "$python" -m megatron_rl.cli sft experiment=quickstart_sft run.name=debate_sft "run.dir=$folder/sft" \
        "run.seed=$seed" "model.path=$folder/init" data.source=jsonl "data.path=$folder/sft.jsonl" data.split=all \
        data.response_key=response data.answer_key=response sft.examples=3000 sft.batch_size=32 sft.epochs=8 \
        sft.schedule_epochs=8 parallel=single
fi
"$python" -m megatron_rl.cli rl experiment=quickstart run.name=debate_rl "run.dir=$folder/rl" "run.seed=$seed" \
    "model.path=$folder/sft/hf" data.source=jsonl "data.path=$folder/problems.jsonl" 'observe.metrics=[]' \
    run.steps=20 algo.phi=1024 rollout.prompts_per_step=16 eval.problems=128 eval.every_steps=10 \
    rollout.agent.kind=python rollout.agent.function=examples.agent_debate.debate.debate \
    rollout.agent.sequences=individual "$@"
