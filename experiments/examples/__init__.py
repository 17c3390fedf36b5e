"""The library in other projects, and step by step."""
