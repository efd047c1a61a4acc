"""Where the machine is named: launch, process groups, seeds, stop signals, and the CPU standing in for CUDA.

Only this folder reads the environment, names "cuda" as a device or touches megatron-core's `parallel_state`;
everything downstream is handed groups and a device.
"""
