"""The dry run of reward training against values by hand."""

import pytest
import tiny
from peft import LoraConfig

from rlhf.config import RewardStageConfig
from rlhf.console import screen
from rlhf.memory_estimate import reward
from rlhf.reward.order import GlobalOrder


@pytest.fixture
def estimate(tmp_path, monkeypatch):
    """(parts by name, what was printed) for pairs of these lengths."""
    seen, said = {}, []
    monkeypatch.setattr(reward, "verdict", lambda parts, *_: seen.update({part.name: part for part in parts}))
    monkeypatch.setattr(screen, "say", said.append)

    def make(pairs, peft_config=None, half="", use_cpu=True, config=tiny.llama_reward, **options):
        args = RewardStageConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, eval_strategy="no", **options
        )
        args.bf16, args.fp16, args.use_cpu = half == "bf16", half == "fp16", use_cpu  # of a GPU
        texts = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs]
        # Every text begins with a token of its own: what texts share is computed once.
        own = iter(range(1, 20))
        rows = [{side: [next(own)] * length for side, length in row.items()} for row in texts]
        reward.dry_run(args, config().config, rows, peft_config)
        return dict(seen), "\n".join(map(str, said))

    return make


@pytest.mark.parametrize("use_cpu", [True, False])
def test_the_longest_pairs_decide_and_the_longer_side_of_each(estimate, use_cpu):
    def learning(pairs, size):
        found = estimate(pairs, per_device_train_batch_size=size, use_cpu=use_cpu)
        return found[0]["activations"].learning

    long, short = (5, 40), (6, 7)
    alone = learning([long], 1)
    assert learning([short, long, short], 1) == alone
    assert learning([short], 1) < alone / 2
    assert learning([long, short, long], 2) == learning([long, long], 2)


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


def test_on_a_cpu_the_largest_pass_of_the_order_decides(estimate):
    """Without padding a pass takes its own tokens; where all may meet, the longest pairs do."""
    long, short = (20, 90), (5, 30)

    def learning(pairs, strategy="sequential", size=2):
        options = {"global_batch_size": size, "per_device_train_batch_size": 2, "train_sampling_strategy": strategy}
        return estimate(pairs, **options)[0]["activations"].learning

    mixed, most = learning([long, short]), learning([long, long])
    assert mixed < 0.75 * most
    assert learning([long, short, short, long]) == mixed
    assert learning([short, long, long, short]) == mixed
    assert learning([short, short, long, long]) == most  # the last pass
    assert learning([long, short, short, long], size=4) == mixed  # of two pairs at a time
    assert learning([long, short, short, long], "batch_rebalance") == most  # transformers orders them
    # Drawn anew in each epoch: in some epoch the two long ones meet.
    assert learning([long, short, short, long], "random") == most


@pytest.mark.parametrize(
    ("options", "first"), [({"num_train_epochs": 1.0}, True), ({"max_steps": 2}, True), ({}, False)]
)
def test_only_the_epochs_that_are_trained_count(estimate, options, first):
    long, short = (20, 90), (5, 30)
    meet = [i for i in range(40) if i in _meetings(4)]
    seed = next(seed for seed in range(40) if seed not in meet)
    shared = {"global_batch_size": 2, "per_device_train_batch_size": 2, "data_seed": seed, "seed": meet[0]}
    rows = [long, short, short, long]
    found = estimate(rows, **shared, **({"num_train_epochs": 40.0} | options))[0]["activations"].learning
    apart, most = (estimate(pair, **shared)[0]["activations"].learning for pair in ([long, short], [long, long]))
    assert found == (apart if first else most)


def _meetings(rows):
    """Seeds with which the first and the last of so many pairs meet in a step of two of the first epoch."""
    found = []
    for seed in range(40):
        order = list(GlobalOrder([1] * rows, 2, seed, "random"))
        if {0, rows - 1} in ({*order[:2]}, {*order[2:]}):
            found.append(seed)
    return found


def test_gpt2_s_activation_is_counted_as_the_one_that_is_trained(estimate):
    """PyTorch's own keeps one tensor, the one of the config six."""

    def gelu():
        model = tiny.gpt2_reward()
        model.config.activation_function = "gelu_pytorch_tanh"
        return model

    ours, pytorch = (
        estimate([(30, 40)], config=config, per_device_train_batch_size=1)[0]["activations"].learning
        for config in (tiny.gpt2_reward, gelu)
    )
    assert ours == pytorch


def test_dropout_is_off_as_in_training_unless_it_is_asked_for(estimate):
    def steady():
        model = tiny.gpt2_reward()
        model.config.attn_pdrop = model.config.resid_pdrop = model.config.embd_pdrop = 0.0
        return model

    def learning(config, **options):
        return estimate([(30, 40)], config=config, per_device_train_batch_size=1, **options)[0]["activations"].learning

    assert tiny.gpt2_reward().config.attn_pdrop > 0
    assert learning(tiny.gpt2_reward) == learning(steady)
    assert learning(tiny.gpt2_reward, disable_dropout=False) > learning(steady)


def test_recomputed_layers_keep_what_they_begin_with(estimate, monkeypatch):
    """Each layer more keeps its states alone: float32 [tokens, d]."""

    def learning(layers, recompute):
        def config():
            model = tiny.llama_reward()
            model.config.num_hidden_layers = layers
            return model

        options = {"per_device_train_batch_size": 1, "gradient_checkpointing": recompute}
        return estimate([(30, 40)], config=config, **options)[0]["activations"].learning

    width = tiny.llama_reward().config.hidden_size
    assert learning(9, True) - learning(8, True) == (30 + 40) * width * 4
    one_layer = learning(9, False) - learning(8, False)
    assert one_layer < learning(1, True) < learning(2, False)
    assert learning(8, True) < learning(8, False) / 3


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
