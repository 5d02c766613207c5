"""One line for each trainer; each module here imports its own library, so ``import flatopt`` needs none of them."""
