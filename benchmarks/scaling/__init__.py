"""Plain and flat steps on one GPU and on several; ``python -m benchmarks.scaling --help`` tells how to measure them."""
