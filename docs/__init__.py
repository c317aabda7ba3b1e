"""The pages of the documentation, and the module that writes their tables."""
