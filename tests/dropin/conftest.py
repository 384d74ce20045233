"""The modules beside these tests, and the toy tokenizers of tests/conftest.py, are imported by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
