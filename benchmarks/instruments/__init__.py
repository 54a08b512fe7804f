"""What the benchmarks and the tests measure with: traffic, machine code, time and memory, and the cases measured."""
