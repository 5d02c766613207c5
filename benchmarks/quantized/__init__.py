"""Deployment in few bits: methods held against plain LoRA; ``python -m benchmarks.quantized --help`` tells how to run it."""
