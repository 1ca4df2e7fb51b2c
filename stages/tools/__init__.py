"""Commands around the stages, in the same form."""
