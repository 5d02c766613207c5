"""What flatopt costs, what it leaves of the weights, and what it buys: ``python -m benchmarks.ablation``, ``.cost``, ..."""
