"""The optimizers around an optimizer: FlatPerturbOptimizer, and SAM to compare with."""
