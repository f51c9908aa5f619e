"""Streaming generation with causal Wan models: a cache of finished frames, chunk after chunk, without end."""

from dit_accel.pipelines.streaming.runtime import CausalWan

__all__ = ["CausalWan"]
