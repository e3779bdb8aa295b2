"""Every test starts from one seed, on one thread (tensors are tiny), and leaves torch as it was."""
import os
from pathlib import Path

import pytest
import torch

# for `python -m lab.bench` and its like in another folder
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)


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


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A tiny corpus, as prepare_data.py leaves one."""
    from train_helpers import make_data  # here: most tests need no train.py
    return make_data(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture
def command(monkeypatch, capsys):
    """train.py's main with a command line -> (exit code, stdout, stderr)"""
    from train_helpers import call, train, train_command
    return lambda data, out, flavour="dense", **changes: call(
        train.main, train_command(data, out, flavour, **changes)[2:], monkeypatch, capsys)
