"""What stands in the files of a run, as types for those who write and read them.

A JSON object is a TypedDict. Where a whole file may be missing, all its keys are optional: readers take {} for it.
Intervals are [low, high]. Numbers that may be nan or infinite are written as a number or as that word (`Number`).
"""

from typing import Any, Literal, NotRequired, TypedDict

Number = float | str  # "nan", "inf" and "-inf" are words, since JSON has no such numbers

Settings = dict[str, Any]  # every setting of a stage by its name, as its recipe and command line gave it

MetricsRow = dict[str, float]  # metrics.jsonl and eval_metrics.jsonl: metric -> value, and `step`

SKIPPED, WARNINGS = "skipped.jsonl", "warnings.jsonl"  # a training stage's files of SkippedUpdate and WarningRow


# run.json


class ModelSize(TypedDict):
    """A model of a run."""

    role: str  # policy, critic, reference, reward
    name: str
    parameters: int  # 0 where it shares another role's weights
    trainable: int


class BatchFacts(TypedDict):
    """How the batch of a step comes about."""

    global_batch_size: int
    processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int


class Precision(TypedDict):
    """What a stage computes in."""

    taken: Literal["fp32", "bf16", "fp16"]
    why: str | None  # None where the settings say it


class Basis(TypedDict):
    """What a stage's results rest on."""

    given: Settings  # the fields that may change a result and that its recipe or flags set
    flags: Settings  # those of them that flags set
    recipe: str | None  # SHA-256 of the recipe's file
    data: dict[str, str]  # local data file, folder or model -> SHA-256 of its content; of large weights, of a part
    stages: dict[str, str]  # earlier stage that was read -> its `id`


class RunFile(TypedDict, total=False):
    """STAGE/run.json; {} for a stage that never started."""

    stage: str
    id: str  # differs at each start, so that results can be told apart without a clock
    status: Literal["running", "done", "stopped", "failed", "clearing"]
    started: str  # ISO 8601, UTC
    ended: str | None
    seconds: float | None
    seed: int
    world_size: int
    device: str
    command: str
    versions: dict[str, str]  # package -> version
    git_commit: str | None
    config: Settings
    basis: Basis
    changed: list[str]  # names in config whose values differ from their defaults
    peak_memory: int  # bytes
    error: str  # of a stage that failed
    data: dict[str, dict[str, int]]  # "preferences" or "prompts" -> count -> rows
    # Report:
    files: dict[str, str]  # what it was made of -> SHA-256
    page: str  # the report's, by name
    title: str | None
    author: str | None
    # Training:
    batch: BatchFacts
    engine: str
    precision: Precision
    models: list[ModelSize]
    train_openings: list[str]  # reward: of the pairs that were trained on
    train_tree_ids: list[str]  # PPO: of the prompts that were trained on
    # Evaluation:
    model_paths: dict[str, str]  # base, full, lora -> path
    model_ids: dict[str, str | None]  # full, lora -> `id` of the stage that trained it
    judge_paths: dict[str, str | None]  # reward, gold -> path


# Checkpoints


class FileDigest(TypedDict):
    """One file of a folder with a manifest."""

    size: int  # bytes
    sha256: str


class Manifest(TypedDict):
    """manifest.json: path below the folder -> what was written there."""

    files: dict[str, FileDigest]


class LockOwner(TypedDict, total=False):
    """.lock: who writes in a folder; {} where nobody does."""

    host: str
    pid: int
    start: str | None  # when the process started
    job: str | None  # Slurm's
    restarts: int  # of the Slurm job


class CheckpointFacts(TypedDict):
    """What the files of a checkpoint depend on besides the settings."""

    processes: int
    engine: str


class WarningState(TypedDict):
    """What decides which warnings come next."""

    kls: list[float]
    entropies: list[float]
    since: dict[str, int]
    said: dict[str, tuple[int, float]]


class LossSums(TypedDict):
    """Reward training: sums over the updates taken, of the run and since the last row of metrics."""

    run: float
    run_updates: int
    recent: float
    recent_updates: int
    recent_skipped: int


class StepFile(CheckpointFacts):
    """step.json of a checkpoint."""

    step: int
    batch_size: int
    # PPO:
    train_dataset: NotRequired[str]  # number and digest of the prompts
    seed: NotRequired[int]
    data_seed: NotRequired[int]
    optim: NotRequired[str]  # the optimizer's class
    score_norm_samples: NotRequired[int]
    metric_for_best_model: NotRequired[str | None]
    kl_coef: NotRequired[float]  # as set; an adaptive one moves on from there
    frozen: NotRequired[dict[str, float]]  # norms of the weights that are never trained
    skipped_in_a_row: NotRequired[int]
    episode: NotRequired[int]
    warnings: NotRequired[WarningState]
    # Reward training:
    tokens: NotRequired[float]
    losses: NotRequired[LossSums]
    metrics: NotRequired[dict[str, list[float]]]


# Events while a run trains


class WarningRow(TypedDict):
    """A row of warnings.jsonl."""

    step: int
    kind: str
    since: int  # the step from which on it is so
    seen: str
    helps: str


# A prompt's response, or a pair, of an update that was skipped. No texts. In this form because `return` is a keyword.
SkippedRow = TypedDict(
    "SkippedRow",
    {
        "prompt_id": str,
        "pair_id": str,
        "not_finite": list[str],
        "scores": dict[str, Number],
        "prompt_tokens": int,
        "response_tokens": int,
        "chosen_tokens": int,
        "rejected_tokens": int,
        "score": Number,
        "logp": Number,  # of the response, nats
        "ref_logp": Number,
        "values": Number,
        "advantage": Number,  # the largest of its tokens by magnitude
        "return": Number,  # likewise
        "policy_loss": Number,  # of its micro-batch
        "value_loss": Number,
        "loss": Number,
    },
    total=False,
)


class SkippedUpdate(TypedDict):
    """A row of skipped.jsonl."""

    step: int
    not_finite: list[str]
    in_a_row: int
    grad_norm: NotRequired[Number | list[Number]]
    rows: list[SkippedRow]


class Completion(TypedDict):
    """A row of completions.jsonl; with `step`, of samples.jsonl."""

    prompt_id: str
    prompt: str
    response: str
    score: float


# evaluation/


class ResponseRow(TypedDict):
    """A row of responses.jsonl and rating_responses.jsonl."""

    prompt_id: str
    model: str  # base, full, lora
    prompt: str
    response: str
    score: float  # reward units
    prompt_length: int  # tokens
    response_length: int
    eos: bool
    kl: NotRequired[float]  # to the base model, nats
    gold_score: NotRequired[float]  # a second reward model's


class PairedGain(TypedDict):
    """One model against another on the same prompts."""

    before: float
    after: float
    gain: float
    interval: list[float]
    p_value: float
    win_rate: float  # a tie counts half
    wins: int
    ties: int
    losses: int
    detectable: NotRequired[float | None]  # the gain that so many prompts can show, with a power of 80 %
    prompts_needed: NotRequired[int | None]  # to show this gain


class GoldGain(PairedGain):
    """The same by a second reward model."""

    in_sd: float | None  # in standard deviations of its scores of the base model


class GainAtEqualLength(TypedDict):
    """The gain that is left where the response length does not change."""

    mean_difference: float  # tokens
    slope: float  # reward units per token
    slope_interval: list[float]
    gain: float
    interval: list[float]


class Validity(TypedDict):
    """What speaks for and against a gain."""

    length: GainAtEqualLength | None
    same_response: float  # share of the most common response
    empty: float  # share of empty responses
    gold: NotRequired[GoldGain]
    proxy_in_sd: NotRequired[float | None]
    agreement: NotRequired[float | None]  # rank correlation of both reward models' differences


class ModelSummary(TypedDict):
    """One model's responses."""

    mean_reward: float
    interval: list[float]
    response_length: float  # tokens
    eos_rate: float
    distinct_1: float | None
    distinct_2: float | None
    repetition: float
    length_correlation: float | None
    mean_gold: NotRequired[float]
    kl: NotRequired[float]  # nats per response
    kl_per_token: NotRequired[float]
    path: NotRequired[str]


class EndingEffect(TypedDict):
    """By how much responses that end score higher than truncated ones of the same model."""

    ended: int  # responses
    truncated: int
    difference: float  # reward units
    interval: list[float]


LengthGroup = TypedDict(
    "LengthGroup",
    {"from": int, "to": int, "n": int, "gains": dict[str, PairedGain]},  # prompts of so many tokens
)


class Evaluation(TypedDict, total=False):
    """evaluation/evaluation.json; {} where there is none. Gains are over the base model."""

    n_prompts: int
    confidence: float
    models: dict[str, ModelSummary]
    gains: dict[str, PairedGain]
    validity: dict[str, Validity]
    ending: EndingEffect | None
    length_groups: list[LengthGroup]


# reward/


class CalibrationBin(TypedDict):
    """Pairs of about the same confidence."""

    confidence: float
    accuracy: float
    n: int


class Calibration(TypedDict):
    """Whether P(first is better) is as often right as it says."""

    ece: float
    bins: list[CalibrationBin]


class Accuracy(TypedDict):
    """Of n pairs."""

    n: int
    accuracy: float
    interval: list[float]


class Baseline(Accuracy):
    """A rule instead of the reward model, and the two compared."""

    better: int  # pairs where only the reward model is right
    worse: int  # pairs where only the rule is right
    p_value: float


class Audit(TypedDict):
    """Where a reward model is right, and what else could explain it."""

    groups: dict[str, dict[str, Accuracy]]
    baselines: dict[str, Baseline]
    length_correlation: float | None
    leaked: dict[str, int]


class PairMetrics(TypedDict):
    """How well scores tell chosen from rejected responses."""

    n: int
    accuracy: float
    accuracy_interval: list[float]
    mean_margin: float
    labels: list[str]
    confusion_matrix: list[list[int]]
    classification_report: dict[str, Any]  # scikit-learn's
    calibration: Calibration


class SideScores(TypedDict):
    """Scores of both sides of the pairs, in their order."""

    chosen: list[float]
    rejected: list[float]


class ScoredPairs(PairMetrics):
    """The same with the loss and the scores themselves."""

    loss: float
    scores: SideScores


class PairFigures(TypedDict):
    """The main figures of a reward model on its test pairs."""

    loss: float
    accuracy: float
    mean_margin: float
    accuracy_interval: NotRequired[list[float]]


class BestStep(TypedDict):
    """The checkpoint that was kept."""

    step: int | None
    eval_loss: float | None


class RewardEvaluation(TypedDict, total=False):
    """reward/evaluation.json; {} where there is none. All but `before` is of the trained model."""

    split: str
    loss_type: str
    before: PairFigures
    after: PairFigures
    best: BestStep
    n: int
    labels: list[str]
    confusion_matrix: list[list[int]]
    classification_report: dict[str, Any]
    calibration: Calibration
    audit: Audit


# ratings/


class RatingItem(TypedDict):
    """One response on the sheet."""

    item_id: str
    group: int  # the screen that it is on
    repeat: bool  # whether its prompt comes for the second time
    prompt_id: str
    model: str
    prompt: str
    response: str


class RatingKey(TypedDict):
    """key.json: which model wrote what, in the sheet's order."""

    sheet_id: str
    items: list[RatingItem]


class RatedItem(TypedDict):
    """What a rater gave one response."""

    ratings: dict[str, int]  # criterion -> 1 to 5
    note: str


class Sheet(TypedDict):
    """RATER_ID.json: a rater's checked sheet."""

    sheet_id: str
    rater_id: str
    rater: str
    complete: bool
    items: dict[str, RatedItem]  # item_id -> what was given


class MeanRating(TypedDict):
    """Over raters and prompts."""

    mean: float
    interval: list[float]


class RatingComparison(TypedDict):
    """One model's ratings against another's."""

    wins: int
    ties: int
    losses: int
    preference: float
    preference_interval: list[float]
    difference: float  # points
    interval: list[float]
    p_value: float
    prompts_needed: int | None


class RatedPair(RatingComparison):
    """The same with their names."""

    of: str
    over: str


class Consistency(TypedDict):
    """Of n ratings that one rater gave twice."""

    n: int
    same: float
    mean_difference: float  # points


class RatingNote(TypedDict):
    """A rater's words on a response."""

    prompt_id: str
    model: str
    rater: str
    note: str


class Ratings(TypedDict, total=False):
    """ratings.json; {} where there is none."""

    sheet_id: str
    confidence: float
    criteria: dict[str, str]  # name -> title
    raters: list[str]
    incomplete: list[str]  # raters
    n_prompts: int
    models: dict[str, dict[str, MeanRating]]  # model -> "overall" or criterion -> mean
    pairs: list[RatedPair]
    agreement: dict[str, float | None]  # criterion -> Krippendorff's alpha
    consistency: dict[str, Consistency]  # rater -> own consistency
    notes: list[RatingNote]
    words: list[str]
