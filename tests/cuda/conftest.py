"""The process of the pretend CUDA device, one for all tests here."""

import pytest
import shim
from server import PretendCuda


@pytest.fixture(scope="session")
def cuda():
    if reason := shim.missing():
        pytest.skip(reason)
    device = PretendCuda()
    yield device
    device.close()
