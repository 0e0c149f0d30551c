#!/bin/bash
# Submit all stages of a run as one chain of jobs, full and LoRA side by side, and print the job ids.
#
#   slurm/pipeline.sh --recipe gpt2-medium --run study [--seeds 1,2,3] [options of sbatch for every stage]
#   e.g. --account=lab --partition=gpu --nodes=2 --gres=gpu:4 --time=08:00:00
#
# A node gets 8 CPUs for each of its GPUs (RLHF_CPUS_PER_GPU), unless the options say --cpus-per-task. Jobs are told to
# stop RLHF_SIGNAL_SECONDS, 180 when not set, before their time limit: more than a step and a checkpoint take.
#
# A stage that is done is left out. A stage that fails cancels those that wait for it; submitting again goes on with it.
# --seeds runs every stage as a job array, one task a seed, in runs RUN-seed1, RUN-seed2, ...
set -eu
export RLHF_HOME="${RLHF_HOME:-$(cd "$(dirname "$0")/.." && pwd)}" RUNS_DIR="${RUNS_DIR:-runs}"
cd "$RLHF_HOME"
seeds="" options=()
while [ $# -gt 0 ]; do
    case "$1" in
    --recipe) RECIPE="$2" && shift 2 ;;
    --run) RUN="$2" && shift 2 ;;
    --seeds) seeds="$2" && shift 2 ;;
    *) options+=("$1") && shift ;;
    esac
done
signal="${RLHF_SIGNAL_SECONDS:-180}" cpus="${RLHF_CPUS_PER_GPU:-8}"
for name in signal cpus; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || {
        printf 'error: %s: expected a number of at least 1, found %q\n' \
            "$([ "$name" = signal ] && echo RLHF_SIGNAL_SECONDS || echo RLHF_CPUS_PER_GPU)" "${!name}" >&2
        exit 2
    }
done
# What the options say comes after these, and wins.
defaults=(--signal="B:USR1@$signal")
said=" ${options[*]-} ${SBATCH_GRES:+--gres=$SBATCH_GRES} ${SBATCH_GPUS_PER_NODE:+--gpus-per-node=$SBATCH_GPUS_PER_NODE} "
if [[ "$said" =~ \ --gpus-per-(node|task)[=\ ]([^\ ]+) || "$said" =~ \ --gres[=\ ]([^\ ]*,)?gpu:?([^,\ \(]*) ]]; then
    gpus="${BASH_REMATCH[2]##*:}" # behind the type, where there is one
    gpus="${gpus:-1}"
    [[ ! "$gpus" =~ ^[0-9]+$ || "$said" =~ \ (-c|--cpus-per-task|--cpus-per-gpu) || -n "${SBATCH_CPUS_PER_GPU:-}" ]] ||
        defaults+=(--cpus-per-task="$((cpus * gpus))")
fi
: "${RECIPE:?expected --recipe NAME}" "${RUN:?expected --run NAME}"
# The name becomes a folder and part of sbatch's options, where % stands for other things.
[[ "$RUN" =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] || {
    printf 'error: run: expected letters, digits, . _ and -, found %q\n' "$RUN" >&2
    exit 2
}
[[ "$seeds" =~ ^[0-9,:%-]*$ ]] || {
    printf 'error: seeds: expected numbers as sbatch --array takes them, found %q\n' "$seeds" >&2
    exit 2
}
export RECIPE RUN
folder="rlhf/recipes/$RECIPE"
[ -d "$folder" ] || folder="$RECIPE"
[ -d "$folder" ] || {
    echo "error: recipe: expected a folder in rlhf/recipes, or a path, found $RECIPE" >&2
    exit 2
}
# sbatch starts no job whose log folder is missing, and says nothing.
logs="$RUNS_DIR/$RUN/logs"
mkdir -p "$logs"

is_done() {
    [ -z "$seeds" ] && grep -qs '"status": "done"' "$RUNS_DIR/$RUN/$1/run.json"
}

# submit FILE STAGE AFTER...: prints the job id, or nothing for a stage that is done.
submit() {
    local file=$1 stage=$2 after="" log="$logs/%x-%j.log" kind=afterok more=() id
    shift 2
    if is_done "$stage"; then
        echo "$stage: done already" >&2
        return
    fi
    # With seeds, each task waits for its own seed's task only.
    [ -z "$seeds" ] || { kind=aftercorr more=(--array="$seeds") log="$logs/%x-%A_%a.log"; }
    for id in "$@"; do after="$after:$id"; done
    [ -z "$after" ] || more+=(--dependency="$kind$after" --kill-on-invalid-dep=yes)
    more=(${options[@]+"${options[@]}"} ${more[@]+"${more[@]}"})
    if [ "$stage" = report ]; then more+=(--nodes=1 --gres=none); else more=("${defaults[@]}" ${more[@]+"${more[@]}"}); fi
    id=$(sbatch --parsable --output="$log" "${more[@]}" "slurm/$file.sbatch") || exit 1
    echo "$stage: job ${id%%;*}" >&2
    echo "${id%%;*}"
}

# shellcheck disable=SC2046,SC2086  # no id is no word
{
    reward=$(submit reward reward) gold=""
    # Beside the rest: the second reward model, where the recipe has one.
    [ ! -f "$folder/reward_gold.yaml" ] || gold=$(submit reward_gold reward_gold)
    full=$(submit ppo_full ppo_full $reward)
    lora=$(submit ppo_lora ppo_lora $reward)
    evaluation=$(submit evaluate evaluation $full $lora $gold)
    report=$(submit report report $evaluation)
}
echo "submitted: ${reward:--} ${gold:--} ${full:--} ${lora:--} ${evaluation:--} ${report:--}"
