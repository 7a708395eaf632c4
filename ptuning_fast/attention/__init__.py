"""Attention over sequences of many lengths in one row, and how transformers' models come to use it."""
