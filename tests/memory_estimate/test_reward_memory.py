"""The dry run of reward training against values by hand."""

import pytest
import tiny
from peft import LoraConfig

from rlhf.config import RewardStageConfig
from rlhf.console import screen
from rlhf.memory_estimate import reward


@pytest.fixture
def estimate(tmp_path, monkeypatch):
    """(parts by name, what was printed) for pairs of these lengths."""
    seen, said = {}, []
    monkeypatch.setattr(reward, "verdict", lambda parts, *_: seen.update({part.name: part for part in parts}))
    monkeypatch.setattr(screen, "say", said.append)

    def make(pairs, peft_config=None, half="", use_cpu=True, **options):
        args = RewardStageConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, eval_strategy="no", **options
        )
        args.bf16, args.fp16, args.use_cpu = half == "bf16", half == "fp16", use_cpu  # of a GPU
        rows = [{"chosen_ids": [1] * chosen, "rejected_ids": [1] * rejected} for chosen, rejected in pairs]
        reward.dry_run(args, tiny.llama_reward().config, rows, peft_config)
        return dict(seen), "\n".join(map(str, said))

    return make


def test_the_longest_pairs_decide_and_the_longer_side_of_each(estimate):
    long, short = (5, 40), (6, 7)
    alone = estimate([long], per_device_train_batch_size=1)[0]["activations"].learning
    assert estimate([short, long, short], per_device_train_batch_size=1)[0]["activations"].learning == alone
    assert estimate([short], per_device_train_batch_size=1)[0]["activations"].learning < alone / 2
    two = estimate([long, long], per_device_train_batch_size=2)[0]["activations"].learning
    assert estimate([long, short, long], per_device_train_batch_size=2)[0]["activations"].learning == two


def test_a_pass_has_no_more_pairs_than_there_are(estimate):
    pairs = [(8, 9)] * 3
    most = estimate(pairs, per_device_train_batch_size=3)[0]["activations"].learning
    assert estimate(pairs, per_device_train_batch_size=8)[0]["activations"].learning == most


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_train_epochs": 1.0}, 3),  # 5 pairs in batches of 2
        ({"num_train_epochs": 1.5}, 5),  # 4.5
        ({"num_train_epochs": 1.0, "max_steps": 7}, 7),
    ],
)
def test_steps_by_hand(estimate, options, steps):
    said = estimate([(3, 4)] * 5, per_device_train_batch_size=2, **options)[1]
    assert f"5 pairs, {steps} steps of 2" in said


def test_an_adapter_has_few_gradients_and_the_optimizer_is_the_one_of_the_settings(estimate):
    adapter = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    full, lora = (estimate([(3, 4)], peft, optim="lion_32bit")[0]["reward"] for peft in (None, adapter))
    assert full.weights == full.gradients == full.optimizer
    assert 0 < lora.gradients == lora.optimizer < lora.weights / 5


def test_a_pass_keeps_as_much_in_fp16_as_in_bf16(estimate):
    """Of so small a model more than in float32: autocast keeps the weights that it has cast, too."""
    kept = {half: estimate([(90, 95)], half=half)[0]["activations"].learning for half in ("", "bf16", "fp16")}
    assert kept["fp16"] == kept["bf16"] != kept[""]


@pytest.mark.parametrize("use_cpu", [True, False])
def test_only_a_cpu_has_its_own_attention(estimate, monkeypatch, use_cpu):
    asked = []
    monkeypatch.setattr(reward, "use_cpu_attention", asked.append)
    estimate([(3, 4)], use_cpu=use_cpu)
    assert bool(asked) == use_cpu


def test_one_step_is_one_step(estimate):
    assert "5 pairs, 1 steps of 2" in estimate([(3, 4)] * 5, per_device_train_batch_size=2, max_steps=1)[1]


def test_the_checks_of_a_start_are_made(estimate, monkeypatch):
    asked = []
    monkeypatch.setattr(reward, "check_engine", lambda accelerator: asked.append("engine"))
    monkeypatch.setattr(reward, "prepare_offload", lambda plugin, optim: asked.append((plugin, str(optim))))
    monkeypatch.setattr(reward, "check_writable", lambda folder: asked.append(folder.name))
    estimate([(3, 4)], optim="sgd")
    assert [asked[0], asked[1][0], asked[1][1].rpartition(".")[2].lower()] == ["engine", None, "sgd"]
    assert len(asked) == 3
