"""Training of the multimodal model: data, loop, checkpoints, and the commands around them."""
