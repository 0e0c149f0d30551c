#!/bin/bash
# One task per node: start this node's processes. srun runs it from stage.sh, which exports its variables.
# USR1 reaches every process of the step. It would kill the launcher, so it is ignored from here on; the training
# script installs its own handler.
trap '' USR1
flags=(--config "$CONFIG" --run "$RUN" --runs_dir "$RUNS_DIR")
[ -z "$SEED" ] || flags+=(--seed "$SEED")
# shellcheck disable=SC2206  # split into words on purpose
flags+=(${RLHF_FLAGS:-})
if [ "$WORLD" = 1 ]; then
    case "$ENGINE" in
    cpu | multi_cpu) export ACCELERATE_USE_CPU=true ;;
    esac
    case "$ENGINE" in # with one process these need no launcher
    "" | cpu | multi_cpu | single_gpu | multi_gpu) exec python "$SCRIPT" "${flags[@]}" ;;
    esac
fi
# The launcher's default is one thread per process: too few for an optimizer in main memory (zero3_offload).
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || [ "$SLURM_CPUS_PER_TASK" -lt "$PROCESSES" ] ||
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / PROCESSES))}"
# --multi_gpu would override an engine's file. Under Slurm, DeepSpeed must not start the other nodes itself.
engine=(--multi_gpu)
[ -z "$ENGINE" ] || engine=(--config_file "accelerate_configs/$ENGINE.yaml" --deepspeed_multinode_launcher standard)
# SLURM_NODEID is set per node only here, inside the task. Each rank's output also goes to a folder per rank:
# LOGS-nodeN/*/attempt_0/LOCAL_RANK/stdout.log and stderr.log.
export RLHF_LAUNCHER=slurm # its --mixed_precision no leaves the precision to the recipe and the hardware
exec python -m accelerate.commands.launch "${engine[@]}" --num_machines "$SLURM_JOB_NUM_NODES" \
    --num_processes "$WORLD" --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER" --main_process_port "$PORT" \
    --log_dir "$LOGS-node$SLURM_NODEID" --tee 3 --mixed_precision no --dynamo_backend no "$SCRIPT" "${flags[@]}"
