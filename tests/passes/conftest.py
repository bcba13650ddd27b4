"""Puts this folder's helpers (pass_support, oracle, programs) on the path of its tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
