"""Unsupported settings of an FSDP config are refused by one line before training."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from rlhf.distributed.launch import (
    autocast_dtype,
    check_engine,
    check_fsdp,
    check_wrapped,
    configure_fsdp,
    engine_name,
)
from rlhf.errors import UserError
from rlhf.ppo.roles import check_shardable

FSDP = SimpleNamespace(num_processes=1, distributed_type=DistributedType.FSDP, mixed_precision="no")
REFUSED = {
    ("FSDP_VERSION", "1"): "fsdp_version: expected 2, found 1",
    ("FSDP_OFFLOAD_PARAMS", "true"): "fsdp_offload_params: expected false",
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"): "fsdp_cpu_ram_efficient_loading: expected false",
    ("FSDP_ACTIVATION_CHECKPOINTING", "true"): "fsdp_activation_checkpointing: expected false",
    ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"): "fsdp_auto_wrap_policy: expected TRANSFORMER_BASED_WRAP",
}


@pytest.fixture
def launched(monkeypatch):
    """The environment of a process that `accelerate launch` starts with accelerate_configs/fsdp2.yaml."""
    for name in ("OFFLOAD_PARAMS", "CPU_RAM_EFFICIENT_LOADING", "ACTIVATION_CHECKPOINTING"):
        monkeypatch.setenv(f"FSDP_{name}", "false")
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")


def test_the_projects_own_config_is_taken(launched):
    check_engine(FSDP)
    assert engine_name(FSDP) == "FSDP2"


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_other_fsdp_configs_are_refused(launched, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        check_engine(FSDP)
    assert str(error.value).startswith(REFUSED[name, value])
    assert str(error.value).endswith("; see accelerate_configs/fsdp2.yaml")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # another engine does not read it
    check_fsdp()


def test_without_a_version_accelerate_takes_the_first(launched, monkeypatch):
    monkeypatch.delenv("FSDP_VERSION")
    with pytest.raises(UserError, match="fsdp_version: expected 2, found 1"):
        check_engine(FSDP)


def plain(processes=1, kind=DistributedType.NO, **more):
    return SimpleNamespace(num_processes=processes, distributed_type=kind, mixed_precision="no", **more)


def test_an_engine_other_than_the_one_that_was_asked_for_is_refused(monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    check_engine(plain())
    monkeypatch.setenv("FSDP_VERSION", "1")  # of no engine
    check_engine(plain())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"^processes: WORLD_SIZE=2, but Accelerate started 1 process; start the script"
    ):
        check_engine(plain())
    with pytest.raises(UserError, match=r"^processes: WORLD_SIZE=2, but Accelerate started 3 processes; start"):
        check_engine(plain(3))
    check_engine(plain(2))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "True")
    with pytest.raises(UserError, match=r"^engine: expected DeepSpeed, found MULTI_CPU; unset ACCELERATE_USE_CPU"):
        check_engine(plain(2, DistributedType.MULTI_CPU))
    check_engine(plain(2, DistributedType.DEEPSPEED))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    with pytest.raises(UserError, match=r"^engine: expected FSDP, found MULTI_CPU; on CPUs"):
        check_engine(plain(2, DistributedType.MULTI_CPU))


def test_models_of_several_processes_share_gradients():
    model, wrapped = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1))
    check_wrapped(plain(1, unwrap_model=lambda m: m), model)
    check_wrapped(plain(2, unwrap_model=lambda m: m[0]), wrapped)
    with pytest.raises(UserError, match=r"^engine: Linear would be trained on each rank alone; start with accelerate"):
        check_wrapped(plain(2, unwrap_model=lambda m: m), model)


def test_engines_by_name_and_their_precision():
    zero = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    assert engine_name(plain(kind=DistributedType.DEEPSPEED, state=zero)) == "DEEPSPEED ZeRO-3"
    assert engine_name(plain(kind=DistributedType.MULTI_GPU)) == "MULTI_GPU"
    found = {}
    for word in ("no", "bf16", "fp16"):
        plugin = SimpleNamespace(mixed_precision_policy=None)
        fsdp = SimpleNamespace(**vars(FSDP) | {"mixed_precision": word, "state": SimpleNamespace(fsdp_plugin=plugin)})
        configure_fsdp(fsdp)
        found[word] = autocast_dtype(fsdp), plugin.mixed_precision_policy
    assert found["no"] == (None, None)
    for word, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        policy = found[word][1]
        assert (found[word][0], policy.param_dtype, policy.reduce_dtype) == (dtype, dtype, torch.float32)
        assert policy.cast_forward_inputs is False


class Trained(nn.Module):
    """The part of an actor-critic that decides what is sharded together."""

    _no_split_modules = ("Linear",)

    def __init__(self, block: torch.dtype, head: torch.dtype, quantised: bool = False) -> None:
        super().__init__()
        self.policy, self.critic = nn.Sequential(nn.Linear(2, 2, dtype=block)), nn.LayerNorm(2, dtype=head)
        self.policy.is_quantized = quantised


def test_a_block_is_of_one_precision():
    bf16, whole = torch.bfloat16, torch.float32
    check_shardable(FSDP, Trained(bf16, whole))  # each a group of its own
    mixed = Trained(bf16, whole)
    mixed.critic.more = nn.Embedding(2, 2, dtype=bf16)
    with pytest.raises(UserError, match="dtype: expected one for policy and critic under FSDP2, found bfloat16 and fl"):
        check_shardable(FSDP, mixed)
    mixed.critic.more.requires_grad_(False)  # what is not trained may be in another
    check_shardable(FSDP, mixed)
    with pytest.raises(UserError, match="engine: FSDP2 cannot shard quantised weights"):
        check_shardable(FSDP, Trained(whole, whole, quantised=True))
    quantised = Trained(whole, whole)
    quantised.critic.is_quantized = True
    with pytest.raises(UserError, match="engine: FSDP2 cannot shard quantised weights"):
        check_shardable(FSDP, quantised)
    check_shardable(FSDP, Trained(whole, whole))
