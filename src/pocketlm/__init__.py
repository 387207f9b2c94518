"""Make a small language model fit a device, and prove what that cost."""

__version__ = "0.1.0"
