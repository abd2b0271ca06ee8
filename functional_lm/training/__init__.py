"""Training as a stateless step over a state tree, and the loop of effects around it."""
