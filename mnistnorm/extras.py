"""Ends a program in one line where packages are missing that only the programs need: each imports this module first."""

import sys
from importlib.util import find_spec

_missing = [
    name for name in ("matplotlib", "PIL", "skimage", "torchinfo", "torchvision", "tqdm") if find_spec(name) is None
]
if _missing:
    sys.exit(f"error: the programs need {', '.join(_missing)}: pip install 'mnistnorm[mnist]'")
