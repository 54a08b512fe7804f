"""The implementation in Triton, for GPUs; Triton's interpreter runs it on a CPU. Importing it imports Triton."""
