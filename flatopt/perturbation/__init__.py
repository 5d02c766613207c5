"""When W is perturbed: the noise asked for, the weights' state, and the hooks on the model that move them between states."""
