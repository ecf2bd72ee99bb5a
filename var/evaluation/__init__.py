"""Measured quality of a tokenizer and a generator."""
