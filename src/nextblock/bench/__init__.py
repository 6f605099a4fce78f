"""What `nextblock bench` runs: this package's speed as a ratio to a plain alternative, on the same machine.

Every variant runs in processes of its own, in turn with the others, so that what else the machine does hits
all of them; times are medians. A bench is a class of settings with `run()`, listed in `BENCHES`.
"""

from __future__ import annotations

__all__ = ["BENCHES"]

BENCHES = {
    "step": ("nextblock.bench.step:StepBench", "a training step, against a plain implementation"),
    "loop": ("nextblock.bench.loop:LoopBench", "what the training loop itself costs a step"),
    "probe": ("nextblock.bench.probe:ProbeBench", "a grid of probe heads in one pass, against a run each"),
    "embed": ("nextblock.bench.embed:EmbedBench", "writing features, against the rate of matrix products"),
    "data": ("nextblock.bench.data:DataBench", "decoding and cropping, against Pillow and torchvision"),
}
"""Name: (its class, what it measures)."""
