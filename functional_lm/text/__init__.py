"""Text to tokens and back: documents (`corpus`), tokenizers (`tokenizer`), token files and batches (`dataset`)."""
