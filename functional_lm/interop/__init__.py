"""Doors to other programs: models of Hugging Face and adapters of PEFT in and out, GGUF out."""
