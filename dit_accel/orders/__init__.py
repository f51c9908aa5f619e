"""How tokens stand, so that blocks hold what belongs together: in space, or by what queries and keys hold.

`TokenOrder` (`dit_accel/order.py`) is the permutation itself; here it is chosen. `Ordering` (`ordering.py`) is the
choice by name that methods make their parameters of.
"""
