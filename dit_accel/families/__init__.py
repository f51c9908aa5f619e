"""Model families: one file each, a description plus a processor; no method code."""
