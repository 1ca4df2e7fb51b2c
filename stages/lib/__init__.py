"""Nouns: what the stages work with, in rooms."""
