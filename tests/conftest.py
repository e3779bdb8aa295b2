"""Every test starts from the same seed, on one thread (the tensors are tiny), and leaves torch as it found it."""
import os
from pathlib import Path

import pytest
import torch

os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)  # for `python -m lab.…` in another folder


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
