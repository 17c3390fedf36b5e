"""The paper's experiments as commands that set the result beside the paper."""
