"""Where the tests of this folder run: RLHF_GPU_CHECK_DEVICE, cuda or cpu; without it on a GPU, or not at all."""

import os

import pytest
import torch

HERE = os.path.dirname(__file__)


def pytest_collection_modifyitems(items):
    for item in items:
        if str(item.path).startswith(HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device():
    """A torch.device that is really there."""
    asked = os.environ.get("RLHF_GPU_CHECK_DEVICE", "cuda" if torch.cuda.is_available() else "")
    if not asked:
        pytest.skip("no GPU here; RLHF_GPU_CHECK_DEVICE=cpu runs this on the CPU")
    if asked == "cuda":
        assert torch.cuda.is_available(), "RLHF_GPU_CHECK_DEVICE=cuda, and PyTorch finds no GPU"
    return torch.device(asked)


@pytest.fixture
def place(device):
    """Options of PPOConfig that bring a trainer there."""
    return {"use_cpu": device.type == "cpu"}


@pytest.fixture
def only_on_a_gpu(device):
    """For what the CPU has no equal of, or other tests run there."""
    if device.type == "cpu":
        pytest.skip("on a GPU only")
