"""What becomes of the keys that were not selected, where the kernel cannot do it in its own softmax.

`Remainder` (`kernels/spec.py`) names what the kernel does itself. What stands here is made after it, by
`Method.complete`, from a `PartialAttention`.
"""
