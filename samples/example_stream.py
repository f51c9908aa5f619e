"""A stream whose prompt changes on the way, written while it is made: `python samples/example_stream.py`.

The small model was fine-tuned to stream; `samples/tiny-wan-causal/README.md` says how far it goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dit_accel.pipelines.streaming import StreamingWanPipeline
from dit_accel.video.growing import StreamingVideoFile


def main(arguments: Sequence[str] | None = None) -> None:
    """Stream to a file and change the prompt at half time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="a red ball moving right")
    parser.add_argument("--then", default="a blue square moving left")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--output", type=Path, default=Path("outputs/stream.mp4"))
    options = parser.parse_args(arguments)
    pipe = StreamingWanPipeline.from_preset("tiny-wan-causal")
    size = {"height": options.size, "width": options.size}
    stream = pipe.stream(options.prompt, num_chunks=options.chunks, **size)
    with StreamingVideoFile(options.output, 12) as file:
        for chunk in stream:
            file.write(chunk.frames)
            print(f"chunk {chunk.index + 1} of {options.chunks}: denoised in {chunk.denoise:.1f} s")
            if chunk.index + 1 == options.chunks // 2:
                stream.set_prompt(options.then, mode="cut")
    print(f"video: {options.output}")


if __name__ == "__main__":
    main()
