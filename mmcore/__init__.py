"""Training core for vision-language models, on top of the fused ops of :mod:`mmkernels`."""
