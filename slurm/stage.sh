# shellcheck shell=bash
# Sourced by the .sbatch files: one stage of a run on all nodes of the job, which Slurm may stop and requeue.
#
# Variables: RECIPE (a name in rlhf/recipes, or a folder), RUN (name of the run). Optional: RLHF_HOME (the repository;
# default: the folder of submission), RUNS_DIR (runs), RLHF_VENV (.venv), RLHF_ENGINE (a name in accelerate_configs),
# RLHF_PROCESSES (per node; default: its GPUs, or 1), RLHF_FLAGS (more flags for the script).

set -u
# told_to_stop: what USR1 does. If the training has not started yet, run_stage passes the signal on once it has.
told_to_stop() {
    told=1
    echo "$(date +%FT%T) ${stage:-job}: told to stop"
    [ -z "$step" ] || pass_on "$step" &
}

# pass_on PID: repeat the signal to the training until srun, PID, has ended. A signal before training starts is lost.
pass_on() {
    while kill -0 "$1" 2>/dev/null; do
        scancel --signal=USR1 "$SLURM_JOB_ID.0"
        sleep 5
    done
}

# From here on, or Slurm's warning would end a job that has only just begun.
stage="" step="" told=0
trap told_to_stop USR1

cd "${RLHF_HOME:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
: "${RECIPE:?expected a recipe in the environment: RECIPE=gpt2-medium}" "${RUN:?expected the name of a run: RUN=study}"
[[ "$RUN" =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] || { # it becomes a folder and part of srun's options
    printf 'error: RUN: expected letters, digits, . _ and -, found %q\n' "$RUN" >&2
    exit 2
}
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || RUN="$RUN-seed$SLURM_ARRAY_TASK_ID"
export RUN RUNS_DIR="${RUNS_DIR:-runs}"
# shellcheck disable=SC1091  # made by scripts/environment.sh
source "${RLHF_VENV:-.venv}/bin/activate" || exit 2
# plan STAGE: its line of `rlhf.cli.plan`: name, state, command, seed, needs, config.
plan() {
    python -m rlhf.cli.plan --recipe "$RECIPE" --run "$RUN" --runs_dir "$RUNS_DIR" --stage "$1" \
        ${SLURM_ARRAY_TASK_ID:+--seed "$SLURM_ARRAY_TASK_ID"}
}

# run_stage STAGE [SCRIPT]: run the stage on all nodes, with its own script or another one. On USR1 (Slurm's warning
# before the time limit, or a preemption) it finishes its step and saves; the job then requeues itself.
run_stage() {
    local line state command seed code
    stage=$1
    line="$(plan "$stage")" || exit 2
    read -r _ state command seed _ CONFIG <<<"$line"
    if [ "$state" = "done" ]; then
        echo "$stage: already done"
        exit 0
    fi
    mkdir -p "$RUNS_DIR/$RUN/logs"
    PROCESSES="${RLHF_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}"
    [[ "$PROCESSES" =~ ^[0-9]+$ ]] || { # bash arithmetic would execute commands in it
        printf 'error: RLHF_PROCESSES: expected a number, found %q\n' "$PROCESSES" >&2
        exit 2
    }
    WORLD=$((SLURM_JOB_NUM_NODES * PROCESSES))
    MASTER="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node have different ids
    SCRIPT="${2:-scripts/$command.py}" SEED="${seed#-}" ENGINE="${RLHF_ENGINE:-}"
    LOGS="$RUNS_DIR/$RUN/logs/$stage-$SLURM_JOB_ID"
    export LOGS PROCESSES WORLD MASTER PORT SCRIPT CONFIG SEED ENGINE RLHF_WORLD_SIZE="$WORLD"
    echo "$(date +%FT%T) $stage of $RUN: $SLURM_JOB_NUM_NODES nodes x $PROCESSES processes, restart ${SLURM_RESTART_COUNT:-0}"
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "${SLURM_CPUS_ON_NODE:-1000}" -lt $((2 * PROCESSES)) ]; then
        echo "$stage: $SLURM_CPUS_ON_NODE CPUs for $PROCESSES processes: slow; sbatch --cpus-per-task=$((8 * PROCESSES))"
    fi
    # In the background, or bash would run the trap only after srun has ended.
    # From Slurm 22.05 on, srun ignores sbatch's --cpus-per-task and would bind the node's processes to one CPU.
    # --export: the variables above, and NCCL's and gloo's, reach it even if sbatch was told to export few.
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        --cpu-bind=none --export=ALL --output="$LOGS-node%n.log" --open-mode=append bash slurm/node.sh &
    step=$!
    [ "$told" = 0 ] || pass_on "$step" &
    wait "$step"
    code=$?
    while [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do # the trap interrupted the wait
        wait "$step"
        code=$?
    done
    read -r _ state _ <<<"$(plan "$stage")"
    echo "$(date +%FT%T) $stage: $state, code $code"
    if [ "$code" = 0 ] && [ "$state" = "stopped" ]; then
        [ "$told" = 1 ] || echo "$stage: stopped without a signal to this job"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 600 # Slurm ends this job; without the sleep it would complete first
    fi
    exit "$code"
}
