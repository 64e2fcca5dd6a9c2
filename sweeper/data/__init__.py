"""Turn data files into batches of tokens: read, format, clean, split, render, tokenize, batch."""
