"""What every test starts from: no network, an empty Hugging Face home, the same seeds, and one thread.

The environment is set here, at the top, because the libraries read it once, when they are first imported.
"""

import os
import random
import shutil
import tempfile

HF_HOME = tempfile.mkdtemp(prefix="hf_vlm_tests_")
os.environ["HF_HOME"] = HF_HOME
os.environ["TRACKIO_DIR"] = os.path.join(HF_HOME, "trackio")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", os.environ["HF_HUB_OFFLINE"])
# These would lead the caches out of HF_HOME again.
for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE"):
    os.environ.pop(name, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much on a busy machine


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers in every test, in whatever order the tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_unconfigure() -> None:
    """Remove the session's Hugging Face home."""
    shutil.rmtree(HF_HOME, ignore_errors=True)
