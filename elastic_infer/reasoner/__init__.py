"""The shipped reasoner: an arithmetic task, its tokenizer, its training and its evaluation."""
