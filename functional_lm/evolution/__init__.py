"""Evolution: populations of models, adapters and settings as a vmap axis."""
