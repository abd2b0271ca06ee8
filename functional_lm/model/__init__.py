"""The transformer as pure functions over a parameter tree."""
