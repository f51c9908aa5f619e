"""Methods: policies over one engine. One module each; importing the registry finds them."""

from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method, list_methods, register

__all__ = ["Method", "get_method", "list_methods", "register"]
