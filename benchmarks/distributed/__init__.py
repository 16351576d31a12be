"""Clipping FSDP2's sharded gradients: torch's DTensor road, torch on local tensors, and ours, on several processes."""
