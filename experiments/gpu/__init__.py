"""Everything that needs an accelerator, for one machine and fifteen minutes."""
