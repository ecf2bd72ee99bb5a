"""Measures the quality of a tokenizer and of a generator."""
