"""Reading and writing of weights that others have published."""
