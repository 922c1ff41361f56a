#!/bin/sh
# The measured run of README.md: examples/agent_calculator/learn.sh SEED FOLDER [override of the RL run ...]
# The model is made and fine-tuned once per folder. RUN names the folder of the RL run in it.
set -eu
seed=$1 folder=$2 python=${PYTHON:-python} run=${RUN:-rl}
shift 2
if [ ! -d "$folder/sft/hf" ]; then
    "$python" -m examples.agent_calculator.learn "$folder" "$seed"
    "$python" -m megatron_rl.cli sft experiment=quickstart_sft run.name=agent_sft "run.dir=$folder/sft" \
        "run.seed=$seed" "model.path=$folder/init" data.source=jsonl "data.path=$folder/sft.jsonl" data.split=all \
        data.response_key=response data.answer_key=response sft.examples=4000 sft.batch_size=32 sft.epochs=5 \
        sft.schedule_epochs=5 parallel=single
fi
"$python" -m megatron_rl.cli rl experiment=quickstart run.name=agent_rl "run.dir=$folder/$run" "run.seed=$seed" \
    "model.path=$folder/sft/hf" data.source=jsonl "data.path=$folder/problems.jsonl" 'observe.metrics=[]' \
    run.steps=30 algo.phi=1024 rollout.prompts_per_step=16 eval.problems=128 eval.every_steps=15 \
    rollout.agent.kind=python rollout.agent.function=examples.agent_calculator.learn.agent \
    rollout.agent.tool_call_parser=pythonic "$@"
