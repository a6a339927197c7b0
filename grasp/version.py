"""The version of grasp."""

__version__ = "0.2.0"
