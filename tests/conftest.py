"""Every test runs offline, in this process and in the ones it starts."""

import importlib.util
import os
from pathlib import Path

import pytest

OFFLINE = Path(__file__).parent / "offline"

specification = importlib.util.spec_from_file_location("offline", OFFLINE / "sitecustomize.py")
offline = importlib.util.module_from_spec(specification)
specification.loader.exec_module(offline)
os.environ["PYTHONPATH"] = os.pathsep.join(
    part for part in (str(OFFLINE), os.environ.get("PYTHONPATH")) if part
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
