"""Every path of the project as a short run of tiny models on the pretend CUDA device.

Each scenario takes a folder to write to and options, and returns facts about itself, all fit for JSON.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import counts
import tiny
import tiny_ppo
import torch
from accelerate import PartialState
from counts import labelled, phase

import rlhf.evaluation.generate
import rlhf.perf.hardware
import rlhf.ppo.learner
import rlhf.ppo.metrics
import rlhf.ppo.trainer
import rlhf.reward.trainer
from rlhf.config import EvaluationConfig, RewardStageConfig
from rlhf.data.chat import give_distinct_pad, prepare_tokenizer
from rlhf.data.oasst import TextPrompt
from rlhf.ppo.checkpointing import Checkpoints
from rlhf.ppo.learner import Learner
from rlhf.ppo.rollout import RolloutCollector
from rlhf.ppo.trainer import PPOTrainer

# What counts under which label; the innermost does. What is left of a run is "train", "evaluate", ...
PHASES = (
    (RolloutCollector, "sample", "sample"),
    (RolloutCollector, "complete", "rollout"),
    (RolloutCollector, "score", "score"),
    (Learner, "learn", "learn, rest"),
    (Learner, "_backward", "micro-batch"),
    (PPOTrainer, "compute_advantages", "advantages"),
    (PPOTrainer, "record", "record"),
    (Checkpoints, "save", "checkpoint"),
    (rlhf.perf.hardware, "_fastest", "hardware"),
)
EVALUATION = [{"prompt": "hello"}, {"prompt": "good morning to you"}, {"prompt": "x"}]
PPO = {"family": "gpt2", "use_cpu": False, "bf16": True, "response_length": 12, "max_steps": 1}


def prepare() -> None:
    """Once, before anything is run."""
    import deepspeed  # noqa: F401  Accelerate would import it in each run

    for owner, name, label in PHASES:
        labelled(owner, name, label)
    hardware = rlhf.perf.hardware  # its figures mean nothing here, and take seconds
    hardware._SIZES["gpu"], hardware._COPIED["gpu"], hardware._SPENT = (64,), (2**10,), 0


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
    sample = run.collector.sample

    def counted(*args: Any, **options: Any) -> Any:
        found = sample(*args, **options)
        counts.now().call("decoded token", len(found.calls))  # prompts are one
        return found

    run.collector.sample = counted
    return run


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


def adapters(folder: Path, dropout: float = 0.1, **options: Any) -> dict[str, Any]:
    """LoRA with dropout, on a policy that has an adapter already, which is merged first."""
    from peft import get_peft_model

    policy = tiny_ppo.FAMILIES[options.get("family", "llama")][1]()
    config = copy.deepcopy(tiny_ppo.LORA)
    config.lora_dropout = dropout
    given = {"model": get_peft_model(policy, config), "peft_config": config}
    return ppo(folder, given=given, family="llama", **options)


def going_on_with_an_adapter(folder: Path, **options: Any) -> dict[str, Any]:
    """A policy that comes with an adapter, a frozen copy of which is the reference."""
    from peft import get_peft_model

    policy = get_peft_model(tiny.llama(), copy.deepcopy(tiny_ppo.LORA))
    return ppo(folder, given={"model": policy, "peft_config": None}, family="llama", **options)


def pushing(folder: Path, **options: Any) -> dict[str, Any]:
    """Saving the merged model and the adapter, and uploading them to a hub that takes anything."""
    import rlhf.ppo.export

    uploaded = []

    class Hub:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, **_: Any) -> str:
            uploaded.extend(sorted(path.name for path in folder_path.iterdir()))
            return "commit"

    rlhf.ppo.export.HfApi = Hub
    return ppo(folder, save=False, lora=True, push_to_hub=True, **options) | {"uploaded": uploaded}


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

    seen = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            seen.append(float(torch.nn.utils.get_total_norm(grads)))

    return ppo(folder, given={"callbacks": [Norms]}, **options) | {"norms": seen}


def decoding(folder: Path, family: str = "gpt2", lora: bool = False, steps: int = 5) -> dict[str, Any]:
    """Steps of decoding: what the model launches, and what else is."""
    from rlhf.generation import static
    from rlhf.generation.decode import inverse_cdf
    from rlhf.models.lora import add_lora
    from rlhf.models.sampling_copy import SamplingCopy

    policy = tiny_ppo.FAMILIES[family][1]()
    policy = (add_lora(policy, tiny_ppo.LORA) if lora else policy).to("cuda").eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        twin = SamplingCopy(policy, torch.bfloat16)
        twin.refresh()
        labelled(twin.model, "forward", "model")
        labelled(static, "decode_step", "step")
        prompts, u = [[5, 6, 7], [8, 9]], torch.rand(2, steps + 1)
        static.StaticDecoder().decode(twin.model, prompts, u, [399], 1.0, inverse_cdf)
    return {"steps": steps}


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
    prompts = [TextPrompt(prompt_id=str(i), tree_id=str(i), text="hi " * (i + 1)) for i in range(5)]
    config = EvaluationConfig(base_model="unused", eval_response_length=8, eval_batch_size=3)
    models = [make_policy(), make_reward(), make_policy(3), gold]
    policy, judge, base, gold = (model.to(device) for model in models)
    stop = [tokenizer.eos_token_id]
    with phase("evaluate"):
        rows = rlhf.evaluation.generate.respond("x", policy, tokenizer, judge, prompts, config, stop, base, gold)
    return {"rows": rows}


def comparison(folder: Path) -> dict[str, Any]:
    """compare.py, from a run's folder to what it prints."""
    from rlhf.cli import compare
    from rlhf.storage.run_folder import write_json

    base = _saved(folder / "base", tiny.gpt2(), tiny.gpt2_tokenizer())
    judge = _saved(folder / "judge", tiny.gpt2_reward(), tiny.gpt2_tokenizer())
    config = EvaluationConfig(base_model=str(base), reward_model_path=str(judge), eval_response_length=8)
    (folder / "runs" / "x" / "evaluation").mkdir(parents=True)
    run = {"config": asdict(config), "model_paths": {"base": str(base)}, "status": "done"}
    write_json(folder / "runs" / "x" / "evaluation" / "run.json", run)
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


def stages(folder: Path) -> dict[str, Any]:
    """The scripts of a run, each from its recipe: reward model, PPO full and LoRA, evaluation."""
    import tiny_recipe
    from accelerate.state import AcceleratorState

    from rlhf.cli import evaluate, train_ppo, train_reward

    device = {"use_cpu": False, "bf16": True}
    changes = dict.fromkeys(("reward", "ppo_full", "ppo_lora"), device)
    recipe = tiny_recipe.recipe(folder / "recipe", **changes)
    mains = {
        "reward": train_reward.main,
        "ppo_full": train_ppo.main,
        "ppo_lora": train_ppo.main,
        "evaluation": evaluate.main,
    }
    for name, main in mains.items():
        AcceleratorState._reset_state(reset_partial_state=True)  # a process of its own each, otherwise
        sys.argv = [name, "--config", str(recipe / f"{name}.yaml"), "--run", "x", "--runs_dir", str(folder / "runs")]
        with phase(name):
            main()
    return {"stages": sorted(path.name for path in (folder / "runs" / "x").iterdir() if path.is_dir())}


def snippets(folder: Path, codes: dict[str, str]) -> dict[str, Any]:
    """A few lines of Python each: its fault, or None; what it counted; its last line's value as text."""
    found = {}
    for name, code in codes.items():
        before = counts.now().phase
        *lines, last = code.strip().splitlines()
        names = {"torch": torch, "x": torch.arange(6.0, device="cuda"), "cpu": torch.arange(6.0)}
        fault = value = None
        with phase(name):
            try:
                exec("\n".join(lines), names)
                value = str(eval(last, names))
            except RuntimeError as error:
                fault = str(error)
            except TypeError as error:
                fault = f"TypeError: {error}"
            finally:
                torch.use_deterministic_algorithms(False)
        assert counts.now().phase == before
        found[name] = {"fault": fault, "value": value}
    return found


def _leave_reference() -> None:
    """The reference stays where it was made."""
    build = rlhf.ppo.trainer.build_roles

    def built(*args: Any) -> Any:
        roles = build(*args)
        roles.reference.to = lambda device: None
        return roles

    rlhf.ppo.trainer.build_roles = built


def _mask_on_cpu() -> None:
    """The policy's loss gets its mask on the CPU."""
    loss = rlhf.ppo.learner.policy_loss

    def with_mask(logp: Any, old: Any, advantages: Any, mask: Any, *rest: Any) -> Any:
        return loss(logp, old, advantages, mask.cpu(), *rest)

    rlhf.ppo.learner.policy_loss = with_mask


def _sum_on_cpu() -> None:
    """What is summed over ranks is sent from the CPU."""
    total = rlhf.ppo.metrics.all_sum
    rlhf.ppo.metrics.all_sum = lambda accelerator, values: total(accelerator, values.cpu()).to(values.device)


INJECTIONS: dict[str, Callable[[], None]] = {
    "reference": _leave_reference,
    "mask": _mask_on_cpu,
    "all_reduce": _sum_on_cpu,
}


def injected(folder: Path, fault: str, of: str, **options: Any) -> dict[str, Any]:
    """A scenario with a fault in it."""
    INJECTIONS[fault]()
    return SCENARIOS[of](folder, **options)


def _saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    "ppo": ppo,
    "adapters": adapters,
    "going_on_with_an_adapter": going_on_with_an_adapter,
    "pushing": pushing,
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
    "decoding": decoding,
    "reward": reward,
    "evaluation": evaluation,
    "comparison": comparison,
    "stages": stages,
    "snippets": snippets,
    "injected": injected,
}
