"""The largest adapters that the kernels' scratch memory holds. Without torch: checks of uploads read it."""

MAX_RANK = 1024  # of a LoRA; the setting max_lora_rank allows no more
MAX_WIDTH = 8192  # of a bottleneck
