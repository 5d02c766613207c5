"""Ablations of the flat objective over paired seeds; ``python -m benchmarks.ablation --help`` tells how to run them."""
