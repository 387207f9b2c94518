"""Pure functions over tensors: they import torch and the errors, and nothing else of ours."""
