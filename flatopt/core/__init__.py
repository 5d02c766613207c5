"""What a weight is: its identity, one step's look at it, what its adapter adds, and the part of it that this rank holds."""
