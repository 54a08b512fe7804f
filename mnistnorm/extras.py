"""Exits with a one-line error if packages of the `mnist` extra are missing; each program imports this module first."""

import sys
from importlib.util import find_spec

_missing = [
    name for name in ("matplotlib", "PIL", "skimage", "torchinfo", "torchvision", "tqdm") if find_spec(name) is None
]
if _missing:
    sys.exit(f"error: the programs need {', '.join(_missing)}: pip install 'mnistnorm[mnist]'")
