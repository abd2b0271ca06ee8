"""Generation as pure prefill and decode over a cache tree."""
