"""The server: OpenAI-style routes around the engine."""
