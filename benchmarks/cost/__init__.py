"""What each method adds to a training step; ``python -m benchmarks.cost --help`` tells how to measure it."""
