"""The folder of further real files, golden outputs and texts; tests/with_data is collected only with it."""

import os
from pathlib import Path

DATA = Path(os.environ.get("NUMPY_LLAMA_TEST_DATA", "/nonexistent"))
