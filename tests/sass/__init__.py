"""Run the CUDA kernels' machine code without a GPU, and count the instructions it executes."""
