"""The demo: distil a small language model on real text, with the eager loss and with fused_kd."""
