"""What a model is worth: likelihoods of text."""
