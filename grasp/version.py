"""The version of grasp."""

__version__ = "0.1.0"
