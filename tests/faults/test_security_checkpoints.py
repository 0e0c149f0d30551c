"""A checkpoint with a pickle that runs something is refused by one line, and nothing in it has run."""

import shutil

import pytest
import tiny
import tiny_ppo
import torch
from bombs import plain_bomb, torch_bomb
from peft import PeftModel, get_peft_model

from rlhf.config import RewardStageConfig
from rlhf.errors import UserError
from rlhf.reward.trainer import train_reward_model
from rlhf.storage.disk import write_manifest
from rlhf.storage.safe_load import NEVER_READ, check_pickles


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a PPO run."""
    folder = tmp_path_factory.mktemp("ppo")
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "kl_target": 0.05, "use_score_scaling": True}
    tiny_ppo.trainer(folder, **options).train()
    return folder / "checkpoints" / "step-1"


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "step-1")


def test_a_checkpoint_of_our_own_passes(saved):
    names = {path.name for path in saved.iterdir()}
    assert {"optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"} <= names  # what is looked at
    check_pickles(saved)


@pytest.mark.parametrize("write", [torch_bomb, plain_bomb])
@pytest.mark.parametrize(
    "name",
    [
        *("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "pytorch_model.bin"),
        *(
            "scaler.pt",
            "shard-0.pt",
            "pytorch_model/mp_rank_00_model_states.pt",
            "rng_state.pth",
            "more/deeper/any.pkl",
            "training_state.bin",
        ),
    ],
)
def test_a_pickle_that_calls_something_is_named_and_not_called(checkpoint, tmp_path, name, write):
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    write(checkpoint / name, tmp_path / "marker")
    with pytest.raises(UserError) as refused:
        check_pickles(checkpoint)
    expected = f"{checkpoint / name}: expected tensors, numbers and texts, found a pickle that calls io.open"
    assert str(refused.value) == expected
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"])
@pytest.mark.parametrize("newest", [True, False])
def test_a_ppo_run_does_not_go_on_from_a_bomb(checkpoint, tmp_path, name, newest):
    """Who may write a bomb there may write its digest, too: the manifest is no protection from it."""
    torch_bomb(checkpoint / name, tmp_path / "marker")
    write_manifest(checkpoint)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.move(checkpoint, tmp_path / "run" / "checkpoints")
    run = tiny_ppo.trainer(tmp_path / "run", kl_target=0.05, use_score_scaling=True)
    with pytest.raises(UserError, match=f"step-1/{name}: expected tensors, numbers and texts, found a pickle"):
        run.train(resume_from_checkpoint=newest or tmp_path / "run" / "checkpoints" / "step-1")
    assert not (tmp_path / "marker").exists()


def test_accelerate_would_have_called_it(checkpoint, tmp_path):
    """Why the check is there: once this fails, Accelerate has mended it and the check can go."""
    torch_bomb(checkpoint / "custom_checkpoint_0.pkl", tmp_path / "marker")
    run = tiny_ppo.trainer(tmp_path / "new", kl_target=0.05, use_score_scaling=True)
    with pytest.raises(KeyError):
        run.accelerator.load_state(str(checkpoint))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x80\x02.", b"text", bytes(2000)])
def test_a_damaged_file_is_named(checkpoint, content):
    (checkpoint / "optimizer.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"optimizer\.bin: expected tensors, numbers and texts, found"):
        check_pickles(checkpoint)


def test_a_zip_that_starts_as_a_pickle_is_refused(checkpoint, tmp_path):
    """Two readers that take one file for two things must not disagree on it."""
    whole = (checkpoint / "optimizer.bin").read_bytes()
    plain_bomb(checkpoint / "optimizer.bin", tmp_path / "marker")
    (checkpoint / "optimizer.bin").write_bytes((checkpoint / "optimizer.bin").read_bytes() + whole)
    with pytest.raises(UserError, match="optimizer"):
        check_pickles(checkpoint)
    assert not (tmp_path / "marker").exists()


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    (tmp_path / "optimizer.bin").symlink_to("none")
    with pytest.raises(UserError, match=r"optimizer\.bin: .*, found No such file or directory$"):
        check_pickles(tmp_path)


def test_links_do_not_lead_out(checkpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (checkpoint / "pytorch_model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="pytorch_model: expected a folder of the checkpoint, found a link"):
        check_pickles(checkpoint)


@pytest.mark.parametrize("name", ["../elsewhere", "..", "/tmp/elsewhere"])
def test_deepspeeds_latest_does_not_lead_out(checkpoint, name):
    (checkpoint / "latest").write_text(f"{name}\n")
    with pytest.raises(UserError, match="latest: expected the name of a folder beside it, found"):
        check_pickles(checkpoint)


def test_deepspeeds_own_classes_pass_and_stay_inert(checkpoint, monkeypatch):
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scalers = [loss_scaler.LossScaler(scale=1.0), loss_scaler.DynamicLossScaler(1.0, 2.0, 10, 1.0, 2, False, False)]
    state = {"scalers": scalers, "stage": ZeroStageEnum(2), "places": {"a": fragment_address(numel=3, start=4)}}
    (checkpoint / "pytorch_model").mkdir()
    torch.save(state, checkpoint / "pytorch_model" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (checkpoint / "latest").write_text("pytorch_model")
    load, read = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **options: read.append(load(*args, **options)))
    check_pickles(checkpoint)
    (found,) = [one for one in read if isinstance(one, dict) and "scalers" in one]
    made = {type(one) for one in (*found["scalers"], found["stage"], found["places"]["a"])}
    assert {kind.__name__ for kind in made} == {"_Inert"}  # none of DeepSpeed's classes


ROWS = [{"chosen_ids": [5, 6, i, 2], "rejected_ids": [5, 6, i + 20, 2]} for i in range(30, 46)]


def reward_run(folder, **options):
    args = RewardStageConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return train_reward_model(tiny.llama_reward(), tiny.chat_tokenizer(), ROWS, ROWS[:4], args)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A reward stage that was cut after one of its two steps. Its token is none."""
    folder = tmp_path_factory.mktemp("reward")
    reward_run(folder, max_steps=1, hub_token="hf_" + "T" * 30)
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_reward_stage_does_not_go_on_from_a_bomb(reward_folder, tmp_path, name):
    """Who may write a bomb there may write its digest, too: the manifest is no protection from it."""
    folder = shutil.copytree(reward_folder, tmp_path / "reward")
    torch_bomb(folder / "checkpoint-1" / name, tmp_path / "marker")
    write_manifest(folder / "checkpoint-1")
    with pytest.raises(UserError, match=f"checkpoint-1/{name}: expected tensors, numbers and texts, found a pickle"):
        reward_run(folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_reward_stage_says_that_its_state_is_broken(reward_folder, tmp_path, content):
    folder = shutil.copytree(reward_folder, tmp_path / "reward")
    (folder / "checkpoint-1" / "trainer_state.json").write_text(content)
    write_manifest(folder / "checkpoint-1")
    with pytest.raises(UserError, match=r"checkpoint-1: .* found a trainer_state\.json that cannot be read"):
        reward_run(folder)


def test_the_pickled_settings_are_never_read(reward_folder, tmp_path):
    """transformers writes training_args.bin; a stage that goes on does not open it."""
    folder = shutil.copytree(reward_folder, tmp_path / "reward")
    assert (folder / "checkpoint-1" / NEVER_READ[0]).is_file()
    torch_bomb(folder / "checkpoint-1" / NEVER_READ[0], tmp_path / "marker")
    write_manifest(folder / "checkpoint-1")
    trainer, ended = reward_run(folder)
    assert ended
    assert trainer.state.global_step == 2
    assert not (tmp_path / "marker").exists()


def test_no_token_in_what_a_reward_stage_writes(reward_folder):
    files = [path for path in reward_folder.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert [path.name for path in files if b"TTTTTT" in path.read_bytes()] == []


def test_an_adapters_pickle_is_not_called(tmp_path):
    folder = tmp_path / "adapter"
    get_peft_model(tiny.llama(), tiny_ppo.LORA).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch_bomb(folder / "adapter_model.bin", tmp_path / "marker")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        PeftModel.from_pretrained(tiny.llama(), str(folder))
    assert not (tmp_path / "marker").exists()


def test_the_bomb_works(tmp_path):
    """Were the payload a dud, no test above could fail."""
    torch_bomb(tmp_path / "a.pt", tmp_path / "marker")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "marker").exists()
