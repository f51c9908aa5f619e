"""Policy: layouts, orders, plans, methods, families and the one line that switches them on."""
