"""The orchestrator's commands, in the order in which a run sees them, and the trainer's answers.

    start      config, checkpoint (a folder or None), stage, schedule_updates, reset_optimizer, written (a file of
               run.dir that every rank must see)
               -> steps_done, probe_tokens
    publish    version, urls, layouts       -> failures by URL, bytes, digests by layout, reference, free_bytes
    make_room  urls                         -> {}
    train      step                         -> results of its optimiser steps, seconds by phase
    save       step, loop_state             -> {}
    finish     export_hf                    -> {}, and the ranks end

    GET  /command/N           the N-th command of this trainer, counted from 0; 204 when there is none for POLL_S
    POST /done/N              its outcome
    GET  /step/S/shard/D      what data-parallel rank D trains on in step S (shard.py); 503 before it is offered
    GET  /state/S             the orchestrator's state after S steps (body.py)
    POST /heartbeat/R         rank R lives
    GET  /health              the orchestrator lives

Every request carries the key of the run, and every request may be repeated. The trainer counts commands. An
orchestrator that was started again goes on from the first number that it is asked for, and gives the commands that it
needs. The trainer does not carry out again what it has done already (trainer/main.py).
"""

POLL_S = 5.0
