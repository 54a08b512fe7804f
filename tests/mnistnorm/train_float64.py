"""mnistnorm.train in float64, in which a curve does not hang on the order of roundings."""

import sys

import torch

from mnistnorm import train

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign, assignment]
    sys.exit(train.main())
