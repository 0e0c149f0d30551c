"""Every path of the project as a short run of tiny models on the pretend CUDA device.

Each scenario takes a folder to write to and options, and returns facts about itself, all fit for JSON.
"""

import json
from pathlib import Path
from typing import Any

import counts
import tiny
import tiny_ppo
import torch
from accelerate import PartialState
from counts import labelled, phase

import rlhf.evaluation.responses
import rlhf.ppo.learner
import rlhf.ppo.trainer
import rlhf.reward.trainer
import rlhf.runtime.hardware
from rlhf.config import EvaluationConfig, RewardStageConfig
from rlhf.data.chat import give_distinct_pad, prepare_tokenizer
from rlhf.data.oasst import Prompt
from rlhf.models.actor_critic import base_of
from rlhf.ppo.actor import Actor
from rlhf.ppo.learner import Learner
from rlhf.ppo.trainer import PPOTrainer

# What counts under which label; the innermost does. What is left of a run is "train", "evaluate", ...
PHASES = (
    (Actor, "sample", "sample"),
    (Actor, "rollout", "rollout"),
    (Actor, "score", "score"),
    (Learner, "learn", "learn, rest"),
    (Learner, "_backward", "micro-batch"),
    (PPOTrainer, "judge", "judge"),
    (PPOTrainer, "record", "record"),
    (PPOTrainer, "_save", "checkpoint"),
    (rlhf.runtime.hardware, "_fastest", "hardware"),
)
EVALUATION = [{"prompt": "hello"}, {"prompt": "good morning to you"}, {"prompt": "x"}]
PPO = {"family": "gpt2", "use_cpu": False, "bf16": True, "response_length": 12, "max_steps": 1}


def prepare() -> None:
    """Once, before anything is run."""
    for owner, name, label in PHASES:
        labelled(owner, name, label)
    hardware = rlhf.runtime.hardware  # its figures mean nothing here, and take seconds
    hardware._SIZES["gpu"], hardware._COPIED["gpu"], hardware._SPENT = (64,), 2**10, 0


def deepen(layers: int) -> None:
    """Tiny models get so many layers."""
    for name in ("_gpt2_config", "_llama_config"):
        make = getattr(tiny, name)

        def deeper(*args: Any, make: Any = make) -> Any:
            config = make(*args)
            config.num_hidden_layers = layers
            return config

        setattr(tiny, name, deeper)


def trainer(folder: Path, layers: int | None = None, **options: Any) -> PPOTrainer:
    """Of tiny models, on the device. layers: of all models."""
    if layers is not None:
        deepen(layers)
    run = tiny_ppo.trainer(folder, **PPO | options)
    base_of(run.roles.trained.policy).register_forward_hook(_count_decoded)
    return run


def _count_decoded(*_: Any) -> None:
    if counts.now().phase == "sample":
        counts.now().call("decoded token")


def ppo(folder: Path, save: bool = True, **options: Any) -> dict[str, Any]:
    """A PPO run, with its model saved at the end."""
    run = trainer(folder, **options)
    with phase("train"):
        run.train()
    if save:
        with phase("save"):
            run.save_model()
    return facts(run)


def facts(run: PPOTrainer) -> dict[str, Any]:
    """The last row of metrics, without what the clock said, and what is in the folder."""
    rows = [row for row in run.state.log_history if "objective/kl" in row]
    return {
        "metrics": tiny_ppo.timeless(rows[-1]) if rows else {},
        "steps": run.state.global_step,
        "files": sorted(path.name for path in run.folder.iterdir()),
    }


def length(prompts: Any, completions: Any, **_: Any) -> list[float]:
    """A reward function."""
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def own_reference(folder: Path, **options: Any) -> dict[str, Any]:
    return ppo(folder, given={"ref_model": tiny.gpt2(4)}, **options)


def own_value_model(folder: Path, **options: Any) -> dict[str, Any]:
    return ppo(folder, given={"value_model": tiny.gpt2_reward(6)}, **options)


def function(folder: Path, **options: Any) -> dict[str, Any]:
    return ppo(folder, reward=length, **options)


def other_family(folder: Path, **options: Any) -> dict[str, Any]:
    """A Llama policy and a GPT-2 reward model, which reads the text by its own tokenizer."""
    given = {"reward_processing_classes": prepare_tokenizer(tiny.gpt2_tokenizer())}
    return ppo(folder, family="llama", reward=tiny.gpt2_reward(), given=given, **options)


def two_rewards(folder: Path, **options: Any) -> dict[str, Any]:
    """A model that the critic does not start from, and a function, weighted."""
    given = {"reward_model": [tiny.gpt2_reward(), length, tiny.gpt2_reward(8)]}
    return ppo(folder, given=given, reward_weights=[1.0, 0.1, 0.5], **options)


def evaluating(folder: Path, **options: Any) -> dict[str, Any]:
    given = {"eval_dataset": EVALUATION}
    run = trainer(folder, given=given, eval_strategy="steps", eval_steps=1, eval_on_start=True, **options)
    with phase("train"):
        run.train()
    with phase("completions"):
        run.generate_completions()
    return facts(run)


def resuming(folder: Path, **options: Any) -> dict[str, Any]:
    """Two steps and a checkpoint of each, then a third one in a new trainer."""
    options = {"save_strategy": "steps", "save_steps": 1} | options
    with phase("train"):
        trainer(folder, max_steps=2, **options).train()
    again = trainer(folder, max_steps=3, **options)
    with phase("resume"):
        again.train(resume_from_checkpoint=True)
    return facts(again)


def own_loop(folder: Path, **options: Any) -> dict[str, Any]:
    run = trainer(folder, rows=None, **options)
    prompts = ["hello", "you there"]
    with phase("train"):
        responses = run.generate(prompts)
        run.step(prompts, responses, [1.0, torch.tensor(2.0)])
    return facts(run)


def not_finite_score(folder: Path, **options: Any) -> dict[str, Any]:
    """A step whose rollout is left out."""

    def broken(completions: Any, **_: Any) -> list[float]:
        return [float("nan") if i == 1 else 1.0 for i in range(len(completions))]

    return ppo(folder, reward=broken, **options)


def not_finite_loss(folder: Path, **options: Any) -> dict[str, Any]:
    """An update that is left out."""
    loss, calls = rlhf.ppo.learner.policy_loss, []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == 1 else 1)

    rlhf.ppo.learner.policy_loss = broken
    return ppo(folder, **options)


def callbacks(folder: Path, **options: Any) -> dict[str, Any]:
    """One that looks at models and optimizer, as users' own do."""
    from transformers import TrainerCallback

    class Norms(TrainerCallback):
        seen: list[float] = []

        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            self.seen.append(float(torch.nn.utils.get_total_norm(grads)))

    return ppo(folder, given={"callbacks": [Norms]}, **options) | {"norms": Norms.seen}


def _reward_rows() -> list[dict[str, list[int]]]:
    return [{"chosen_ids": [5 + i, 7, 9, 0], "rejected_ids": [5 + i, 8, 11, 4, 0]} for i in range(8)]


def reward(folder: Path, layers: int | None = None, resume: bool = False, **options: Any) -> dict[str, Any]:
    """The reward stage: before, training, after, saving. resume: it stops half way and goes on."""
    if layers is not None:
        deepen(layers)
    tokenizer = prepare_tokenizer(tiny.gpt2_tokenizer())
    give_distinct_pad(tokenizer)
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": True,
        "use_cpu": False,
    }
    rows = _reward_rows()
    ends = [1, 2] if resume else [2]
    for end in ends:
        args = RewardStageConfig(**settings | options | {"max_steps": end})
        model = tiny.gpt2_reward()
        with phase("before"):
            rlhf.reward.trainer.evaluate_pairs(model.to(PartialState().device), rows, args)
        with phase("train"):
            run, _ = rlhf.reward.trainer.train_reward_model(model, tokenizer, rows, rows[:4], args)
    with phase("after"):
        found = rlhf.reward.trainer.evaluate_pairs(model, rows, args)
    with phase("save"):
        run.save_model(str(folder))
    return {"loss": found["loss"], "steps": run.state.global_step}


def evaluation(folder: Path, family: str = "gpt2") -> dict[str, Any]:
    """evaluate.py's scoring: KL to the base, a second reward model, one of another tokenizer family."""
    make_tokenizer, make_policy, make_reward = tiny_ppo.FAMILIES[family]
    tokenizer, device = prepare_tokenizer(make_tokenizer()), PartialState().device
    gold = tiny.gpt2_reward(9)
    if family != "gpt2":
        gold.config._name_or_path = str(_saved(folder / "gold", gold, tiny.gpt2_tokenizer()))
    prompts = [Prompt(prompt_id=str(i), tree_id=str(i), text="hi " * (i + 1)) for i in range(5)]
    config = EvaluationConfig(base_model="unused", eval_response_length=8, eval_batch_size=3)
    models = [make_policy(), make_reward(), make_policy(3), gold]
    policy, judge, base, gold = (model.to(device) for model in models)
    stop = [tokenizer.eos_token_id]
    with phase("evaluate"):
        rows = rlhf.evaluation.responses.respond("x", policy, tokenizer, judge, prompts, config, stop, base, gold)
    return {"rows": rows}


def comparison(folder: Path) -> dict[str, Any]:
    """compare.py, from a run's folder to what it prints."""
    import compare
    from rlhf.runtime.run_folder import write_json
    from dataclasses import asdict

    base = _saved(folder / "base", tiny.gpt2(), tiny.gpt2_tokenizer())
    judge = _saved(folder / "judge", tiny.gpt2_reward(), tiny.gpt2_tokenizer())
    config = EvaluationConfig(base_model=str(base), reward_model_path=str(judge), eval_response_length=8)
    (folder / "runs" / "x" / "evaluation").mkdir(parents=True)
    run = {"config": asdict(config), "model_paths": {"base": str(base)}, "status": "done"}
    write_json(folder / "runs" / "x" / "evaluation" / "run.json", run)
    import sys

    sys.argv = ["compare.py", "--run", "x", "--runs_dir", str(folder / "runs"), "--prompt", "hello there"]
    with phase("compare"):
        compare.main()
    return {}


def quantised(folder: Path, bits: int = 4, **options: Any) -> dict[str, Any]:
    """Adapters on a base of 4 or 8 bits, loaded as scripts load it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    make = tiny._llama_config

    def wider() -> Any:  # whole blocks of 64 weights share a scale
        config = make()
        config.hidden_size, config.intermediate_size = 64, 128
        return config

    tiny._llama_config = wider
    kinds = {"model": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
    made = {"model": tiny.llama(), "reward_model": tiny.llama_reward()}
    given = {}
    quantised = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    for name, kind in kinds.items():
        made[name].save_pretrained(folder / name)
        given[name] = kind.from_pretrained(folder / name, quantization_config=quantised)
    devices = {name: sorted({p.device.type for p in model.parameters()}) for name, model in given.items()}
    print(devices)
    return ppo(folder, family="llama", lora=True, given=given, **options) | {"devices": devices}


def _saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SCENARIOS = {
    "ppo": ppo,
    "own_reference": own_reference,
    "own_value_model": own_value_model,
    "function": function,
    "other_family": other_family,
    "two_rewards": two_rewards,
    "evaluating": evaluating,
    "resuming": resuming,
    "own_loop": own_loop,
    "not_finite_score": not_finite_score,
    "not_finite_loss": not_finite_loss,
    "callbacks": callbacks,
    "quantised": quantised,
    "reward": reward,
    "evaluation": evaluation,
    "comparison": comparison,
}
