"""Text and token ids: tokenizer, chat templates, text as a stream, stop strings."""
