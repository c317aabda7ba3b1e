"""Prompts → the states that a text-conditional model reads."""
