"""What a compiler shows of the kernels without a GPU: registers, shared memory, machine code, and from these a
predicted share of the roofline."""
