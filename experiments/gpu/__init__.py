"""Everything that needs an accelerator, in fifteen minutes."""
