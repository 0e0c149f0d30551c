#!/bin/bash
# One task a node: start this node's processes. Run by srun from stage.sh, which exports what is used here.
# USR1 reaches every process of the step. The launcher would die of it, so it is ignored from here on; the training
# script installs its own handler.
trap '' USR1
flags=(--config "$CONFIG" --run "$RUN" --runs_dir "$RUNS_DIR")
[ -z "$SEED" ] || flags+=(--seed "$SEED")
# shellcheck disable=SC2206  # words on purpose
flags+=(${RLHF_FLAGS:-})
if [ "$WORLD" = 1 ]; then
    case "$ENGINE" in
    cpu | multi_cpu) export ACCELERATE_USE_CPU=true ;;
    esac
    case "$ENGINE" in # these are for one process what it is without a launcher
    "" | cpu | multi_cpu | single_gpu | multi_gpu) exec python "$SCRIPT" "${flags[@]}" ;;
    esac
fi
# The launcher would give each process one thread, which is few for optimizer states in main memory (zero3_offload).
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || [ "$SLURM_CPUS_PER_TASK" -lt "$PROCESSES" ] ||
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / PROCESSES))}"
# An engine's file says what it is; --multi_gpu beside it would win. Slurm is the launcher of DeepSpeed's nodes, too.
engine=(--multi_gpu)
[ -z "$ENGINE" ] || engine=(--config_file "accelerate_configs/$ENGINE.yaml" --deepspeed_multinode_launcher standard)
# SLURM_NODEID is this node's own only here, inside the task. What each rank says goes to a folder of its own, too:
# LOGS-nodeN/*/attempt_0/LOCAL_RANK/stdout.log and stderr.log.
exec python -m accelerate.commands.launch "${engine[@]}" --num_machines "$SLURM_JOB_NUM_NODES" \
    --num_processes "$WORLD" --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER" --main_process_port "$PORT" \
    --log_dir "$LOGS-node$SLURM_NODEID" --tee 3 --mixed_precision no --dynamo_backend no "$SCRIPT" "${flags[@]}"
