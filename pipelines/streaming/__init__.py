"""Streaming generation with causal Wan models: a cache of finished frames, chunk after chunk, without end."""

from dit_accel.pipelines.streaming.pipeline import StreamingWanPipeline
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.pipelines.streaming.stream import StreamChunk, VideoStream

__all__ = ["CausalWan", "StreamChunk", "StreamingWanPipeline", "VideoStream"]
