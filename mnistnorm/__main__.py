"""python -m mnistnorm: names the programs."""

import sys

sys.exit("error: start a program: python -m mnistnorm.train, .compare, .predict or .summary (each has --help)")
